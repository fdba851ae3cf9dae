"""Completes the prior of a model through vLLM."""

from pathlib import Path

from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

# Enough for what stands before each token, and short to save KV cache.
_CONTEXT_LENGTH = 512
# What x86 needs for arithmetic in bfloat16; elsewhere PyTorch has it.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def engine_arguments(model: str, arguments: list[str]) -> EngineArgs:
    """Read vLLM's own arguments from a command line, with defaults that suit reading short prompts.

    Args:
        model: path or name of the target model.
        arguments: such as ``["--tensor-parallel-size", "2"]``.

    Raises:
        SystemExit: an argument that vLLM doesn't know.
    """
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="python -m vllm_aasd.prior"))
    parser.set_defaults(
        max_model_len=_CONTEXT_LENGTH,
        max_num_seqs=256,
        speculative_config={"method": "aasd", "aasd_prior": 0},
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    if current_platform.is_cpu() and emulates_bfloat16():
        # Several times faster, with the same likeliest successors.
        parser.set_defaults(dtype="float32")
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))


def emulates_bfloat16(described: str | None = None) -> bool:
    """Whether PyTorch only emulates bfloat16 on this CPU, as on older x86: several times slower than float32.

    Args:
        described: the CPU as in ``/proc/cpuinfo``; by default, this file's content.
    """
    if described is None:
        path = Path("/proc/cpuinfo")
        described = path.read_text() if path.exists() else ""
    flags = next((line.split() for line in described.splitlines() if line.startswith("flags")), None)
    return flags is not None and not _BFLOAT16_FLAGS & set(flags)


def ask_for_successors(engine: EngineArgs) -> None:
    """Start the engine, and have its workers ask for the successors that the prior on disk lacks, and write it."""
    LLM.from_engine_args(engine).collective_rpc("aasd_make_prior")
