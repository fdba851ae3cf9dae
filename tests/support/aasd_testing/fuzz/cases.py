"""Cases: what is sent to an engine, in order, as plain JSON; the same one from the same seed.

A case is ``{"seed", "round", "profile", "steps"}``. A step is a request, ``{"do": "ask", ...}``, or an event. Requests
overlap: the next step comes ``wait`` milliseconds later.
"""

import copy
import json
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
# What doesn't change which tokens come.
_BESIDE = ("logprobs", "prompt_logprobs", "logprob_token_ids")


def questions(seed: int, profile: str, count: int) -> list[Step]:
    """`count` greedy requests, all of `kinds.QUESTIONS` in turn; each costs one answer of an engine without drafts."""
    rng = random.Random(f"questions {seed}")
    limits = PROFILES[profile]
    possible = [one for one in kinds.possible(kinds.QUESTIONS, limits).items() for _ in range(int(one[1].weight))]
    pool = []
    for number in range(count):
        name, kind = possible[number % len(possible)]
        question = {"kind": name, **kind.make(rng, limits)}
        if "lora" in limits.features and number % 3 == 0:
            question["adapter"] = ADAPTERS[0]
        pool.append(question)
    return pool


def key(step: Step) -> str:
    """All that decides a question's answer."""
    sampling = {name: value for name, value in step["sampling"].items() if name not in _BESIDE}
    return json.dumps([step["prompt"], sampling, step.get("adapter")], sort_keys=True)


def generate(seed: int, number: int, profile: str, size: int, pool: list[Step]) -> Case:
    """Round `number` of a run with `seed`: a case of `size` steps, with questions of `pool`."""
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
            if rng.random() < 0.3:
                step["salt"] = rng.choice(("tenant-1", "tenant-2"))
        steps.append({**step, "wait": rng.choice(_WAITS)})
        if rng.random() < 0.02:
            steps += _storm(rng, pool)
    if "lora" in limits.features:
        steps.insert(0, {"do": "load_adapter", "name": ADAPTERS[0], "wait": 0})
    return {"seed": seed, "round": number, "profile": profile, "steps": steps}


def _compared(rng: random.Random, limits: Limits, pool: list[Step]) -> Step:
    step = {"do": "ask", "compared": True, **copy.deepcopy(rng.choice(pool))}
    step["xargs"] = rng.choice((kinds.STRICT, kinds.STRICT, kinds.STRICT, kinds.OFF))
    if rng.random() < 0.2:
        step["sampling"].setdefault("logprobs", rng.randint(0, 3))
    step["via"] = rng.choice(("completions", "stream"))
    if rng.random() < 0.15:
        step |= {"leave_after": rng.choice((0, 1, 3, 9)), "via": "stream"}
    # vLLM has neither in a stream of its own accord, nor of embeddings.
    elif "prompt_logprobs" in limits.features and step["via"] != "stream" and step["kind"] not in ("embeds", "scored"):
        drawn = rng.random()
        if drawn < 0.1:
            step["echo"] = True
        elif drawn < 0.2:
            step["sampling"]["prompt_logprobs"] = rng.randint(0, 2)
    return step


def _free(rng: random.Random, limits: Limits) -> Step:
    allowed = kinds.possible(kinds.FREE, limits)
    name = rng.choices(list(allowed), [kind.weight for kind in allowed.values()])[0]
    step = {"do": "ask", "kind": name, "compared": False, "xargs": {}, "via": rng.choice(("completions", "stream"))}
    step |= allowed[name].make(rng, limits)
    if "lora" in limits.features and step["via"] in ("completions", "stream") and "refused" not in step:
        step["adapter"] = rng.choice((*ADAPTERS, None))
    if rng.random() < 0.1 and "refused" not in step and step["via"].endswith("stream"):
        step["leave_after"] = rng.choice((0, 1, 3, 9))
    return step


def _storm(rng: random.Random, pool: list[Step]) -> list[Step]:
    """Many requests at once, all left at once."""
    fields = {"do": "ask", "compared": True, "xargs": kinds.STRICT, "priority": 0, "wait": 0, "via": "stream"}
    return [
        {**copy.deepcopy(rng.choice(pool)), **fields, "leave_after": rng.choice((0, 0, 1))}
        for _ in range(rng.randint(6, 12))
    ]


def _event(rng: random.Random, limits: Limits) -> Step:
    seams = SEAMS[limits.runner]
    where = rng.choice(list(seams))
    sleep = {"do": "sleep", "level": rng.choice((0, 1)), "mode": rng.choice(("keep", "wait", "abort"))}
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
        "sleep": [{**sleep, "for": rng.choice((0, 200))}],
        "lora": [
            {"do": "load_adapter", "name": rng.choice(ADAPTERS)},
            {"do": "unload_adapter", "name": rng.choice(ADAPTERS)},
            {"do": "load_adapter", "name": ADAPTERS[0]},
        ],
    }
    return rng.choice([event for feature in sorted(limits.features & set(makers)) for event in makers[feature]])
