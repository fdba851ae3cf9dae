"""Offsets beyond 2^31 elements: rows times a vocabulary. `test_draft_batch` has slots times a model's length."""

import torch

from aasd_testing import verify_paths
from vllm_aasd.gpu_check.verify_inputs import random_batch
from vllm_aasd.kernels.align import reference as align_reference
from vllm_aasd.kernels.verify import reference
from vllm_aasd.kernels.verify.seeded import SeededBatch

STRIDE = 2**30 + 16
"""Of three rows, the third begins beyond int32."""
FAR = "aasd_testing.large_offsets"


def test_the_verifier(interpreter, tmp_path):
    arguments = random_batch(300, [3, 2, 3], torch.bfloat16, seed=4)
    expected = reference.verify_seeded(SeededBatch(**verify_paths.with_own_state(arguments)))
    found = interpreter.call(f"{FAR}:verify_far", arguments, STRIDE, str(tmp_path))
    assert found.sampled.tolist() == expected.sampled.tolist()
    assert found.relaxed.tolist() == expected.relaxed.tolist()


def test_the_store(interpreter, tmp_path):
    logits, token_ids = torch.randn(4, 300).bfloat16(), torch.arange(4, dtype=torch.int32)
    tables = torch.zeros(2, 4, 5, dtype=torch.int32)
    found = interpreter.call(f"{FAR}:align_far", logits, token_ids, tables[0], STRIDE, str(tmp_path))
    align_reference.align(logits, token_ids, torch.arange(4), tables[1])
    assert found[:, :3].tolist() == tables[1, :, :3].tolist()
