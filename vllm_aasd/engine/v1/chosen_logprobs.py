"""Log-probabilities of the tokens in a request's ``logprob_token_ids``, in a batch with drafts.

vLLM's V1 rejection sampler asks the plain sampler for the bonus rows over the whole vocabulary, but gets the chosen
tokens only. It fails on them if another request has ``logprobs``, and drops them otherwise. Requests with
``logprob_token_ids`` have no drafts here, so they need only their bonus rows.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

_rows: ContextVar[list[torch.Tensor] | None] = ContextVar("aasd_bonus_rows", default=None)


@contextlib.contextmanager
def set_aside() -> Iterator[list[torch.Tensor]]:
    """While it lasts, vLLM's sampler gathers no chosen tokens, and appends its rows to this list instead."""
    rows: list[torch.Tensor] = []
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def patch_gather_specific_token_logprobs(stock: Callable) -> Callable:
    """Have vLLM's ``gather_specific_token_logprobs`` respect `set_aside`."""

    @functools.wraps(stock)
    def gather(
        self: Sampler, logprobs: torch.Tensor, logprob_token_ids: dict[int, list[int]], sampled: torch.Tensor
    ) -> LogprobsTensors | None:
        rows = _rows.get()
        if rows is None:
            return stock(self, logprobs, logprob_token_ids, sampled)
        rows.append(logprobs)
        return None

    return gather


def put_in(
    output: SamplerOutput, sampler: RejectionSampler, rows: list[torch.Tensor], chosen: dict[int, list[int]]
) -> None:
    """Add the chosen tokens' log-probabilities to a step's output, in place.

    Args:
        output: of `sampler`; its log-probabilities are those that other requests asked for.
        sampler: vLLM's.
        rows: what was set aside: one tensor, ``[batch_size, vocab_size]``, as vLLM's plain sampler reports bonus rows.
        chosen: token ids by batch row, of requests without drafts.
    """
    (scores,) = rows
    requests = list(chosen)
    scores = scores[requests]
    if not sampler.is_logits_logprobs_mode:
        scores = sampler.sampler.compute_logprobs(scores)
    batch_size, width = output.sampled_token_ids.shape
    sampled = output.sampled_token_ids[requests, 0].long()
    gathered = sampler.sampler.gather_specific_token_logprobs(scores, dict(enumerate(chosen.values())), sampled)
    parts = [(slice(None), output.logprobs_tensors)] if output.logprobs_tensors is not None else []
    parts.append((torch.tensor(requests, device=scores.device) * width, gathered))
    size = batch_size * width, max(tensors.logprobs.shape[1] for _, tensors in parts)
    token_ids = gathered.logprob_token_ids.new_zeros(size)
    logprobs = gathered.logprobs.new_full(size, float("-inf"))
    ranks = gathered.selected_token_ranks.new_zeros(size[0])
    for at, tensors in parts:
        token_ids[at, : tensors.logprobs.shape[1]] = tensors.logprob_token_ids
        logprobs[at, : tensors.logprobs.shape[1]] = tensors.logprobs
        ranks[at] = tensors.selected_token_ranks
    output.logprobs_tensors = LogprobsTensors(token_ids, logprobs, ranks)
