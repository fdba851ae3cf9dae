"""What a step of our ops costs: time beside what memory bandwidth allows, launches, host time, compilations, memory."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_aasd.alignment import AlignmentStore, entry_bytes
from vllm_aasd.gpu_check import verify_inputs
from vllm_aasd.gpu_check.gpu import Gpu
from vllm_aasd.gpu_check.inputs import batch_of, texts_of
from vllm_aasd.gpu_check.kernels import copied
from vllm_aasd.kernels.align import align
from vllm_aasd.kernels.draft.batch import DraftBatch, draft_batch
from vllm_aasd.kernels.text.batch import learn_and_append, text_bytes
from vllm_aasd.kernels.verify.seeded import SeededBatch, verify_seeded

BF16, F32 = torch.bfloat16, torch.float32
MAX_PER_STEP = {"verify": 4, "draft": 1, "learn and append": 2, "align": 4}
"""Launches of an op, whatever the batch and its context."""

MAX_HOST_MICROSECONDS = 200
"""Of one op: a step of a small model takes 2000."""


class Sizes(NamedTuple):
    """Of what is timed: requests with their drafts, tokens of context, vocabulary, pages of text."""

    batches: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    vocab_size: int
    num_pages: int


FULL = Sizes(((1, 7), (32, 3), (256, 1)), (1024, 32768, 131072), 151936, 16384)


def verify_batch(
    gpu: Gpu, num_reqs: int, width: int, vocab_size: int, dtype: torch.dtype, temperature: float
) -> SeededBatch:
    """Requests with drafts of this width, all but the last of each the argmax of its row."""
    num_rows = num_reqs * (width + 1)
    rows, drafts = [torch.zeros(width + 1, 2)] * num_reqs, [[0] * width] * num_reqs
    made = verify_inputs.batch(rows, drafts, temperature=[temperature] * num_reqs, seed=range(num_reqs))
    given = copied(made, gpu.device)
    logits = torch.randn(num_rows, vocab_size + 64, device=gpu.device).to(dtype)[:, :vocab_size]
    given |= {"target_logits": logits, "draft_sampled": logits.argmax(-1).roll(1).int()}
    return SeededBatch(**given, all_greedy=temperature == 0)


def drafting(gpu: Gpu, num_reqs: int, width: int, context: int, vocab_size: int, num_pages: int) -> DraftBatch:
    """Contexts in which tokens are about as frequent as words, and whose last tokens came before."""
    tokens = (np.random.default_rng(0).zipf(1.2, context) % vocab_size).astype(np.int32)
    tokens[context // 2 : context // 2 + 4] = tokens[-4:]
    made = batch_of([tokens] * num_reqs, vocab_size, width, prior_top_k=8, max_matches=32, min_survival=0.02)
    batch = made.arguments()._replace(texts=texts_of(len(made.total_len), width, num_pages))
    batch = copied(batch, gpu.device)
    batch.texts.slots.copy_(torch.arange(1, 1 + batch.texts.slots.shape[1]))
    return batch


class Step(NamedTuple):
    """The ops of one step, each to be called."""

    verify: SeededBatch
    draft: DraftBatch
    calls: dict[str, Callable[[], Any]]


def step_of(gpu: Gpu, sizes: Sizes, num_reqs: int, width: int, context: int, temperature: float = 1.0) -> Step:
    """A step of so many requests with a context of so many tokens."""
    verify = verify_batch(gpu, num_reqs, width, sizes.vocab_size, BF16, temperature)
    draft = drafting(gpu, num_reqs, width, context, sizes.vocab_size, sizes.num_pages)
    contexts = draft.all_token_ids, draft.total_len, draft.idx_mapping, draft.num_sampled
    k = 4
    slots = torch.arange(len(verify.pos), device=gpu.device)
    table = torch.zeros((len(slots), 1 + 2 * k), dtype=torch.int32, device=gpu.device)
    calls: dict[str, Callable[[], Any]] = {
        "verify": lambda: verify_seeded(verify),
        "draft": lambda: draft_batch(draft),
        "learn and append": lambda: learn_and_append(draft.texts, *contexts, 32),
        "align": lambda: align(verify.target_logits, verify.draft_sampled, slots, table),
    }
    return Step(verify, draft, calls)


def check_no_synchronization(gpu: Gpu, sizes: Sizes) -> str:
    """A step's ops never wait for the device."""
    (num_reqs, width), context = sizes.batches[-1], sizes.contexts[0]
    calls = step_of(gpu, sizes, num_reqs, width, context).calls
    # What is compiled and allocated for the first time may wait.
    for call in calls.values():
        call()
    with gpu.no_synchronization():
        for call in calls.values():
            call()
    return f"{', '.join(calls)} at {num_reqs} requests"


