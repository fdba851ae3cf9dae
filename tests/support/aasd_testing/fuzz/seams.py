"""Where faults are injected: functions of ours, "module:function" or "module:Class.method", and the place of each."""

import importlib
from typing import Any

SEAMS = {
    "V1": {
        "vllm_aasd.engine.v1.requests:settings_of": "requests",
        "vllm_aasd.drafting.drafter:Drafter.draft": "draft",
        "vllm_aasd.drafting.drafter:Drafter.verified": "draft",
        "vllm_aasd.alignment:AlignmentStore.write": "store",
        "vllm_aasd.drafting.draft_length:lengths_and_gain": "step_time",
        "vllm_aasd.drafting.step_time:StepTimeModel.observe": "step_time",
        "vllm_aasd.kernels.verify:verify": "verify",
        "vllm_aasd.verification.table:PolicyBatch.fill": "verify",
        "vllm_aasd.engine.v1.counting:count_arrays": "metrics",
        "vllm_aasd.drafting.drafter:Drafter.predicted_survival": "metrics",
    },
    "V2": {
        "vllm_aasd.engine.v2.requests:settings_of": "requests",
        "vllm_aasd.alignment:AlignmentStore.write": "store",
        "vllm_aasd.engine.v2.rejection_sampler:V2Verifier.without_fillers": "verify",
        "vllm_aasd.engine.v2.rejection_sampler:verify_seeded": "verify",
        "vllm_aasd.kernels.draft.triton:draft_batch": "draft",
        "vllm_aasd.engine.v2.counting:count_drafts": "metrics",
    },
}

OFF_PLACES = ("requests", "draft", "store", "step_time", "verify", "metrics")
"""Places that a case may have off for a while, as after too many faults."""


def owner_of(where: str) -> tuple[Any, str]:
    """The module or class that holds a function, named as in `SEAMS`, and the function's name in it."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name
