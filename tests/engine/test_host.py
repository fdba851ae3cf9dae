"""What a CPU is taken to be able to do, by Linux's description of it."""

import pytest

from vllm_aasd.host import emulates_bfloat16


@pytest.mark.parametrize(
    ("described", "emulates"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx2 fma\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        ("flags\t\t: fpu amx_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_older_x86_cpus_emulate_bfloat16(described, emulates):
    assert emulates_bfloat16(described) is emulates
