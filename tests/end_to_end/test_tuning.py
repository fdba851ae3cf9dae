"""`vllm_aasd.tune`: figures by hand, what the bounds exclude, what is recommended, and bad arguments."""

import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest

from vllm_aasd import tune, tuning
from vllm_aasd.engine import trial

PROMPT = list(range(100, 120))
BOUNDS = {"rouge_l": 0.9, "copied": 0.02, "repeated": 0.02}


def figure(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def test_a_row_by_hand():
    answer = [1, *range(100, 108), 2, 3, 4, 5, 2, 3, 4, 5]
    assert tuning.row(PROMPT, answer, answer[:-1], 2.0, 0.5) == {
        "tokens": 17,
        "decode_tokens": 16,
        "seconds": 2.0,
        "rouge_l": pytest.approx(32 / 33),
        "equal": 0,
        "copied": 8,
        "repeated": 1,
        "ngrams": 14,
        "score": 0.5,
    }


def lcs(a, b):
    if not a or not b:
        return 0
    return 1 + lcs(a[:-1], b[:-1]) if a[-1] == b[-1] else max(lcs(a[:-1], b), lcs(a, b[:-1]))


def test_rouge_l_is_that_of_the_definition():
    assert tuning.rouge_l([], []) == 1.0 and tuning.rouge_l([], [1]) == 0.0
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (rng.integers(0, 3, rng.integers(1, 8)).tolist() for _ in range(2))
        assert tuning.rouge_l(a, b) == 2 * lcs(a, b) / (len(a) + len(b))


def test_copied_tokens_lie_in_long_enough_spans():
    assert tuning.num_copied(PROMPT[3:11], PROMPT) == 8 and tuning.num_copied(PROMPT[3:10], PROMPT) == 0
    # Two spans that overlap in the prompt count each token once; the tokens around them don't count.
    assert tuning.num_copied([1, *PROMPT[:10], 2, *PROMPT[5:13]], PROMPT) == 18


def test_figures_by_hand_weigh_groups_alike():
    off = [tuning.row(PROMPT, [1, 2, 3], [1, 2, 3], 4.0, 1.0), tuning.row(PROMPT, [4, 5], [4, 5], 3.0, None)]
    ours = [tuning.row(PROMPT, [1, 2, 3], [1, 2, 3], 2.0, 0.0), tuning.row(PROMPT, [4, 6], [4, 5], 1.0, None)]
    found = tuning.figures(ours, off, off, num_accepted=1, groups=["a", "a"])
    assert found["speed"]["value"] == found["speed_to_strict"]["value"] == pytest.approx((7 / 3) / (3 / 3))
    assert found["mal"] == 3 / 2 and found["rouge_l"]["value"] == 0.75 and found["equal"]["value"] == 0.5
    assert found["score"]["value"] == 0 and found["score_drop"]["value"] == 1
    assert found["by_group"] == {"a": {name: found[name] for name in ("score", "score_drop")}}
    assert tuning.stratified_ratio([1, 1, 1, 0], [1] * 4, ["a", "a", "a", "b"]) == figure(0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # Two groups of 30, of means 1 and 3; the percentile bootstrap of 30 falls a little short of 95%.
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = np.concatenate([rng.exponential(1.0, 30), rng.normal(3.0, 1.0, 30)])
        figure = tuning.stratified_ratio(values, np.ones(60), ["a"] * 30 + ["b"] * 30)
        covered += figure["low"] <= 2.0 <= figure["high"]
    assert 176 <= covered <= 198


def found(**changed):
    plain = {"rouge_l": figure(1.0), "copied": figure(0.1), "repeated": figure(0.1), "score_drop": figure(0, -0.1, 0.1)}
    return plain | changed


@pytest.mark.parametrize(
    ("changed", "over"),
    [
        ({}, []),
        ({"rouge_l": figure(0.89)}, ["rouge_l"]),
        ({"copied": figure(0.125), "repeated": figure(0.125)}, ["copied", "repeated"]),
        ({"copied": figure(0.115), "repeated": {"value": None, "low": None, "high": None}}, []),
        ({"score_drop": figure(0.2, 0.01, 0.4)}, ["score_drop"]),
        ({"score_drop": figure(0.2, -0.01, 0.4)}, []),
    ],
)
def test_what_exceeds_the_bounds(changed, over):
    assert tuning.excess(found(**changed), found(), BOUNDS) == over


def test_strict_is_recommended_unless_another_is_faster_beyond_the_noise():
    speeds = {
        "strict": {"speed": figure(1.5), "speed_to_strict": figure(1.0)},
        "noise": {"speed": figure(2.5), "speed_to_strict": figure(1.6, 0.99, 2.2)},
        "a": {"speed": figure(1.6), "speed_to_strict": figure(1.07, 1.01, 1.1)},
        "b": {"speed": figure(1.7), "speed_to_strict": figure(1.1, 1.01, 1.2)},
    }
    assert tuning.fastest(speeds, ["strict", "noise", "a", "b"], "strict") == "b"
    assert tuning.fastest(speeds, ["noise", "a"], "strict") == "a"
    assert tuning.fastest(speeds, ["noise"], "strict") == tuning.fastest(speeds, [], "strict") == "strict"


def lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


class FakeTrial:
    """A target that copies under loose rules, and takes a second for each token that wasn't a draft's."""

    tokenizer = types.SimpleNamespace(
        chat_template=None, encode=lambda text: [7, *map(ord, text)], decode=lambda ids: "Ada" if ids[0] == 1 else ""
    )

    def __init__(self, model, arguments):
        assert "--speculative-config" not in arguments

    def answer(self, prompts, max_tokens, options, sampling):
        is_off, loose = options.get("aasd_enabled") is False, options.get("aasd_beta", 1) < 0.5
        seconds = 2.0 if is_off else 1.0 / (1 + loose)
        answers = [((prompt * 9)[:9] if loose else [1, 2, 3, 4, 5, 6, 7, 8, 9], seconds) for prompt in prompts]
        return answers, len(prompts) * (0 if is_off else 4)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "Trial", FakeTrial)
    messages = [{"role": "user", "content": "question 0"}]
    prompts = [{"messages": messages, "reference": "ada"}, *({"prompt": f"question {i}"} for i in range(1, 4))]
    return ["--model", "none", "--prompts", str(lines(tmp_path / "p.jsonl", *prompts)), "--max-tokens", "9"]


def test_the_command_from_prompts_to_the_configuration(fake, capsys):
    tune.main([*fake, "--settings", '{"aasd_beta": 0.3}'])
    printed = capsys.readouterr().out
    assert "| strict | 2.00 | 2.00 [2.00, 2.00] | 1.00" in printed
    assert re.search(r"\| beta 0.3 \| 2.00 \| 4.00 .*\| rouge_l, copied, score_drop \|", printed)
    assert """--speculative-config '{"method": "aasd", "aasd_verification": "strict"}'""" in printed
    lines(tune.Path(fake[3]), {"prompt": "question"})
    tune.main([*fake, "--settings", '{"aasd_beta": 0.3}', "--min-agreement", "0", "--max-copied", "1"])
    assert """--speculative-config '{"method": "aasd", "aasd_beta": 0.3}'""" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", '{"aasd_bata": 1}'], "Unknown request option 'aasd_bata'"),
        (["--settings", '{"aasd_beta": -1}'], "The request's aasd_beta is not allowed"),
        (["--settings", "[1]"], r"--settings takes JSON objects, not \[1\]"),
        (["--settings", "{"], "argument --settings"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
        (["--prompts", __file__], r"test_tuning\.py:1: "),
    ],
)
def test_bad_arguments_end_it_with_a_message(fake, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        tune.main([*fake, *arguments])
    assert re.search(message, f"{ended.value}{capsys.readouterr().err}")


def test_a_speculative_config_is_refused(capsys):
    with pytest.raises(SystemExit):
        trial.Trial("none", ["--speculative-config", "{}"])
    assert "--settings takes the settings to compare" in capsys.readouterr().err


def test_no_rule_drafts_from_the_answers_of_another(monkeypatch):
    configs = []
    llm = types.SimpleNamespace(get_tokenizer=lambda: None)
    monkeypatch.setattr(trial.LLM, "from_engine_args", lambda engine: configs.append(engine.speculative_config) or llm)
    trial.Trial("model", [])
    assert configs[0]["aasd_memory"] == "off"


@pytest.mark.engine
@pytest.mark.long
def test_the_real_engine(demo_model, tmp_path):
    """Strict is what no speculation is; a loose rule without its guard isn't, and is seen to copy or to differ."""
    passage = "The quick brown fox jumps over the lazy dog while seven wizards box. " * 6
    prompts = [{"prompt": f"{passage}\nSay in other words what animal {i} does."} for i in range(4)]
    loose = {"aasd_alpha": 10.0, "aasd_beta": 0.0, "aasd_collapse_guard": False}
    command = [sys.executable, "-m", "vllm_aasd.tune", "--model", demo_model, "--max-tokens", "32", "--rounds", "1"]
    command += ["--prompts", str(lines(tmp_path / "p.jsonl", *prompts)), "--settings", json.dumps(loose)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--gpu-memory-utilization", "0.4"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    plain, strict, other = rows[2:5]
    assert plain[1] == "1.00" and float(strict[1]) > 1 and strict[4].startswith("1.00 [1.00")
    assert float(other[1]) > float(strict[1]) and "rouge_l" in other[-1]
