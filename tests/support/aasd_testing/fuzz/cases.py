"""Cases: requests and events in the order in which they are sent; the same ones for the same seed."""

import dataclasses
import random
from typing import Any

from aasd_testing.fault_injection import FAULT_POINTS, GRAMMAR_FAULT_POINTS
from aasd_testing.fuzz.profiles import ADAPTERS, CORPORA, Profile
from aasd_testing.fuzz.prompts import Prompts
from aasd_testing.fuzz.request_types import OFF, OTHER, REFERENCED, STRICT, Maker, Request, possible
from vllm_aasd.engine.failsafe import COMPONENTS

_EVENT_SHARE, _REFERENCED_SHARE, _BURST_SHARE = 0.15, 0.5, 0.02
_WAITS = (0, 0, 0, 1, 2, 40)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that isn't a request; see `server_target.ServerTarget` for what each does."""

    name: str
    arguments: dict[str, Any]
    wait: int = 0


Case = list[Request | Event]


def referenced_requests(seed: int, profile: Profile, prompts: Prompts, count: int) -> list[Request]:
    """`count` greedy requests, of all types in turn; each is answered by an engine without speculation, too."""
    maker = Maker(random.Random(f"referenced {seed}"), profile, prompts)
    types = [item for item in possible(REFERENCED, profile).items() for _ in range(int(item[1].weight))]
    found = []
    for number in range(count):
        name, kind = types[number % len(types)]
        adapter = ADAPTERS[number % 3 // 2] if "lora" in profile.features else None
        found.append(dataclasses.replace(kind.make(maker), type=name, reference=number, adapter=adapter))
    return found


def generate(seed: int, number: int, profile: Profile, prompts: Prompts, size: int, pool: list[Request]) -> Case:
    """Round `number` of a run: about `size` requests and events; requests with a reference come from `pool`.

    Requests overlap: the next step follows `wait` milliseconds after a request was sent.
    """
    rng = random.Random(f"case {seed} {number}")
    case: Case = []
    for index in range(size):
        drawn = rng.random()
        wait = rng.choice(_WAITS)
        if drawn < _EVENT_SHARE and index:
            case.append(dataclasses.replace(_event(rng, profile), wait=wait))
        else:
            draw = _referenced if drawn < _EVENT_SHARE + _REFERENCED_SHARE else _other
            body = {"priority": rng.choice((0, 0, 0, -1, 5))}
            if rng.random() < 0.3:
                body["cache_salt"] = rng.choice(("tenant-1", "tenant-2"))
            request = draw(rng, profile, prompts, pool)
            case.append(dataclasses.replace(request, body={**body, **request.body}, wait=wait))
        if rng.random() < _BURST_SHARE:
            # Many requests at once, whose clients all disconnect.
            for request in rng.choices(pool, k=rng.randint(6, 12)):
                after = rng.choice((0, 0, 1))
                case.append(dataclasses.replace(request, xargs=STRICT, stream=True, disconnect_after=after))
    return case


def _referenced(rng: random.Random, profile: Profile, prompts: Prompts, pool: list[Request]) -> Request:
    request = rng.choice(pool)
    sampling = dict(request.sampling)
    if rng.random() < 0.2:
        sampling.setdefault("logprobs", rng.randint(0, 3))
    stream, disconnect_after = rng.random() < 0.5, None
    if rng.random() < 0.15:
        stream, disconnect_after = True, rng.choice((0, 1, 3, 9))
    # vLLM returns no log-probabilities of prompts in a stream, nor of embeddings.
    elif (
        "prompt_logprobs" in profile.features
        and not stream
        and request.type not in ("embeds", "scored")
        and rng.random() < 0.2
    ):
        sampling["prompt_logprobs"] = rng.randint(0, 2)
    xargs = {**request.xargs, **rng.choice((STRICT, STRICT, STRICT, OFF))}
    return dataclasses.replace(
        request, sampling=sampling, xargs=xargs, stream=stream, disconnect_after=disconnect_after
    )


def _other(rng: random.Random, profile: Profile, prompts: Prompts, pool: list[Request]) -> Request:
    types = possible(OTHER, profile)
    name = rng.choices(list(types), [kind.weight for kind in types.values()])[0]
    request = types[name].make(Maker(rng, profile, prompts))
    stream = rng.random() < 0.5 and not request.sampling.get("use_beam_search")
    adapter = rng.choice(ADAPTERS) if "lora" in profile.features else None
    disconnects = stream and request.refused_with is None and rng.random() < 0.1
    disconnect_after = rng.choice((0, 1, 3, 9)) if disconnects else None
    return dataclasses.replace(request, type=name, stream=stream, adapter=adapter, disconnect_after=disconnect_after)


def _event(rng: random.Random, profile: Profile) -> Event:
    function = rng.choice([*FAULT_POINTS[profile.runner], *GRAMMAR_FAULT_POINTS])
    events = [
        Event("inject", {"function": function, "times": rng.choice((1, 1, 2, 12))}),
        Event("turn_off", {"component": rng.choice(COMPONENTS)}),
        Event("recover", {}),
        Event("recover", {}),
        Event("clear_memory", {}),
        Event("add_corpus", {"name": rng.choice(list(CORPORA)), "path": rng.choice(list(CORPORA.values()))}),
        Event("add_and_drop_corpus", {"seconds": rng.choice((0, 0.2))}),
        Event("reset_prefix_cache", {"running": rng.random() < 0.5}),
    ]
    if "sleep" in profile.features:
        events.append(Event("reload_weights", {}))
        sleep = {"level": rng.choice((0, 1)), "mode": rng.choice(("keep", "wait")), "seconds": rng.choice((0, 0.2))}
        events.append(Event("sleep", sleep))
    return rng.choice(events)
