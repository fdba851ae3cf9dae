"""Recorded answers, and the drafter run over them: what it predicts, and what would have been accepted.

Under strict verification a greedy answer is the same whatever is drafted, so one recording serves every setting
of the drafter: at each step the draft is compared with how the answer went on. What is replayed is the served
code (`Drafter`, `draft_lengths`); only the price of a token is a number here instead of a measured curve.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.engine import Engine
from vllm_aasd.drafting.drafter import AlignmentView
from vllm_aasd.drafting.lengths import draft_lengths

TOP_K = 4


class Drafts(Protocol):
    """What is replayed: see `Drafter`."""

    def draft(
        self, request_id: str, token_ids: np.ndarray, alignment: AlignmentView, max_draft_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def verified(self, request_id: str, num_draft_tokens: int, num_accepted: int) -> None: ...

    def forget(self, request_ids: Iterable[str]) -> None: ...


class Trace(NamedTuple):
    """One recorded answer.

    Attributes:
        category: what it counts under.
        token_ids: ``[T]`` int32, prompt and answer.
        num_prompt_tokens: of those.
        table: ``[T, 1 + 2k]`` int32, the alignment store as it fills up: entries at the prompt's last position
            and behind it, where predictions are free, and before it.
    """

    category: str
    token_ids: np.ndarray
    num_prompt_tokens: int
    table: np.ndarray


class Step(NamedTuple):
    """One step of a batch: tokens emitted and drafted, of all its requests."""

    emitted: int
    drafted: int


class Replay(NamedTuple):
    """What the drafter did on some traces.

    Attributes:
        steps: of the target, each request's counted.
        emitted: tokens.
        drafted: tokens.
        seconds: in units of a step without drafts.
        predicted: ``[drafted]``, the survival that was predicted of each draft token.
        accepted: ``[drafted]``, whether it was accepted.
        batches: the steps of the target, each once.
    """

    steps: int
    emitted: int
    drafted: int
    seconds: float
    predicted: np.ndarray
    accepted: np.ndarray
    batches: list[Step]

    @property
    def speed(self) -> float:
        """Tokens a second, in units of plain decoding."""
        return self.emitted / self.seconds


def record(
    engine: Engine,
    categories: Sequence[str],
    prompts: Sequence[list[int]],
    max_tokens: int,
) -> list[Trace]:
    """Let a plain engine answer prompts greedily, and keep its predictions, those at the prompts' positions too.

    Args:
        engine: without speculation.
        categories: of each prompt.
        prompts: token ids.
        max_tokens: per answer.
    """
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": TOP_K, "prompt_logprobs": TOP_K}
    answers, _ = engine.run([{"prompt_token_ids": prompt, "sampling": sampling} for prompt in prompts])
    return [
        _trace(category, prompt, answer) for category, prompt, answer in zip(categories, prompts, answers, strict=True)
    ]


def generated_only(trace: Trace) -> Trace:
    """The trace without predictions at prompt positions but the last, as where they cost an lm_head."""
    table = trace.table.copy()
    table[: trace.num_prompt_tokens - 1] = -1
    return trace._replace(table=table)


def without_predictions(trace: Trace) -> Trace:
    """The trace as retrieval alone sees it."""
    return trace._replace(table=np.full_like(trace.table, -1))


def _trace(category: str, prompt: list[int], answer: dict[str, Any]) -> Trace:
    token_ids = np.array(prompt + answer["token_ids"], np.int32)
    table = np.full((len(token_ids), 1 + 2 * TOP_K), -1, np.int32)
    # What is predicted at a position is the token behind it.
    predictions = [*answer["prompt_logprobs"][1:], *answer["logprobs"]]
    for position, predicted in enumerate(predictions):
        if predicted is None:
            continue
        likeliest = sorted(predicted.items(), key=lambda item: -item[1])[:TOP_K]
        table[position, 0] = token_ids[position]
        table[position, 1 : 1 + len(likeliest)] = [int(token) for token, _ in likeliest]
        probs = np.exp(np.array([logprob for _, logprob in likeliest], np.float32))
        table[position, 1 + TOP_K : 1 + TOP_K + len(likeliest)] = probs.view(np.int32)
    return Trace(category, token_ids, len(prompt), table)


def replay(traces: Iterable[Trace], drafter: Drafts, num_draft_tokens: int, price: float) -> Replay:
    """Run a drafter over traces, each a request alone in its batch.

    Args:
        traces: to run over, in this order (a memory learns from one for the next).
        drafter: as served.
        num_draft_tokens: the longest draft.
        price: what a draft token adds to a step's time, as a share of a step without drafts.
    """
    return closed_loop(traces, drafter, num_draft_tokens, priced(num_draft_tokens, price))


def priced(num_draft_tokens: int, price: float) -> np.ndarray:
    """The step times of one request: entry 1 is a step without drafts, and each token more costs the price."""
    return 1 + price * np.maximum(np.arange(num_draft_tokens + 2) - 1, 0)


def whole_drafts(survival: np.ndarray, step_times: np.ndarray) -> np.ndarray:
    """Draft lengths of a drafter whose drafts are verified as they are; see `draft_lengths`."""
    return np.count_nonzero(survival, axis=1)


def closed_loop(
    traces: Iterable[Trace],
    drafter: Drafts,
    num_draft_tokens: int,
    step_times: np.ndarray,
    concurrency: int = 1,
    lengths: Callable[[np.ndarray, np.ndarray], np.ndarray] = draft_lengths,
    steady: np.random.Generator | None = None,
) -> Replay:
    """Run a drafter over traces, so many in a batch, the next one when one ends.

    Args:
        traces: to run over, in this order.
        drafter: one for all of them.
        num_draft_tokens: the longest draft.
        step_times: ``[>= concurrency * (num_draft_tokens + 1) + 1]``, by the tokens in a batch, in any unit.
        concurrency: requests in the batch.
        lengths: how much of each draft is verified; `draft_lengths` or `whole_drafts`.
        steady: to measure full batches only: the first requests begin at random places of their answers, as
            if they had been running, and it ends with the last full batch.
    """
    waiting = iter(enumerate(traces))
    running: list[_Request] = []
    steps = 0
    seconds = 0.0
    batches: list[Step] = []
    predicted, accepted = [np.empty(0, np.float32)], [np.empty(0, bool)]
    is_first_batch = True
    while True:
        while len(running) < concurrency and (entry := next(waiting, None)) is not None:
            request = _Request(str(entry[0]), entry[1])
            if steady is not None and is_first_batch:
                request.length += int(steady.random() * request.left)
            if request.left > 0:
                running.append(request)
        is_first_batch = False
        if not running or (steady is not None and len(running) < concurrency):
            break
        survival = np.zeros((len(running), num_draft_tokens), np.float32)
        drafts = []
        for row, request in enumerate(running):
            draft, own = drafter.draft(*request.context(num_draft_tokens))
            # A view that the next request's draft overwrites.
            drafts.append(draft.copy())
            survival[row, : len(own)] = own
        chosen = lengths(survival, step_times)
        emitted = 0
        for row, request in enumerate(running):
            num_accepted = request.verify(drafts[row][: chosen[row]])
            predicted.append(survival[row, : chosen[row]])
            accepted.append(np.arange(chosen[row]) < num_accepted)
            drafter.verified(request.request_id, int(chosen[row]), num_accepted)
            emitted += num_accepted + 1
        steps += len(running)
        batches.append(Step(emitted, int(chosen.sum())))
        seconds += step_times[len(running) + batches[-1].drafted]
        drafter.forget([request.request_id for request in running if not request.left])
        running = [request for request in running if request.left]
    emitted, drafted = (sum(column) for column in zip(*batches, strict=True)) if batches else (0, 0)
    return Replay(steps, emitted, drafted, seconds, np.concatenate(predicted), np.concatenate(accepted), batches)


class _Request:
    """A trace that is being replayed, up to ``length`` tokens so far; the first of an answer comes from its prompt."""

    def __init__(self, request_id: str, trace: Trace) -> None:
        self.request_id = request_id
        self._trace = trace
        self.length = trace.num_prompt_tokens + 1

    @property
    def left(self) -> int:
        """Tokens still to be emitted."""
        return max(len(self._trace.token_ids) - self.length, 0)

    def context(self, num_draft_tokens: int) -> tuple[str, np.ndarray, AlignmentView, int]:
        """What `Drafter.draft` takes. No draft token is past what may still be emitted; one comes without a draft."""
        trace = self._trace
        view = AlignmentView(trace.table, np.zeros(1, np.int32), len(trace.token_ids))
        room = min(num_draft_tokens, self.left - 1)
        return self.request_id, trace.token_ids[: self.length], view, room

    def verify(self, draft: np.ndarray) -> int:
        """Go on behind the accepted tokens and the target's own; returns how many were accepted."""
        right = draft == self._trace.token_ids[self.length : self.length + len(draft)]
        num_accepted = len(draft) if right.all() else int(np.argmin(right))
        self.length += num_accepted + 1
        return num_accepted


def by_category(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """The traces of each category."""
    categories: dict[str, list[Trace]] = {}
    for trace in traces:
        categories.setdefault(trace.category, []).append(trace)
    return categories


def reliability(predicted: np.ndarray, accepted: np.ndarray, num_bins: int = 10) -> dict[str, Any]:
    """How far predicted survival is observed acceptance.

    Args:
        predicted: probabilities.
        accepted: what happened.
        num_bins: of equal width in the predicted probability.

    Returns:
        ``bins``, each with ``count``, mean ``predicted`` and observed ``accepted``, empty ones left out; and
        ``ece``, the expected calibration error (Naeini, Cooper, Hauskrecht, *Obtaining Well Calibrated
        Probabilities Using Bayesian Binning*, AAAI 2015): the mean gap of a bin, weighted by its count.
    """
    indices = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    bins = [
        {
            "count": int((indices == i).sum()),
            "predicted": float(predicted[indices == i].mean()),
            "accepted": float(accepted[indices == i].mean()),
        }
        for i in range(num_bins)
        if (indices == i).any()
    ]
    gaps = sum(entry["count"] * abs(entry["predicted"] - entry["accepted"]) for entry in bins)
    return {"bins": bins, "ece": gaps / max(len(predicted), 1)}
