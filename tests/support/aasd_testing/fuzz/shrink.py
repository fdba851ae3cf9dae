"""Makes a failing case small: leaves out steps as long as it fails still, then simplifies those that are left.

Leaving out is delta debugging (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input", 2002), with
complements only: a chunk that fails alone is what remains when all other chunks are left out.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from aasd_testing.fuzz.cases import Case, Step

_PLAIN = {"wait": 0, "priority": 0, "via": "completions"}
_NEEDED = ("temperature", "max_tokens")


def shrink(case: Case, fails: Callable[[Case], bool], max_trials: int = 200) -> tuple[Case, int]:
    """The smallest case found that fails.

    Args:
        case: one that fails; left alone.
        fails: whether a case does; asked once of each.
        max_trials: how often that may be asked.

    Returns:
        The case, and how often `fails` was asked.
    """
    num_trials = 0

    def still_fails(steps: Sequence[Step]) -> bool:
        nonlocal num_trials
        if num_trials >= max_trials:
            return False
        num_trials += 1
        return fails({**case, "steps": list(steps)})

    steps = _without_steps(case["steps"], still_fails)
    steps = _simplified(steps, still_fails)
    return {**case, "steps": steps}, num_trials


def _without_steps(steps: list[Step], still_fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    size = len(steps)
    while size > 1:
        size = (size + 1) // 2
        at = 0
        while at < len(steps) and len(steps) > 1:
            fewer = steps[:at] + steps[at + size :]
            if fewer and still_fails(fewer):
                steps = fewer
            else:
                at += size
        size = min(size, len(steps))
    return steps


def _simplified(steps: list[Step], still_fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    at = 0
    while at < len(steps):
        for simpler in _simpler(steps[at]):
            trial = [*steps[:at], simpler, *steps[at + 1 :]]
            if still_fails(trial):
                steps = trial
                break
        else:
            at += 1
    return steps


def _simpler(step: Step) -> Iterator[Step]:
    """Variants of a step with one thing less each; none of the simplest. A compared one keeps its question, for which
    there is a reference."""
    for name, plain in _PLAIN.items():
        if name in step and step[name] != plain and not (name == "via" and step["via"] in ("chat", "beam")):
            if name == "via" and "leave_after" in step:
                continue
            yield {**step, name: plain}
    for name in ("echo", "leave_after"):
        if step.get(name) is not None and step.get(name) is not False:
            yield {key: value for key, value in step.items() if key != name}
    if step["do"] != "ask":
        return
    for name in sorted(set(step["sampling"]) - set(_NEEDED)):
        if not step["compared"] or name in ("logprobs", "prompt_logprobs"):
            yield _with(step, ("sampling",), name, None)
    if not step["compared"] and step["prompt"]["tokens"] > 8:
        yield _with(step, ("prompt",), "tokens", step["prompt"]["tokens"] // 2)


def _with(step: Step, path: tuple[str, ...], name: str, value: Any) -> Step:
    changed = copy.deepcopy(step)
    inner = changed
    for part in path:
        inner = inner[part]
    if value is None:
        del inner[name]
    else:
        inner[name] = value
    return changed
