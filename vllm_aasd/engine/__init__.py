"""Everything that touches vLLM: patches, configuration, workers, and one adapter per model runner."""
