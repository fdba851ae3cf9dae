"""One greedy request, what the target says to it, and what the fuzzer's oracle finds in an answer."""

import copy

from aasd_testing.fuzz import kinds
from aasd_testing.fuzz.observed import Choice, Observation
from aasd_testing.fuzz.oracle import NEAR_TIE, Reference, judge

STEP = {
    "do": "ask", "kind": "plain", "compared": True, "prompt": {"shape": "text", "seed": 0, "tokens": 5},
    "sampling": {"temperature": 0.0, "max_tokens": 4}, "xargs": kinds.STRICT, "priority": 0, "via": "stream", "wait": 0,
}  # fmt: skip
LIKELY = [{7: -0.1, 8: -0.1 - NEAR_TIE / 2, 9: -3.0}] * 4
REFERENCE = Reference([7, 7, 7, 7], "aaaa", "length", LIKELY)


def answered(token_ids=(7, 7, 7, 7), text="aaaa", finish="length", **more):
    choice = Choice(list(token_ids), text, finish, **{k: v for k, v in more.items() if k in Choice.__annotations__})
    rest = {k: v for k, v in more.items() if k not in Choice.__annotations__}
    return Observation(
        **{"status": 200, "choices": [choice], "num_prompt_tokens": 5, "num_answer_tokens": len(token_ids), **rest}
    )


def found(seen, step=None, reference=REFERENCE, **sampling):
    step = copy.deepcopy(step or STEP)
    step["sampling"].update(sampling)
    return [finding.what for finding in judge(0, step, seen, reference, 5, 256, lambda word: [3, 4])]
