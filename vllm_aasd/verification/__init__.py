"""The acceptance rules, one small module each. Knows probabilities and parameters only."""
