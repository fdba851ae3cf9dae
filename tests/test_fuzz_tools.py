"""The fuzzer's own tools: cases from seeds, the oracle, shrinking. No engine is started; test_fuzz.py does."""

import asyncio
import collections
import copy
import json
import types

import httpx
import pytest
from fuzz import cases, kinds, over_http, references
from fuzz.hooks import held
from fuzz.limits import PROFILES
from fuzz.observed import Choice, Observation
from fuzz.oracle import NEAR_TIE, Finding, Reference, failures, first_difference, judge
from fuzz.prompts_of_tokens import Prompts
from fuzz.seams import OFF_PLACES, SEAMS
from fuzz.server_target import tracebacks
from fuzz.shrink import shrink
from fuzz.tally import Tally, slope

from vllm_aasd.engine.containment import PLACES

POOL = cases.questions(1, "server", 34)


def test_a_case_is_the_same_from_the_same_seed_and_another_from_another():
    one = cases.generate(1, 2, "server", 60, POOL)
    assert one == cases.generate(1, 2, "server", 60, cases.questions(1, "server", 34))
    assert one == json.loads(json.dumps(one))
    others = [cases.generate(2, 2, "server", 60, POOL), cases.generate(1, 3, "server", 60, POOL)]
    assert one not in others and others[0] != others[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_cases_hold_all_that_the_profile_can_and_nothing_else(profile):
    pool = cases.questions(1, profile, 34)
    steps = [step for number in range(40) for step in cases.generate(1, number, profile, 60, pool)["steps"]]
    asked = [step for step in steps if step["do"] == "ask"]
    features = PROFILES[profile].features
    free = {name for name, kind in kinds.FREE.items() if kind.needs <= features}
    assert {step["kind"] for step in asked} == free | set(kinds.QUESTIONS)
    events = {step["do"] for step in steps} - {"ask"}
    assert ("sleep" in events, "load_adapter" in events) == ("sleep" in features, "lora" in features)
    assert {"fault", "off", "on", "clear_memory", "reset_prefix_cache"} <= events
    assert any("leave_after" in step for step in asked)
    assert ({step.get("via") for step in asked} == {None}) == ("http" not in features)
    prompts_scored = [step for step in asked if step.get("echo") or "prompt_logprobs" in step["sampling"]]
    assert bool(prompts_scored) == ("prompt_logprobs" in features)
    known = {references.key(step) for step in pool}
    assert all(references.key(step) in known for step in asked if step["compared"]), "a reference for each"
    limit = PROFILES[profile].max_model_len
    assert all(
        step["prompt"]["tokens"] + step["sampling"]["max_tokens"] <= limit for step in asked if step["compared"]
    )


def test_the_faults_places_are_the_products():
    assert {place for seams in SEAMS.values() for place in seams.values()} | set(OFF_PLACES) <= set(PLACES)


def test_prompts_are_as_long_as_they_say(demo_model):
    prompts = Prompts(demo_model)
    for shape in ("text", "repeat", "period", "noise"):
        for tokens in (1, 7, 255):
            described = {"shape": shape, "seed": 3, "tokens": tokens, "period": 5}
            assert len(prompts.ids(described)) == tokens and prompts.ids(described) == prompts.ids(described)
    chat = prompts.ids({"shape": "chat", "seed": 3, "tokens": 20})
    assert 20 < len(chat) < 100


# The oracle


STEP = {
    "do": "ask", "kind": "plain", "compared": True, "prompt": {"shape": "text", "seed": 0, "tokens": 5},
    "sampling": {"temperature": 0.0, "max_tokens": 4}, "xargs": kinds.STRICT, "priority": 0, "via": "stream", "wait": 0,
}  # fmt: skip
LIKELY = [{7: -0.1, 8: -0.1 - NEAR_TIE / 2, 9: -3.0}] * 4
REFERENCE = Reference([7, 7, 7, 7], "aaaa", "length", LIKELY)


def answered(token_ids=(7, 7, 7, 7), text="aaaa", finish="length", **more):
    choice = Choice(list(token_ids), text, finish, **{k: v for k, v in more.items() if k in Choice.__annotations__})
    rest = {k: v for k, v in more.items() if k not in Choice.__annotations__}
    return Observation(**{"status": 200, "choices": [choice], "num_prompt_tokens": 5, "num_answer_tokens": len(token_ids), **rest})


def found(seen, step=None, reference=REFERENCE, **sampling):
    step = copy.deepcopy(step or STEP)
    step["sampling"].update(sampling)
    return [finding.what for finding in judge(0, step, seen, reference, 5, 256, lambda word: [3, 4])]


def test_the_right_answer_is_right():
    assert found(answered()) == []
    assert found(answered((7, 7), "aa", None, left=True, num_answer_tokens=None)) == []
    assert found(answered((7, 7), "aa", "abort", disturbed={"abort"})) == []
    assert found(Observation(status=200, disturbed={"abort"})) == []


@pytest.mark.parametrize(
    ("what", "seen", "sampling"),
    [
        ("lost", Observation(), {}),
        ("lost", answered(finish=None), {}),
        ("count", Observation(status=200), {}),
        ("status", Observation(status=500, error="boom"), {}),
        ("status", Observation(status=400, error="no"), {}),
        ("status", Observation(status=404, error="no"), {}),
        ("mismatch", answered((7, 9, 7, 7)), {}),
        ("mismatch", answered((7, 300, 7, 7)), {}),
        ("mismatch", answered((7, 7, 7), finish="stop"), {}),
        ("mismatch", answered((7, 9), "aa", None, left=True, num_answer_tokens=None), {}),
        ("mismatch", answered(text="aaab"), {}),
        ("mismatch", answered(finish="stop"), {}),
        ("near_tie", answered((7, 8, 7, 7)), {}),
        ("count", answered((7, 7, 7), finish="length"), {}),
        ("count", answered((7,) * 5), {}),
        ("count", answered(num_answer_tokens=5), {}),
        ("count", answered(num_prompt_tokens=6), {}),
        ("count", answered((7, 7), "aa", "stop"), {"min_tokens": 3}),
        ("finish", answered((7, 7), "aa", "abort"), {}),
        ("finish", answered(finish="error"), {}),
        ("finish", answered((7, 7), "aa", "stop"), {"ignore_eos": True}),
        ("finish", answered((7, 7), "a.a", "stop"), {"stop": ["."]}),
        ("form", answered((7, 3, 4, 7)), {"bad_words": ["no"]}),
        ("form", answered(), {"allowed_token_ids": [8]}),
        ("form", answered(text='{"kind": "text", "n": 100}', finish="stop"), {"structured_outputs": {"json": kinds.SCHEMA}}),
        ("form", answered(text="yes no", finish="stop"), {"structured_outputs": {"regex": kinds.REGEX}}),
        ("form", answered(text="poem", finish="stop"), {"structured_outputs": {"choice": kinds.CHOICES}}),
        ("logprobs", answered(), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(-0.1, 2)] * 3), {"logprobs": 1}),
        ("logprobs", answered(logprobs=[(None, 2)] * 4), {"logprobs": 1}),
        ("logprobs", answered(prompt_logprobs=4), {"prompt_logprobs": 1}),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_found(what, seen, sampling):
    assert what in found(seen, **sampling)
    assert found(answered()) == []


def test_a_refusal_must_come_and_say_why():
    step = {**STEP, "refused": "min_p", "compared": False}
    assert found(Observation(status=400, error="The min_p and logit_bias ..."), step, None) == []
    assert found(Observation(status=400, error="something else"), step, None) == ["status"]
    assert found(answered(), step, None) == ["status"]


def test_sequences_part_where_they_differ():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1], [1, 3]) == 1


