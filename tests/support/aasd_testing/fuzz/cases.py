"""Cases: what is sent to an engine, in order, as plain JSON; the same one from the same seed.

A case is ``{"seed", "round", "profile", "steps"}``. A step is a request, ``{"do": "ask", ...}``, or an event. Requests
overlap: the next step comes ``wait`` milliseconds later (over HTTP) or as many engine steps (in a process).
"""

import copy
import random
from typing import Any

from aasd_testing.fuzz import kinds
from aasd_testing.fuzz.limits import PROFILES, Limits
from aasd_testing.fuzz.seams import OFF_PLACES, SEAMS

Case = dict[str, Any]
Step = dict[str, Any]

ADAPTERS = ("adapter-1", "adapter-2")

_COMPARED_SHARE = 0.5
_EVENT_SHARE = 0.15
_WAITS = (0, 0, 0, 1, 2, 40)


def questions(seed: int, profile: str, count: int) -> list[Step]:
    """Greedy questions whose answers the target alone decides, all of `kinds.QUESTIONS` in turn.

    Args:
        seed: decides which.
        profile: of the engine.
        count: how many; each costs one answer of a plain engine.
    """
    rng = random.Random(f"questions {seed}")
    limits = PROFILES[profile]
    pool = []
    for number in range(count):
        kind = list(kinds.QUESTIONS)[number % len(kinds.QUESTIONS)]
        question = {"kind": kind, **kinds.QUESTIONS[kind](rng, limits)}
        if "lora" in limits.features and number % 3 == 0:
            question["adapter"] = ADAPTERS[0]
        pool.append(question)
    return pool


def generate(seed: int, number: int, profile: str, size: int, pool: list[Step]) -> Case:
    """A case of `size` steps.

    Args:
        seed: of the run.
        number: of the round.
        profile: of the engine.
        size: steps.
        pool: of `questions`.
    """
    rng = random.Random(f"case {seed} {number}")
    limits = PROFILES[profile]
    steps: list[Step] = []
    for index in range(size):
        drawn = rng.random()
        if drawn < _EVENT_SHARE and index:
            step = _event(rng, limits)
        elif drawn < _EVENT_SHARE + _COMPARED_SHARE:
            step = _compared(rng, limits, pool)
        else:
            step = _free(rng, limits)
        if step["do"] == "ask":
            step["priority"] = rng.choice((0, 0, 0, -1, 5))
        steps.append({**step, "wait": rng.choice(_WAITS)})
        if rng.random() < 0.02:
            steps += _storm(rng, limits, pool)
    if "lora" in limits.features:
        steps.insert(0, {"do": "load_adapter", "name": ADAPTERS[0], "wait": 0})
    return {"seed": seed, "round": number, "profile": profile, "steps": steps}


def compared(case: Case) -> list[Step]:
    """The requests of a case whose answers must be the target's own."""
    return [step for step in case["steps"] if step["do"] == "ask" and step["compared"]]


def _compared(rng: random.Random, limits: Limits, pool: list[Step]) -> Step:
    step = {"do": "ask", "compared": True, **copy.deepcopy(rng.choice(pool))}
    step["xargs"] = rng.choice((kinds.STRICT, kinds.STRICT, kinds.STRICT, kinds.OFF))
    if rng.random() < 0.2:
        step["sampling"]["logprobs"] = rng.randint(0, 3)
    if "http" in limits.features:
        step["via"] = rng.choice(("completions", "stream"))
    if rng.random() < 0.15:
        step["leave_after"] = rng.choice((0, 1, 3, 9))
        if "via" in step:
            step["via"] = "stream"
    # vLLM has neither in a stream of its own accord.
    elif "prompt_logprobs" in limits.features and step.get("via") != "stream" and rng.random() < 0.2:
        if "via" in step and rng.random() < 0.5:
            step["echo"] = True
        else:
            step["sampling"]["prompt_logprobs"] = rng.randint(0, 2)
    return step


def _free(rng: random.Random, limits: Limits) -> Step:
    allowed = {name: kind for name, kind in kinds.FREE.items() if kind.needs <= limits.features}
    name = rng.choices(list(allowed), [kind.weight for kind in allowed.values()])[0]
    step = {"do": "ask", "kind": name, "compared": False, "xargs": {}, **allowed[name].make(rng, limits)}
    if "http" in limits.features and "via" not in step:
        step["via"] = rng.choice(("completions", "stream"))
    if "lora" in limits.features and step.get("via") in ("completions", "stream") and "refused" not in step:
        step["adapter"] = rng.choice((*ADAPTERS, None))
    if rng.random() < 0.1 and "refused" not in step and step.get("via") in ("stream", None):
        step["leave_after"] = rng.choice((0, 1, 3, 9))
    return step


def _storm(rng: random.Random, limits: Limits, pool: list[Step]) -> list[Step]:
    """Many requests at once, all left at once."""
    fields = {"do": "ask", "compared": True, "xargs": kinds.STRICT, "priority": 0, "wait": 0}
    fields |= {"via": "stream"} if "http" in limits.features else {}
    return [
        {**copy.deepcopy(rng.choice(pool)), **fields, "leave_after": rng.choice((0, 0, 1))}
        for _ in range(rng.randint(6, 12))
    ]


def _event(rng: random.Random, limits: Limits) -> Step:
    seams = SEAMS[limits.runner]
    where = rng.choice(list(seams))
    makers = {
        "faults": [
            {"do": "fault", "where": where, "place": seams[where], "times": rng.choice((1, 1, 2, 12))},
            {"do": "off", "place": rng.choice(OFF_PLACES)},
            {"do": "on"},
            {"do": "on"},
        ],
        "clear_memory": [{"do": "clear_memory"}],
        "reset_prefix_cache": [{"do": "reset_prefix_cache", "running": rng.random() < 0.5}],
        "reload_weights": [{"do": "reload_weights"}],
        "sleep": [
            {
                "do": "sleep",
                "level": rng.choice((0, 1)),
                "mode": rng.choice(("keep", "wait", "abort")),
                "for": rng.choice((0, 200)),
            }
        ],
        "lora": [
            {"do": "load_adapter", "name": rng.choice(ADAPTERS)},
            {"do": "unload_adapter", "name": rng.choice(ADAPTERS)},
            {"do": "load_adapter", "name": ADAPTERS[0]},
        ],
    }
    return rng.choice([event for feature in sorted(limits.features & set(makers)) for event in makers[feature]])
