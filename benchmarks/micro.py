"""Microseconds of a draft and of a verification on the CPU, next to vLLM's own for the same job.

    python -m benchmarks.micro

Drafts: the context is Python source code that grows by two tokens before every draft, as decoding does, and the
alignment store is made up (half of the positions predict the true next token), for the time doesn't depend on where
it comes from. Verification: the logits are made up; in each row two tokens share nearly all of the probability, and
the drafts are the likeliest ("argmax") or the other ("rival", where rules must look closer). Each batch is one of a
ring larger than the CPU's caches. What is timed is first compared with its reference, and `strict` with vLLM's
sampler.
"""

import functools
import gc
import importlib
import inspect
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import report, results
from benchmarks.kernels import policy_tensors
from benchmarks.tasks import load_tokenizer
from vllm_aasd.engine.configuration import NUM_SPECULATIVE_TOKENS_V1
from vllm_aasd.kernels import verify as verify_op
from vllm_aasd.kernels.verify import reference as verify_reference

NEW_TOKENS = 2
TOP_K = 4
NUM_DRAFT_TOKENS = 8
MIN_SURVIVAL = 0.02
RING_BYTES = 256 * 2**20
RULES = ("strict", "conditional", "fly", "budget")
_SOURCES = ["argparse", "ast", "collections", "difflib", "inspect", "pathlib", "subprocess", "tarfile", "typing"]


def main() -> None:
    """Measure, write the result, print its tables."""
    parser = results.arguments(__doc__, "micro.json")
    results.add_model_argument(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768], help="default %(default)s")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[49152, 151936], help="default %(default)s")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="timed per figure (default %(default)s)")
    arguments = parser.parse_args()
    results.require_model(arguments)

    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    # This platform's kernels, as a worker has them. First, since vLLM's search for them fails once numba is loaded.
    current_platform.register_triton_kernel_overrides()
    stock = rejection_sampler.rejection_sample
    tokenizer = load_tokenizer(arguments.model)
    texts = [inspect.getsource(importlib.import_module(name)) for name in _SOURCES]
    tokens = np.array(tokenizer.encode("".join(texts)), np.int32)
    drafts = [time_drafts(tokens, length, arguments.steps, len(tokenizer)) for length in arguments.contexts]
    verification = [
        {"vocab_size": vocab_size, "requests": size, "drafts": case}
        | time_verification(size, vocab_size, case, arguments.steps, stock)
        for vocab_size in arguments.vocab_sizes
        for size in arguments.batch_sizes
        for case in ("argmax", "rival")
    ]
    metadata = results.metadata(**results.conditions(arguments), threads=torch.get_num_threads())
    result = {"metadata": metadata, "drafts": drafts, "verification": verification}
    results.write(arguments.out, result)
    print(f"{results.heading(result)}\n\n{report.micro(result)}")


def microseconds(calls: Sequence[Callable[[], object]], warm_up: int = 3) -> list[float]:
    """``[median, 95th percentile]`` of the microseconds of calls, each made once; the first don't count."""
    times = []
    gc.disable()
    for call in calls:
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1000)
    gc.enable()
    return [round(float(value), 1) for value in np.percentile(times[warm_up:], (50, 95))]


def time_drafts(tokens: np.ndarray, length: int, num_steps: int, vocab_size: int) -> dict[str, Any]:
    """Drafts of one request whose context has `length` tokens at first."""
    if len(tokens) < length + NEW_TOKENS * num_steps:
        raise SystemExit(f"error: the text has {len(tokens)} tokens, too few for a context of {length}")
    from benchmarks.methods import METHODS
    from vllm_aasd.drafting.drafter import AlignmentView, Drafter

    contexts = [tokens[: length + NEW_TOKENS * step] for step in range(1, num_steps + 1)]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (len(tokens), TOP_K)).astype(np.int32)
    # The true next token is the likeliest at one half of the positions, the least likely elsewhere.
    ids[np.arange(len(tokens)), np.where(rng.random(len(tokens)) < 0.5, 0, TOP_K - 1)] = np.append(tokens[1:], 0)
    probs = np.full((len(tokens), TOP_K), [0.5, 0.2, 0.1, 0.1], np.float32)
    table = np.concatenate([tokens[:, None], ids, probs.view(np.int32)], axis=1)
    view = AlignmentView(table, np.zeros(1, np.int32), len(tokens))
    drafter = Drafter(vocab_size, NUM_SPECULATIVE_TOKENS_V1, MIN_SURVIVAL)
    # The prompt, once.
    drafter.draft("a", tokens[:length], view, 0)
    draft = lambda context: drafter.draft("a", context, view, NUM_SPECULATIVE_TOKENS_V1)

    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    # What the proposer reads of vLLM's configuration.
    ngram = NgramProposer(
        types.SimpleNamespace(
            speculative_config=types.SimpleNamespace(**METHODS["ngram"] or {}),
            model_config=types.SimpleNamespace(max_model_len=len(tokens) + 1),
            scheduler_config=types.SimpleNamespace(max_num_seqs=1),
            parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
        )
    )
    propose = lambda context: ngram.propose(5, [[0]], np.array([len(context)], np.int32), tokens[None])
    return {"context": length} | {
        name: microseconds([functools.partial(call, context) for context in contexts])
        for name, call in (("aasd", draft), ("vllm ngram", propose))
    }