def check_launches(gpu: Gpu, sizes: Sizes) -> str:
    """Launches and host time of each op, whatever the number of requests and the context."""
    said, wrong = [], []
    for num_reqs, width in sizes.batches:
        for context in sizes.contexts:
            for name, call in step_of(gpu, sizes, num_reqs, width, context).calls.items():
                launches, host = gpu.launches(call), gpu.host_microseconds(call)
                said.append(f"{name} {num_reqs} x {context}: {launches} launches, {host:.0f} us")
                if launches > MAX_PER_STEP[name] or host > MAX_HOST_MICROSECONDS:
                    wrong.append(said[-1])
    if wrong:
        raise AssertionError("; ".join(wrong))
    return "; ".join(said)


def limit_of(name: str, step: Step, bandwidth: float) -> tuple[float, float]:
    """The floor of an op's time in us, what it reads over the bandwidth, and the most that it may take."""
    logits = step.verify.target_logits
    if name in ("verify", "align"):
        floor = 1e6 * len(logits) * logits.shape[1] * logits.element_size() / bandwidth
        return floor, 2 * floor + 60
    num_reqs, width = step.draft.draft_token_ids.shape
    if name == "draft":
        context = step.draft.all_token_ids.shape[1]
        floor = 1e6 * 4 * num_reqs * context * width / bandwidth
        # A program scans one context: so many waits for memory as tiles, and two rounds of programs beyond 132.
        return floor, (150 + context / 100) * (1 if num_reqs <= 132 else 2)
    return 1e6 * 2500 * num_reqs / bandwidth, 60.0


def check_times(gpu: Gpu, sizes: Sizes, stock: Callable[[Step], dict[str, Callable[[], Any]]]) -> str:
    """Time of each op on the device beside its floor, and beside vLLM's own kernels, which `stock` gives."""
    bandwidth = gpu.bandwidth()
    said, wrong = [f"{bandwidth / 1e9:.0f} GB/s"], []
    for num_reqs, width in sizes.batches:
        for context in sizes.contexts:
            step = step_of(gpu, sizes, num_reqs, width, context)
            for name, call in step.calls.items():
                # Those that read no context, once.
                if name != "draft" and context != sizes.contexts[0]:
                    continue
                floor, most = limit_of(name, step, bandwidth)
                time = gpu.microseconds(call)
                said.append(f"{name} {num_reqs} x {context}: {time:.0f} us (floor {floor:.0f}, at most {most:.0f})")
                if time > most:
                    wrong.append(said[-1])
            for name, call in stock(step).items():
                said.append(f"{name} {num_reqs} x {context}: {gpu.microseconds(call):.0f} us")
    if wrong:
        raise AssertionError(f"{'; '.join(wrong)} | all: {'; '.join(said)}")
    return "; ".join(said)


def check_compilations(gpu: Gpu, sizes: Sizes, num_reqs: Iterable[int] = (1, 2, 15, 16, 17, 31, 32, 33, 64)) -> str:
    """What a warm-up compiles, and that no number of requests asks for another compilation after it."""

    def run(requests: int, dtype: torch.dtype, temperature: float) -> None:
        width = sizes.batches[0][1]
        verify_seeded(verify_batch(gpu, requests, width, sizes.vocab_size, dtype, temperature))

    step_of(gpu, sizes, *sizes.batches[-1], sizes.contexts[0])
    for call in step_of(gpu, sizes, *sizes.batches[0], sizes.contexts[0]).calls.values():
        call()
    kinds = [(dtype, temperature) for dtype in (BF16, F32) for temperature in (0.0, 1.0)]
    for requests, _ in (sizes.batches[0], sizes.batches[-1]):
        for kind in kinds:
            run(requests, *kind)
    warm = [f"{name} {seconds:.1f} s" for name, seconds in gpu.compiled]
    gpu.compiled.clear()
    for requests in num_reqs:
        for kind in kinds:
            run(requests, *kind)
        calls = step_of(gpu, sizes, requests, sizes.batches[0][1], sizes.contexts[0]).calls
        for name in ("draft", "learn and append", "align"):
            calls[name]()
    if gpu.compiled:
        raise AssertionError(f"compiled after the warm-up: {', '.join(name for name, _ in gpu.compiled)}")
    return f"so far: {', '.join(warm) or 'nothing'}"


def check_memory(gpu: Gpu, sizes: Sizes, num_reqs: int = 256, width: int = 8) -> str:
    """What known text and an alignment store take is what is taken off the KV cache for them."""
    said = []
    num_slots = 65536
    text = text_bytes(num_reqs, width, sizes.num_pages, 0), lambda: texts_of(num_reqs, width, sizes.num_pages)
    store = num_slots * entry_bytes(4), lambda: AlignmentStore(num_slots // 16, 16, 4, "cpu").table
    for name, (expected, make) in {"text": text, "store": store}.items():
        before = gpu.allocated()
        made: Any = copied(make(), gpu.device)
        taken = gpu.allocated() - before
        said.append(f"{name}: {taken} bytes, announced {expected}")
        # Each tensor is rounded up by the allocator.
        if taken > expected + 64 * 1024:
            raise AssertionError(said[-1])
        del made
    return "; ".join(said)
