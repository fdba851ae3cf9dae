"""The adapter of vLLM's V1 model runner."""