def test_the_log_is_searched_for_tracebacks_but_those_of_injected_faults():
    def trace(*errors):
        prefix = "(EngineCore pid=7) ERROR 11-26 01:02:03 [containment.py:80] "
        lines = []
        for error in errors:
            lines += ["Traceback (most recent call last):", '  File "x"', "    y", error, ""]
            lines += ["The above exception was the direct cause of the following exception:", ""]
        return "".join(f"{prefix}{line}\n" for line in lines[:-2])

    assert tracebacks(trace("fuzz.hooks.InjectedFault: injected into draft")) == []
    log = trace("fuzz.hooks.InjectedFault: injected into draft") + trace("ValueError: of our own")
    assert len(tracebacks(log)) == 1 and "of our own" in tracebacks(log)[0]
    assert tracebacks(trace("ValueError: not allowed", "vllm_aasd.engine.request_options.RequestOptionsError: it")) == []
    chained = tracebacks(trace("KeyError: 1", "RuntimeError: 2"))
    assert len(chained) == 1 and "KeyError: 1" in chained[0] and "RuntimeError: 2" in chained[0]
    assert len(tracebacks(trace("KeyError: 1") + trace("RuntimeError: 2"))) == 2


def test_request_ids_that_an_object_of_ours_holds_are_found():
    from vllm_aasd.drafting.drafter import Drafter

    drafter = Drafter(16, 4, 0.0)
    assert held(drafter) == {}
    drafter._requests["cmpl-1-0"] = drafter._requests["0_fuzz-3"] = None
    drafter._other = collections.deque(["chatcmpl-2", "something else"])
    assert held(drafter) == {"Drafter._requests": 2, "Drafter._other": 1}


def test_the_slope_is_of_an_hour():
    assert slope([(minute, 100 + minute / 60 * 5) for minute in range(10, 40)]) == pytest.approx(5)
    assert slope([(minute, 100.0) for minute in range(5)]) is None


