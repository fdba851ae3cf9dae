"""Lets vLLM's V2 model runner serve on a CPU, its Triton kernels and ours interpreted. For tests only.

What it shows is the runner's logic with its real kernels' semantics: no CUDA graphs, no compiled kernel, no speed, and
asynchronous scheduling only where `schedule_ahead` is called.
"""

import os


def prepare() -> None:
    """Set this process up; to be called before vLLM or Triton is imported."""
    # Triton decides while it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    from aasd_testing import interpreter
    from aasd_testing.interpreted import let_vllm_see_triton

    let_vllm_see_triton()
    interpreter._patch_language_once()


def gather_by_gloo() -> None:
    """Have ranks gather through gloo. vLLM's shared memory between CPU ranks knows no integers, which its batch-sharded
    sampling gathers; on CPUs without AVX-512 it has none anyhow."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def schedule_ahead() -> None:
    """Have vLLM schedule asynchronously, as on GPUs: each step before the tokens of the last are known."""
    from types import SimpleNamespace

    from vllm.platforms.cpu import CpuPlatform

    from vllm_aasd.engine import unsupported

    stock = CpuPlatform.check_and_update_config

    def asynchronous(cls, vllm_config):
        stock(vllm_config)
        # What it has just turned off.
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(asynchronous)
    unsupported.current_platform = SimpleNamespace(is_cpu=lambda: False)
