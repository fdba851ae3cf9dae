"""What a new GPU has to show before it serves: see `vllm_aasd.gpu_check.__main__`.

Checks of kernels need torch and Triton alone. What needs vLLM is in `vllm_aasd.engine.gpu_trial`.
"""
