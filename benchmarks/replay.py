"""Recorded answers, and the drafter run over them: what it predicts, and what would have been accepted.

Under strict verification a greedy answer is the same whatever is drafted, so one recording serves every setting
of the drafter: at each step the draft is compared with how the answer went on. What is replayed is the served
code (`Drafter`, `draft_lengths`); only the price of a token is a number here instead of a measured curve.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engine import Engine
from vllm_aasd.drafting.drafter import AlignmentView, Drafter
from vllm_aasd.drafting.lengths import draft_lengths

TOP_K = 4


class Trace(NamedTuple):
    """One recorded answer.

    Attributes:
        category: what it counts under.
        token_ids: ``[T]`` int32, prompt and answer.
        num_prompt_tokens: of those.
        table: ``[T, 1 + 2k]`` int32, the alignment store as it fills up: entries at the prompt's last position
            and behind it, where predictions are free.
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
        drafted: tokens.
        seconds: in units of a step without drafts.
        predicted: ``[drafted]``, the survival that was predicted of each draft token.
        accepted: ``[drafted]``, whether it was accepted.
    """

    steps: int
    emitted: int
    drafted: int
    seconds: float
    predicted: np.ndarray
    accepted: np.ndarray

    @property
    def speed(self) -> float:
        """Tokens a second, in units of plain decoding."""
        return self.emitted / self.seconds


def record(engine: Engine, categories: Sequence[str], prompts: Sequence[list[int]], max_tokens: int) -> list[Trace]:
    """Let a plain engine answer prompts greedily, and keep its predictions.

    Args:
        engine: without speculation.
        categories: of each prompt.
        prompts: token ids.
        max_tokens: per answer.
    """
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": TOP_K}
    answers, _ = engine.run([{"prompt_token_ids": prompt, "sampling": sampling} for prompt in prompts])
    return [
        _trace(category, prompt, answer)
        for category, prompt, answer in zip(categories, prompts, answers, strict=True)
    ]


def _trace(category: str, prompt: list[int], answer: dict[str, Any]) -> Trace:
    token_ids = np.array(prompt + answer["token_ids"], np.int32)
    table = np.full((len(token_ids), 1 + 2 * TOP_K), -1, np.int32)
    for position, predicted in enumerate(answer["logprobs"], len(prompt) - 1):
        likeliest = sorted(predicted.items(), key=lambda item: -item[1])[:TOP_K]
        table[position, 0] = token_ids[position]
        table[position, 1 : 1 + len(likeliest)] = [int(token) for token, _ in likeliest]
        probs = np.exp(np.array([logprob for _, logprob in likeliest], np.float32))
        table[position, 1 + TOP_K : 1 + TOP_K + len(likeliest)] = probs.view(np.int32)
    return Trace(category, token_ids, len(prompt), table)


def replay(traces: Iterable[Trace], drafter: Drafter, num_draft_tokens: int, price: float) -> Replay:
    """Run a drafter over traces, each a request alone in its batch.

    Args:
        traces: to run over, in this order (a memory learns from one for the next).
        drafter: as served.
        num_draft_tokens: the longest draft.
        price: what a draft token adds to a step's time, as a share of a step without drafts.
    """
    # One request: entry 1 is a step without drafts, and each token more costs the price.
    step_times = 1 + price * np.maximum(np.arange(num_draft_tokens + 2) - 1, 0)
    steps = emitted = drafted = 0
    seconds = 0.0
    predicted, accepted = [], []
    for number, trace in enumerate(traces):
        request_id = str(number)
        view = AlignmentView(trace.table, np.zeros(1, np.int32), len(trace.token_ids))
        # The first token of an answer comes from its prompt.
        length = trace.num_prompt_tokens + 1
        while length < len(trace.token_ids):
            # As served: no draft token past what may still be emitted, and one comes without a draft.
            room = min(num_draft_tokens, len(trace.token_ids) - length - 1)
            draft, survival = drafter.draft(request_id, trace.token_ids[:length], view, room)
            padded = np.zeros((1, num_draft_tokens), np.float32)
            padded[0, : len(survival)] = survival
            chosen = int(draft_lengths(padded, step_times)[0])
            right = draft[:chosen] == trace.token_ids[length : length + chosen]
            num_accepted = chosen if right.all() else int(np.argmin(right))
            predicted.append(survival[:chosen])
            accepted.append(np.arange(chosen) < num_accepted)
            drafter.verified(request_id, chosen, num_accepted)
            steps += 1
            drafted += chosen
            emitted += num_accepted + 1
            seconds += step_times[1 + chosen]
            length += num_accepted + 1
        drafter.forget([request_id])
    return Replay(steps, emitted, drafted, seconds, np.concatenate(predicted), np.concatenate(accepted))


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