class Batch:
    """One step's input to both samplers: ``[batch_size * NUM_DRAFT_TOKENS, vocab_size]`` float32 logits, and drafts."""

    def __init__(self, logits: torch.Tensor, draft_token_ids: torch.Tensor, stock: Callable[..., torch.Tensor]) -> None:
        self.logits, self.draft_token_ids, self._stock = logits, draft_token_ids, stock
        self.size = len(draft_token_ids) // NUM_DRAFT_TOKENS
        self.cu_num_draft_tokens = torch.arange(1, self.size + 1, dtype=torch.int32) * NUM_DRAFT_TOKENS
        self.bonus_token_ids = torch.zeros((self.size, 1), dtype=torch.int32)
        self._policies = {rule: policy_tensors(rule, self.size) for rule in RULES}

    def arguments(self, rule: str) -> verify_op.VerifyBatch:
        """What `verify` takes, the requests being new, since what they relaxed would bar later calls from relaxing."""
        self._policies[rule].state.zero_()
        is_greedy = torch.ones(self.size, dtype=torch.bool)
        stop = torch.full((self.size, 1), 2, dtype=torch.int32)
        draft = self.draft_token_ids, self.cu_num_draft_tokens, NUM_DRAFT_TOKENS
        return verify_op.VerifyBatch(*draft, self.logits, self.bonus_token_ids, is_greedy, self._policies[rule], stop)

    def run(self, name: str) -> torch.Tensor:
        """The batch verified by a rule, or by "vllm"."""
        return self.stock() if name == "vllm" else verify_op.verify(self.arguments(name)).sampled

    def stock(self) -> torch.Tensor:
        """The batch through vLLM's own function."""
        return self._stock(
            self.draft_token_ids,
            [NUM_DRAFT_TOKENS] * self.size,
            NUM_DRAFT_TOKENS,
            self.cu_num_draft_tokens,
            None,
            self.logits,
            self.bonus_token_ids,
            types.SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={}),
        )


def time_verification(
    size: int, vocab_size: int, case: str, num_steps: int, stock: Callable[..., torch.Tensor]
) -> dict[str, list[float]]:
    """Every rule and vLLM's sampler over the same batches, in four rounds in turn; the medians over rounds."""
    rng = torch.Generator().manual_seed(0)
    num_rows = size * NUM_DRAFT_TOKENS
    ring = []
    for _ in range(max(2, RING_BYTES // (num_rows * vocab_size * 4))):
        logits = torch.randn((num_rows, vocab_size), generator=rng)
        top, rival = torch.randint(3, vocab_size, (2, num_rows), generator=rng)
        logits[torch.arange(num_rows), rival] = 19.9
        # Where both fall on one token it is the argmax either way.
        logits[torch.arange(num_rows), top] = 20.0
        ring.append(Batch(logits, (top if case == "argmax" else rival).int(), stock))
    for rule in RULES:
        got = ring[0].run(rule)
        want = verify_reference.verify(ring[0].arguments(rule)).sampled
        if not torch.equal(got, want) or (rule == "strict" and not torch.equal(got, ring[0].stock())):
            sys.exit(f"{rule} differs from its reference or from vLLM's sampler; nothing is timed")
    rounds: dict[str, list[list[float]]] = {name: [] for name in (*RULES, "vllm")}
    for _ in range(4):
        for name, of in rounds.items():
            calls = [functools.partial(batch.run, name) for batch in ring]
            of.append(microseconds([calls[i % len(calls)] for i in range(num_steps // 4 + 3)]))
    return {name: np.median(of, axis=0).tolist() for name, of in rounds.items()}


if __name__ == "__main__":
    main()
