"""Everything that touches vLLM: seams, configuration, workers, and one adapter per model runner."""
