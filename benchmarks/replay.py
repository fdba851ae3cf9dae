"""Recorded answers, and the drafter run over them: what it predicts, and what would have been accepted.

Under strict verification a greedy answer is the same whatever is drafted, so one recording serves every setting of the
drafter: at each step the draft is compared with how the answer went on. What is replayed is the served code (`Drafter`,
`lengths_and_gain`); only the price of a token is a number here instead of a measured curve. Recordings are kept in
``.bench/``.
"""

import argparse
import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import results
from benchmarks.engine import Engine
from benchmarks.tasks import Task, load_tokenizer, tokenize
from vllm_aasd.drafting.draft_length import lengths_and_gain
from vllm_aasd.drafting.drafter import AlignmentView, Drafter
from vllm_aasd.engine.model_key import model_key

TOP_K = 4
FOLDER = results.ROOT / ".bench"

Lengths = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Trace(NamedTuple):
    """One recorded answer.

    Attributes:
        category: of its prompt.
        token_ids: ``[T]`` int32, prompt and answer.
        num_prompt_tokens: of those.
        table: ``[T, 1 + 2 * TOP_K]`` int32, the alignment store as it fills up, predictions at prompt positions
        included.
    """

    category: str
    token_ids: np.ndarray
    num_prompt_tokens: int
    table: np.ndarray


class Replay(NamedTuple):
    """What the drafter did on some traces.

    Attributes:
        steps: of the target.
        emitted: tokens.
        seconds: in units of a step without drafts.
        predicted: ``[drafted]``, the survival that was predicted of each draft token.
        accepted: ``[drafted]``, whether it was accepted.
    """

    steps: int
    emitted: int
    seconds: float
    predicted: np.ndarray
    accepted: np.ndarray

    @property
    def drafted(self) -> int:
        """Draft tokens."""
        return len(self.predicted)

    @property
    def speed(self) -> float:
        """Tokens per unit of time, relative to plain decoding."""
        return self.emitted / self.seconds


def adaptive_drafts(survival: np.ndarray, step_times: np.ndarray) -> np.ndarray:
    """Draft lengths with the most expected tokens per second; see `lengths_and_gain`."""
    return lengths_and_gain(survival, step_times)[0]


def whole_drafts(survival: np.ndarray, step_times: np.ndarray) -> np.ndarray:
    """Draft lengths where drafts are verified as they are; see `adaptive_drafts`."""
    return np.count_nonzero(survival, axis=1)


def replay(
    traces: Iterable[Trace],
    drafter: Drafter,
    num_draft_tokens: int,
    price: float,
    lengths: Lengths = adaptive_drafts,
    namespace: int | None = None,
) -> Replay:
    """Run a drafter over traces, one request after the other.

    Args:
        traces: to run over, in this order: earlier answers serve later requests.
        drafter: as served.
        num_draft_tokens: the longest draft.
        price: what a draft token adds to a step's time, as a share of a step without drafts.
        lengths: how much of each draft is verified; `adaptive_drafts` or `whole_drafts`.
        namespace: of the answers that the requests share; None for none.
    """
    # Entry 1 is a step without drafts.
    step_times = 1 + price * np.maximum(np.arange(num_draft_tokens + 2) - 1, 0)
    steps, emitted, seconds = 0, 0, 0.0
    predicted, accepted = [np.empty(0, np.float32)], [np.empty(0, bool)]
    for number, trace in enumerate(traces):
        request_id, end = str(number), len(trace.token_ids)
        view = AlignmentView(trace.table, np.zeros(1, np.int32), end)
        drafter.admit(request_id, namespace)
        # The first token of an answer comes from its prompt.
        length = trace.num_prompt_tokens + 1
        while length < end:
            # No draft token goes beyond what may still be emitted; one comes without a draft.
            room = min(num_draft_tokens, end - length - 1)
            draft, own = drafter.draft(request_id, trace.token_ids[:length], view, room)
            survival = np.zeros((1, num_draft_tokens), np.float32)
            survival[0, : len(own)] = own
            chosen = int(lengths(survival, step_times)[0])
            right = draft[:chosen] == trace.token_ids[length : length + chosen]
            num_accepted = chosen if right.all() else int(np.argmin(right))
            drafter.verified(request_id, chosen, num_accepted)
            predicted.append(survival[0, :chosen])
            accepted.append(np.arange(chosen) < num_accepted)
            length += num_accepted + 1
            steps, emitted, seconds = steps + 1, emitted + num_accepted + 1, seconds + step_times[1 + chosen]
        drafter.forget([request_id])
    return Replay(steps, emitted, seconds, np.concatenate(predicted), np.concatenate(accepted))


