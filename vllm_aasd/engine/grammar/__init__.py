"""Drafts beside vLLM's structured output, made in the scheduler's process, where the grammars are."""
