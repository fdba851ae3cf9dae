"""Ways to break the product, to see that the fuzzer notices."""

from collections.abc import Callable
from typing import Any

WRONG_TOKEN, EVERY = 300, 50


def apply(name: str, worker: Any) -> None:
    """Break a worker.

    Args:
        name: of `MUTANTS`.
        worker: a live one.
    """
    MUTANTS[name](worker)


def _wrong_token(worker: Any) -> None:
    """Once in 50 steps the verifier emits another last token than the target's."""
    from vllm_aasd.engine.v1 import rejection_sampler as v1_verifier

    real, calls = v1_verifier.V1Verifier.rejection_sample, [0]

    def rejection_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] % EVERY == 0:
            output[0, 0] = WRONG_TOKEN
        return output

    v1_verifier.V1Verifier.rejection_sample = rejection_sample


def _accept_all(worker: Any) -> None:
    """Every policy is the loosest: the verifier takes strict requests for lossy ones."""
    from vllm_aasd.engine.startup import policy_of
    from vllm_aasd.engine.v1 import requests as v1_requests

    def loosest(settings: Any, params: Any) -> Any:
        return policy_of(worker.speculative_config.aasd, params)

    v1_requests.policy_of = loosest


def _leak(worker: Any) -> None:
    """The drafter keeps the first of the requests that end in a step."""
    from vllm_aasd.drafting.drafter import Drafter

    real = Drafter.forget

    def forget(self: Any, request_ids: Any) -> None:
        real(self, sorted(request_ids)[1:])

    Drafter.forget = forget


def _drop(worker: Any) -> None:
    """The tokens of one request in 60 steps are lost, as if the step had emitted none."""
    real, calls = worker.sample_tokens, [0]

    def sample_tokens(grammar: Any) -> Any:
        output = real(grammar)
        calls[0] += 1
        if calls[0] % 60 == 0 and output is not None and output.sampled_token_ids:
            output.sampled_token_ids[0] = []
        return output

    worker.sample_tokens = sample_tokens


def _garbage_store(worker: Any) -> None:
    """What the store holds is another token's: no strict answer may change by it, only drafts get worse."""
    from vllm_aasd.alignment import AlignmentStore

    real = AlignmentStore.write

    def write(self: Any, logits: Any, token_ids: Any, slot_mapping: Any) -> None:
        real(self, logits.roll(1, dims=0), token_ids, slot_mapping)

    AlignmentStore.write = write


def _uncontained(worker: Any) -> None:
    """What fails in drafting goes on."""
    from vllm_aasd.engine import failsafe

    failsafe._Contained.__exit__ = lambda self, kind, error, trace: False


def _unadapted(worker: Any) -> None:
    """Adapters do nothing."""
    runner = worker.model_runner
    real = runner._set_active_loras

    def set_active_loras(prompts: Any, tokens: Any, requests: Any, *rest: Any) -> None:
        real((0,) * len(prompts), (0,) * len(tokens), set(), *rest)

    runner._set_active_loras = set_active_loras


MUTANTS: dict[str, Callable[[Any], None]] = {
    "wrong_token": _wrong_token,
    "accept_all": _accept_all,
    "leak": _leak,
    "drop": _drop,
    "garbage_store": _garbage_store,
    "uncontained": _uncontained,
    "unadapted": _unadapted,
}
