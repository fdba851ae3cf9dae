"""The load test's own arithmetic: what counts as lost, percentiles, and how differing answers are judged."""

import pathlib
import sys

import httpx
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Behind what is installed, and only for these imports: the root also holds `kernels`, a name that
# transformers looks for.
sys.path.append(str(ROOT))
from benchmarks import load  # noqa: E402
from benchmarks.load import Answer  # noqa: E402
from benchmarks.server import ServerError  # noqa: E402

sys.path.remove(str(ROOT))

WHOLE = Answer([5, 6, 7], "length", 0.5, 1.5)


def test_nothing_is_lost_when_every_answer_has_its_end():
    load.check("none", [WHOLE, Answer([5], "stop", 0.1, 0.1)], {"length": 1, "stop": 1, "abort": 0}, 3)


@pytest.mark.parametrize(
    ("answers", "ended"),
    [
        ([Answer([5, 6], "length", 0.5, 1.0)], {"length": 1}),
        ([Answer([5, 6, 7], None, 0.5, 1.0)], {"length": 1}),
        ([Answer([5, 6, 7], "abort", 0.5, 1.0)], {"length": 1}),
        ([Answer([], "stop", 0.0, 0.0)], {"stop": 1}),
        ([WHOLE], {"length": 2}),
        ([WHOLE], {"length": 1, "abort": 1}),
        ([WHOLE], {"abort": 1}),
    ],
)
def test_what_is_lost_is_said(answers, ended):
    with pytest.raises(ServerError):
        load.check("aasd", answers, ended, 3)


def test_figures_are_of_all_tokens_and_of_the_time_behind_the_first():
    rows = [[3, 0.5, 1.5], [1, 2.0, 2.0]]
    run = {"seconds": 2.0, "rows": rows, "preemptions": 7, "accepted_tokens": 1, "draft_tokens": 4}
    found = load.figures("aasd", run)
    assert found["output_throughput"] == 2.0 and found["accepted"] == 0.25 and found["preemptions"] == 7
    assert found["ttft_ms"]["p50"] == 1250.0 and found["tpot_ms"] == {"p50": 500.0, "p95": 500.0, "p99": 500.0}


@pytest.mark.parametrize(("nats", "is_exact"), [(1e-4, True), (0.5, False)])
def test_answers_that_differ_are_judged_by_the_target(nats, is_exact, monkeypatch):
    asked = []

    def post(url, json, timeout):
        asked.append(json["prompt"])
        token = json["prompt"][-1]
        row = {"6": {"logprob": -0.1}, str(token): {"logprob": -0.1 if token == 6 else -0.1 - nats}}
        return httpx.Response(200, json={"choices": [{"prompt_logprobs": [None, row]}]})

    monkeypatch.setattr(httpx, "post", post)
    answers = {"aasd strict": [Answer([5, 9, 9], "length", 0, 1), WHOLE], "none": [WHOLE, WHOLE]}
    found = load.judged("http://server", [[1], [2]], answers, 1e-3)["aasd strict"]
    assert found["num_different"] == 1 and found["is_exact"] == is_exact
    assert asked == [[1, 5, 6], [1, 5, 9]]


def test_an_answer_that_ends_early_is_no_tie():
    answers = {"aasd": [Answer([5], "stop", 0, 1)], "none": [WHOLE]}
    assert not load.judged("http://server", [[1]], answers, 1e-3)["aasd"]["is_exact"]
