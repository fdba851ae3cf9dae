"""`vllm_aasd.tune`: figures by hand, what the bounds exclude, what is recommended, and bad arguments."""

import json
import re
import subprocess
import sys
import types

import pytest

from vllm_aasd import tune
from vllm_aasd.engine import trial
from vllm_aasd.tuning import candidates, figures, report, tasks
from vllm_aasd.tuning.json_lines import DataError

PROMPT = list(range(100, 120))
BOUNDS = figures.Bounds(agreement=0.9, copied=0.02, repeated=0.02)


def one_row(answer, reference, seconds=1.0, scored=(), score=None):
    return figures.row(PROMPT, answer, reference, seconds, scored, score)


def test_a_row_by_hand():
    answer = [1, *range(100, 108), 2, 3, 4, 5, 2, 3, 4, 5]
    scored = [(-0.5, -0.5)] * 16 + [(-1.75, -0.25)]
    found = one_row(answer, answer[:-1], 2.0, scored, 0.5)
    assert found == {
        "tokens": 17,
        "decode_tokens": 16,
        "seconds": 2.0,
        "rouge_l": pytest.approx(32 / 33, abs=1e-4),
        "equal": 0,
        "copied": 8,
        "repeated": 1,
        "runs": 14,
        "not_argmax": 1,
        "regret": 1.5,
        "score": 0.5,
    }


def test_figures_by_hand():
    off = [one_row([1, 2, 3], [1, 2, 3], 4.0, score=1.0), one_row([4, 5], [4, 5], 3.0, score=None)]
    ours = [one_row([1, 2, 3], [1, 2, 3], 2.0, score=0.0), one_row([4, 6], [4, 5], 1.0, score=None)]
    found = figures.figures(ours, off, off, num_accepted=1, groups=["a", "a"])
    assert found["speed"]["value"] == pytest.approx((7 / 3) / (3 / 3))
    assert found["mal"] == 3 / 2
    assert found["rouge_l"]["value"] == 0.75 and found["equal"]["value"] == 0.5
    assert found["score"]["value"] == 0 and found["score_drop"]["value"] == 1


def test_groups_weigh_the_same_however_many_prompts_they_have():
    rows = [one_row([1], [1])] * 3 + [one_row([1], [2])]
    found = figures.figures(rows, rows, rows, 0, ["a", "a", "a", "b"])
    assert found["equal"]["value"] == 0.5


