"""Workarounds for faults of vLLM's V1 model runner on CPUs, which show with and without speculation of ours."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.gpu_input_batch import InputBatch


def patch_expand_batch_to_tokens(stock: Callable) -> Callable:
    """vLLM's ``expand_batch_to_tokens`` leaves its result uninitialized on a CPU, and sampling divides by it."""

    @functools.wraps(stock)
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        replaced = torch.where(x == replace_from, torch.tensor(replace_to, dtype=x.dtype, device=x.device), x)
        return replaced.repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


def patch_apply_sampling_constraints(stock: Callable) -> Callable:
    """vLLM's ``apply_sampling_constraints`` fails with top-k on a step without drafts."""

    @functools.wraps(stock)
    def apply_sampling_constraints(
        logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> torch.Tensor:
        if logits.shape[0] == 0:
            return logits
        return stock(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_sampling_constraints


def patch_prompt_token_ids(stock: Callable) -> Callable:
    """vLLM's ``_make_prompt_token_ids_cpu_tensor`` takes a former request's tokens for those of a prompt of embeddings.

    vLLM writes no tokens for such a prompt, so its row holds what it held before. A repetition penalty then acts on
    another request's tokens. With speculation, -1 may be among them: the scheduler pads the first step of a one-token
    prompt with such drafts. Penalties of any request in the batch then end the engine.
    """

    @functools.wraps(stock)
    def _make_prompt_token_ids_cpu_tensor(self: InputBatch) -> torch.Tensor:
        prompt_token_ids = stock(self)
        if self.req_prompt_embeds:
            num_reqs, max_prompt_len = prompt_token_ids.shape
            is_token = self.is_token_ids_tensor[:num_reqs, :max_prompt_len]
            # vLLM's padding, which penalties ignore.
            prompt_token_ids.masked_fill_(~is_token, self.vocab_size)
        return prompt_token_ids

    return _make_prompt_token_ids_cpu_tensor


@contextlib.contextmanager
def without_discarded_generators(runner: Any) -> Iterator[None]:
    """While it lasts, the runner has no CPU generators for requests whose samples it will discard.

    The runner samples for every request of a batch, and discards the samples of those whose prompts aren't finished. It
    then resets their generators by their offset, which a CPU's generator doesn't have: the engine fails as soon as a
    seeded request's prompt comes in two chunks. A generator that isn't used needs no reset.

    Args:
        runner: vLLM's, between its forward pass and its sampling.
    """
    generators = runner.input_batch.generators
    discarded = {
        row: generator
        for row, generator in generators.items()
        if generator.device.type == "cpu" and runner.discard_request_mask.np[row]
    }
    for row in discarded:
        del generators[row]
    try:
        yield
    finally:
        generators.update(discarded)
