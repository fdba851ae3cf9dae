"""Context to draft tokens: the suffix index and the estimator over it. Knows token ids and probabilities only."""