def by_category(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """The traces of each category."""
    categories: dict[str, list[Trace]] = {}
    for trace in traces:
        categories.setdefault(trace.category, []).append(trace)
    return categories


def generated_only(trace: Trace) -> Trace:
    """The trace without predictions at prompt positions but the last, as where they cost an lm_head."""
    table = trace.table.copy()
    table[: trace.num_prompt_tokens - 1] = -1
    return trace._replace(table=table)


def unchanged(trace: Trace) -> Trace:
    """The trace with all predictions."""
    return trace


def without_predictions(trace: Trace) -> Trace:
    """The trace as retrieval alone sees it."""
    return trace._replace(table=np.full_like(trace.table, -1))


def recorded(tasks: Sequence[Task], arguments: argparse.Namespace) -> list[Trace]:
    """The model's greedy answers, with its predictions; recorded now unless they were before.

    Args:
        tasks: to be answered.
        arguments: ``model``, ``dtype``, ``max_tokens``, ``max_prompt_tokens``.
    """
    prompts = tokenize(load_tokenizer(arguments.model), tasks, arguments.max_prompt_tokens)
    # Answers are plain vLLM's: nothing of ours changes them.
    versions = {name: version for name, version in results.versions().items() if name in ("vllm", "torch")}
    settings = [prompts, model_key(arguments.model), arguments.max_tokens, arguments.dtype, versions]
    path = FOLDER / f"traces-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.pickle"
    if not path.exists():
        print(f"recording {len(tasks)} answers", file=sys.stderr, flush=True)
        engine = {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "max_model_len": arguments.max_prompt_tokens + arguments.max_tokens,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
        }
        sampling = {"temperature": 0.0, "max_tokens": arguments.max_tokens}
        sampling |= {"logprobs": TOP_K, "prompt_logprobs": TOP_K}
        with Engine("none", engine, threads=1) as plain:
            answers, _ = plain.run([{"prompt_token_ids": prompt, "sampling": sampling} for prompt in prompts])
        of = zip(tasks, prompts, answers, strict=True)
        FOLDER.mkdir(exist_ok=True)
        traces = [tuple(trace(task.category, prompt, answer)) for task, prompt, answer in of]
        path.with_suffix(".partial").write_bytes(pickle.dumps(traces))
        path.with_suffix(".partial").replace(path)
    return [Trace(*parts) for parts in pickle.loads(path.read_bytes())]


def trace(category: str, prompt: list[int], answer: dict[str, Any]) -> Trace:
    """A trace of an answer of `Engine.run`."""
    token_ids = np.array(prompt + answer["token_ids"], np.int32)
    table = np.full((len(token_ids), 1 + 2 * TOP_K), -1, np.int32)
    # What is predicted at a position is the token after it.
    predictions = [*answer["prompt_logprobs"][1:], *answer["logprobs"]]
    for position, predicted in enumerate(predictions):
        likeliest = sorted((predicted or {}).items(), key=lambda item: -item[1])[:TOP_K]
        if likeliest:
            table[position, 0] = token_ids[position]
            table[position, 1 : 1 + len(likeliest)] = [int(token) for token, _ in likeliest]
            probs = np.exp(np.array([logprob for _, logprob in likeliest], np.float32))
            table[position, 1 + TOP_K : 1 + TOP_K + len(likeliest)] = probs.view(np.int32)
    return Trace(category, token_ids, len(prompt), table)


def reliability(predicted: np.ndarray, accepted: np.ndarray, num_bins: int = 10) -> dict[str, Any]:
    """How far predicted survival is observed acceptance.

    Args:
        predicted: probabilities.
        accepted: what happened.
        num_bins: of equal width in the predicted probability.

    Returns:
        ``bins``, each ``[count, mean predicted, mean accepted]``, empty ones left out; and ``ece``, the expected
        calibration error (Naeini, Cooper, Hauskrecht, AAAI 2015): the mean gap of a bin, weighted by its count.
    """
    indices = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    bins = []
    for i in np.unique(indices):
        within = indices == i
        bins.append([int(within.sum()), float(predicted[within].mean()), float(accepted[within].mean())])
    gaps = sum(count * abs(one - other) for count, one, other in bins)
    return {"bins": bins, "ece": gaps / max(len(predicted), 1)}