def test_a_tally_goes_on_over_a_lost_engine():
    tally, case = Tally(), {"steps": [STEP, {"do": "on"}]}
    look = {"rss_mib": 100.0, "injected": {"draft": 2}, "metrics": {"vllm:num_preemptions_total": 3.0}, "steps": {}}
    tally.add(case, [answered(), None], [], look, 1.0)
    tally.add(case, [None, None], [Finding("dead", None, "boom")], {}, 2.0)
    tally.restarted()
    tally.add(case, [answered((7, 8, 7, 7)), None], [Finding("near_tie", 0, "")], look, 3.0)
    result = tally.result()
    assert (result["requests"], result["compared"], result["rounds"]) == (2, 2, 3)
    assert (result["preemptions"], result["faults_injected"], result["engines_lost"]) == (6, {"draft": 4}, 1)
    assert (result["failures"], result["near_ties"], result["events"]) == (1, 1, {"on": 3})


# Shrinking


def test_shrinking_finds_the_two_steps_that_matter_and_simplifies_them():
    case = cases.generate(3, 0, "server", 70, POOL)
    asks = [at for at, step in enumerate(case["steps"]) if step["do"] == "ask"]
    first, second = asks[5], asks[-4]
    case["steps"][first]["marked"], case["steps"][second]["marked"] = 1, 2
    original = copy.deepcopy(case)
    trials = []

    def fails(trial):
        trials.append(trial)
        marks = [step.get("marked") for step in trial["steps"] if step.get("marked")]
        return marks == [1, 2]

    small, count = shrink(case, fails)
    assert [step["marked"] for step in small["steps"]] == [1, 2]
    assert all(step["wait"] == 0 and step["priority"] == 0 for step in small["steps"])
    assert count == len(trials) < 80 and fails(small) and case == original
    assert all(references.key(step) in {references.key(one) for one in POOL} for step in cases.compared(small))


def test_shrinking_ends_after_so_many_trials_with_what_fails():
    case = cases.generate(3, 0, "server", 70, POOL)
    small, count = shrink(case, lambda trial: len(trial["steps"]) > 20, 5)
    assert count == 5 and 20 < len(small["steps"]) < len(case["steps"])


def test_only_failures_fail():
    step, seen = STEP, answered((7, 8, 7, 7))
    assert failures(judge(0, step, seen, REFERENCE, 5, 256, lambda word: [])) == []


# One request over HTTP, of a server that isn't there


def asked_over_http(step, answer):
    async def run():
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await over_http.ask(client, step, types.SimpleNamespace(ids=lambda prompt: [1] * prompt["tokens"]))

    return asyncio.run(run())


def streamed(*parts, usage=4):
    events = [{"choices": [{"index": 0, "text": text, "token_ids": ids, "finish_reason": end}]} for ids, text, end in parts]
    events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": usage}})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    return lambda request: httpx.Response(200, text="".join(lines))


def test_a_streamed_answer_is_put_together():
    seen = asked_over_http(STEP, streamed(([7, 7], "aa", None), ([7], "a", None), ([7], "a", "length")))
    assert seen.choices[0].token_ids == [7, 7, 7, 7] and found(seen) == []


def test_a_stream_is_left_when_the_case_says_so():
    answer = streamed(([7, 7], "aa", None), ([7], "a", None), ([7], "a", "length"))
    seen = asked_over_http({**STEP, "leave_after": 1}, answer)
    assert seen.left and seen.choices[0].token_ids == [7, 7] and found(seen) == []
    assert not asked_over_http({**STEP, "leave_after": 4}, answer).left, "it had ended"
    nothing = asked_over_http({**STEP, "leave_after": 0}, answer)
    assert nothing.left and nothing.choices == [] and found(nothing) == []


def test_a_stream_without_an_end_or_with_an_error_is_lost():
    assert found(asked_over_http(STEP, streamed(([7, 7], "aa", None)))) != []
    failed = asked_over_http(STEP, lambda request: httpx.Response(200, text='data: {"error": {"message": "boom"}}\n\n'))
    assert found(failed) == ["lost"]
    refusal = 'data: {"error": {"message": "The min_p and ...", "code": 400}}\n\n'
    refused = asked_over_http(STEP, lambda request: httpx.Response(200, text=refusal))
    assert found(refused) == ["status"] and found(refused, {**STEP, "refused": "min_p"}) == []
    assert found(asked_over_http(STEP, lambda request: httpx.Response(500, text="boom"))) == ["status"]

    def broken(request):
        raise httpx.RemoteProtocolError("gone")

    assert found(asked_over_http(STEP, broken)) == ["lost"]


def test_a_whole_answer_is_read():
    choice = {"index": 0, "text": "aaaa", "token_ids": [7] * 4, "finish_reason": "length", "prompt_logprobs": [None] * 5}
    choice["logprobs"] = {"token_logprobs": [-0.1] * 4, "top_logprobs": [{"a": -0.1}] * 4}
    usage = {"prompt_tokens": 5, "completion_tokens": 4}
    step = {**STEP, "via": "completions"}
    seen = asked_over_http(step, lambda request: httpx.Response(200, json={"choices": [choice], "usage": usage}))
    assert found(seen, step, logprobs=1, prompt_logprobs=1) == []
    assert seen.choices[0].prompt_logprobs == 5 and seen.choices[0].logprobs == [(-0.1, 1)] * 4
