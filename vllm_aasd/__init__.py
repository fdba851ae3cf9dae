"""vllm-aasd: alignment-augmented speculative decoding as a vLLM plugin.

Importing this package does no work and loads neither vLLM nor torch; vLLM finds the plugin through the
``vllm.general_plugins`` entry point, `vllm_aasd.plugin.register`.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
