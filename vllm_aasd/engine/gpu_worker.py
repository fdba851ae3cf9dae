"""The worker that vLLM starts for `aasd` on CUDA and ROCm."""

from vllm_aasd.engine.worker import AASDWorker


class AASDGPUWorker(AASDWorker):
    """vLLM's GPU worker, with our adapter called around each step."""
