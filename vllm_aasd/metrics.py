"""The metrics of an `LLM` that runs with method ``aasd``: ``vllm_aasd.metrics.get(llm)``."""

from vllm_aasd.engine.metrics import get

__all__ = ["get"]
