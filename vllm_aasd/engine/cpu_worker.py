"""The worker that vLLM starts for `aasd` on its CPU platform."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_aasd.engine.worker import AASDWorker


class AASDCPUWorker(AASDWorker, CPUWorker):
    """vLLM's CPU worker, with our adapter called around each step."""
