"""The kernels of known text compiled for GPUs that are not here, from the very launches that the ops make."""

import pytest
import torch

from aasd_testing.texts import texts_of
from benchmarks import kernels
from benchmarks.launches import TARGETS, build, compiled_kernel, distinct, recorded
from vllm_aasd.kernels.text import triton as text_triton

SM_90 = TARGETS["sm_90"]


def launches(target, num_reqs=4):
    inputs = kernels.Inputs(num_reqs, 0, 111, torch.bfloat16)
    return distinct(recorded(kernels.texts(inputs), TARGETS[target]))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled_to_memory(target):
    built = {(launch.name, launch.sizes): build(launch, TARGETS[target]) for launch in launches(target)}
    names = [name for name, _ in built]
    assert sorted(names) == ["begin_predictions_kernel", "learn_and_begin_kernel", "write_kernel", "write_kernel"]
    for name, one in built.items():
        assert one.stack_bytes == one.spill_bytes == 0 and one.registers <= 128, (name, one)


def test_a_spill_would_be_seen():
    launch = next(launch for launch in launches("sm_90") if launch.name == "learn_and_begin_kernel")
    assert build(launch, SM_90, maxnreg=32).spill_bytes > 0


def test_no_request_asks_for_another_compilation():
    """Neither how many there are, nor where their rows begin in the batch."""
    keys, texts = {}, texts_of(64, 8, 64)
    contexts, lengths = torch.zeros(64, 512, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for num_reqs, start in ((1, 0), (2, 1), (16, 3), (33, 0), (64, 0)):
        rows = torch.arange(start, start + num_reqs), torch.ones(start + num_reqs, dtype=torch.int32)[start:]
        for launch in recorded(lambda rows=rows: text_triton.learn_and_append(texts, contexts, lengths, *rows, 32)):
            keys.setdefault(launch.name, set()).add(str(launch.specialization(SM_90)[1:]))
    assert {name: len(of) for name, of in keys.items()} == {"learn_and_begin_kernel": 1, "write_kernel": 1}


@pytest.mark.parametrize("num_reqs", [1, 256, 1024])
def test_a_step_is_two_launches_whatever_is_stored_or_asked(num_reqs):
    texts = texts_of(num_reqs, 8, 64)
    contexts, lengths = torch.zeros(num_reqs, 512, dtype=torch.int32), torch.zeros(num_reqs, dtype=torch.int32)
    rows = torch.arange(num_reqs), torch.ones(num_reqs, dtype=torch.int32)
    step = recorded(lambda: text_triton.learn_and_append(texts, contexts, lengths, *rows, 32))
    assert [launch.grid for launch in step] == [(1,), (num_reqs, 2)]


def test_one_page_of_corpora_and_one_draft_token_compile():
    """Triton makes constants of arguments that are 1."""
    texts = texts_of(1, 1, 1)
    contexts, lengths = torch.zeros(1, 512, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows = torch.arange(1), torch.ones(1, dtype=torch.int32)
    for launch in recorded(lambda: text_triton.learn_and_append(texts, contexts, lengths, *rows, 32)):
        assert build(launch, TARGETS["gfx942"]).registers > 0


def test_state_is_stored_after_all_threads_have_read_it():
    launch = next(launch for launch in launches("sm_90") if launch.name == "learn_and_begin_kernel")
    assert compiled_kernel(launch, SM_90).asm["ttgir"].count("ttg.barrier all") == 5


def test_values_are_rounded_as_the_references():
    launch = next(launch for launch in launches("sm_90") if launch.name == "learn_and_begin_kernel")
    ptx = compiled_kernel(launch, SM_90).asm["ptx"]
    assert "div.rn.f64" in ptx and "fma.rn" not in ptx
