"""Makes functions of the plugin fail, to test that a fault costs speculation and no answer."""

import importlib
from collections.abc import Callable
from typing import Any

FAULT_POINTS = {
    "V1": {
        "vllm_aasd.engine.v1.requests:settings_of": "requests",
        "vllm_aasd.drafting.corpora:Corpora.namespaces": "draft",
        "vllm_aasd.drafting.drafter:Drafter.draft": "draft",
        "vllm_aasd.drafting.suffix_index:SuffixIndex.extend": "draft",
        "vllm_aasd.kernels.draft.cpu:draft": "draft",
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
        "vllm_aasd.drafting.corpora:Corpora.namespaces": "requests",
        "vllm_aasd.alignment:AlignmentStore.write": "store",
        "vllm_aasd.engine.v2.texts:V2Texts.step": "draft",
        "vllm_aasd.engine.v2.rejection_sampler:verify_seeded": "verify",
        "vllm_aasd.kernels.draft.triton:draft_batch": "draft",
    },
}
"""By model runner: functions, as "module:function" or "module:Class.method", and the component that each belongs to."""

GRAMMAR_FAULT_POINTS = {
    "vllm_aasd.drafting.forced:GrammarSteering.draft": "grammar",
    "vllm_aasd.drafting.forced:GrammarSteering.verified": "grammar",
}
"""The same of both model runners' scheduler, for requests with structured output."""


class InjectedFault(RuntimeError):
    """Raised by an injected fault, and by nothing else."""


def inject(function: str, fails: Callable[[], bool] = lambda: True) -> Callable[[], None]:
    """Have a function, named as in `FAULT_POINTS`, fail whenever `fails` says so; returns what undoes it."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if fails():
            raise InjectedFault(f"injected into {name}")
        return original(*args, **kwargs)

    setattr(owner, name, failing)
    return lambda: setattr(owner, name, original)