def figure(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def found(**changed):
    plain = {"rouge_l": figure(1.0), "copied": figure(0.1), "repeated": figure(0.1), "score_drop": figure(0, -0.1, 0.1)}
    return plain | changed


@pytest.mark.parametrize(
    ("changed", "over"),
    [
        ({}, []),
        ({"rouge_l": figure(0.89)}, ["rouge_l"]),
        ({"copied": figure(0.125)}, ["copied"]),
        ({"copied": figure(0.115)}, []),
        ({"repeated": figure(0.125)}, ["repeated"]),
        ({"repeated": figure(float("nan"))}, []),
        ({"score_drop": figure(0.2, 0.01, 0.4)}, ["score_drop"]),
        ({"score_drop": figure(0.2, -0.01, 0.4)}, []),
        ({"score_drop": None}, []),
    ],
)
def test_what_exceeds_the_bounds(changed, over):
    assert figures.excess(found(**changed), found(), BOUNDS) == over


def test_strict_is_recommended_unless_another_is_faster_beyond_the_noise():
    speeds = {
        "strict": {"speed": figure(1.5), "speed_to_strict": figure(1.0)},
        "noise": {"speed": figure(2.5), "speed_to_strict": figure(1.6, 0.99, 2.2)},
        "a": {"speed": figure(1.6), "speed_to_strict": figure(1.07, 1.01, 1.1)},
        "b": {"speed": figure(1.7), "speed_to_strict": figure(1.1, 1.01, 1.2)},
    }
    assert figures.fastest(speeds, ["strict", "noise", "a", "b"], "strict") == "b"
    assert figures.fastest(speeds, ["noise", "a"], "strict") == "a"
    assert figures.fastest(speeds, ["noise"], "strict") == figures.fastest(speeds, [], "strict") == "strict"


def test_candidates_have_names_and_are_checked():
    named = candidates.candidates(candidates.DEFAULTS, 0.7, 0.9)
    names = [one.name for one in named]
    assert names[:3] == ["no speculation", "strict", "no speculation, sampled at 0.7, top-p 0.9"]
    assert "conditional, beta 0.3, floor 0.05" in names and len(set(names)) == len(names)
    assert [one.is_offered for one in named[:4]] == [False, True, False, True]
    assert len(candidates.candidates([], 0, 1)) == 2
    with pytest.raises(ValueError, match="aasd_floor=0 is not allowed"):
        candidates.candidates([{"aasd_floor": 0}], 0, 1)


def lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_prompts_of_a_chat_and_their_references(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    path = lines(tmp_path / "mine.jsonl", {"messages": messages, "reference": "Ada"}, {"prompt": "Why?", "id": "x"})
    assert tasks.read_tasks(path) == [
        tasks.Task("1", "mine", "Who?", None, "answer", "Ada", (messages[0],)),
        tasks.Task("x", "mine", "Why?", "Why?"),
    ]


@pytest.mark.parametrize("messages", ["Who?", [], ["Who?"], [{"role": "user"}], [{"role": "user", "content": 1}]])
def test_a_bad_conversation_is_refused_with_its_line(tmp_path, messages):
    with pytest.raises(DataError, match=r"mine\.jsonl:1: '(messages|content)' must be"):
        tasks.read_tasks(lines(tmp_path / "mine.jsonl", {"messages": messages}))


class FakeTrial:
    """A target that copies under loose rules, and takes a second for each token that wasn't a draft's."""

    max_model_len = 64
    tokenizer = types.SimpleNamespace(chat_template=None, encode=lambda text: [7, *map(ord, text)])

    def __init__(self, engine):
        self.engine = engine

    def answer(self, prompts, max_tokens, options, sampling):
        is_off = options.get("aasd_enabled") is False
        loose = options.get("aasd_floor", 1) < 0.1
        answers = [
            trial.Answer(
                (prompt * 9)[:9] if loose else [1, 2, 3, 4, 5, 6, 7, 8, 9], 2.0 if is_off else 1.0 / (1 + loose)
            )
            for prompt in prompts
        ]
        return answers, len(prompts) * (0 if is_off else 4)

    def score(self, places):
        return [[(-0.1, -0.1)] * len(answer) for _, answer in places]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "Trial", FakeTrial)
    prompts = lines(tmp_path / "p.jsonl", *({"prompt": f"question {i}"} for i in range(4)))
    return ["--model", "none", "--prompts", str(prompts), "--max-tokens", "9"]


def test_the_command_from_prompts_to_the_configuration(fake, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    tune.main([*fake, "--json", str(out), "--plot", str(plot), "--settings", '{"aasd_floor": 0.05}'])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    runs = result["runs"]
    assert list(runs)[-1] == "conditional, floor 0.05"
    assert runs["strict"]["speed"]["value"] == 2 and runs["strict"]["mal"] == 2.0
    loose = runs["conditional, floor 0.05"]
    assert loose["speed"]["value"] == 4 and loose["exceeds"] == ["rouge_l", "copied"]
    assert "conditional, floor 0.05: exceeds the bounds in rouge_l, copied" in printed
    assert """--speculative-config '{"method": "aasd", "aasd_verification": "strict"}'""" in printed
    assert report.table(result) in printed and plot.read_text().count("<svg") == 1
    tune.main([*fake, "--settings", '{"aasd_floor": 0.05}', "--min-agreement", "0", "--max-copied", "1"])
    assert """--speculative-config '{"method": "aasd", "aasd_floor": 0.05}'""" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", '{"aasd_flor": 1}'], "Unknown request option 'aasd_flor'"),
        (["--settings", "[1]"], r"'\[1\]' isn't a JSON object"),
        (["--rounds", "0"], "0 is not allowed: it takes a number of at least 1"),
        (["--min-agreement", "2"], "2 is not allowed: it takes a number from 0 to 1"),
        (["--speculative-config", "{}"], "--speculative-config is what is to be found"),
    ],
)
def test_bad_arguments_end_it_with_a_message(fake, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        tune.main([*fake, *arguments])
    assert re.search(message, f"{ended.value}{capsys.readouterr().err}")


def test_prompts_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*none\.jsonl"):
        tune.main(["--model", "none", "--prompts", str(tmp_path / "none.jsonl")])


@pytest.mark.engine
@pytest.mark.long
def test_the_real_engine(demo_model, tmp_path):
    """Strict is what no speculation is; a bar that lets anything by isn't, and is seen to copy or to part."""
    passage = "The quick brown fox jumps over the lazy dog while seven wizards box. " * 6
    prompts = lines(
        tmp_path / "p.jsonl", *({"prompt": f"{passage}\nSay in other words what animal {i} does."} for i in range(4))
    )
    out = tmp_path / "out.json"
    loose = {"aasd_beta": 0.1, "aasd_floor": 1e-4, "aasd_collapse_guard": False}
    arguments = [
        "--limit",
        "4",
        "--max-tokens",
        "32",
        "--rounds",
        "1",
        "--json",
        str(out),
        "--settings",
        json.dumps(loose),
    ]
    engine = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--gpu-memory-utilization", "0.4"]
    command = [
        sys.executable,
        "-m",
        "vllm_aasd.tune",
        "--model",
        demo_model,
        "--prompts",
        str(prompts),
        *arguments,
        *engine,
    ]
    subprocess.run(command, check=True)
    runs = json.loads(out.read_text())["runs"]
    assert runs["strict"]["equal"]["value"] == 1 and runs["strict"]["not_argmax"]["value"] == 0
    assert runs["strict"]["mal"] > 1 == runs["no speculation"]["mal"]
    last = list(runs.values())[-1]
    assert last["regret"]["value"] > 0.001 and last["mal"] > runs["strict"]["mal"]
    assert next(run for name, run in runs.items() if "sampled" in name)["equal"]["value"] < 1
