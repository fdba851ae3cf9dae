"""The adapter of vLLM's V2 model runner."""
