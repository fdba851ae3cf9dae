"""The benchmarks' own arithmetic: data files, statistics, step counts, comparisons. No engine is started."""

import json
import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Behind what is installed, and only for these imports: the root also holds `kernels`, a name that
# transformers looks for.
sys.path.append(str(ROOT))
from benchmarks import data, demo, methods, results, server, steps  # noqa: E402
from vllm_aasd.tuning import statistics  # noqa: E402

sys.path.remove(str(ROOT))


def question(question_id, category="qa", turns=("What?",), **more):
    return {"question_id": question_id, "category": category, "turns": list(turns), **more}


def write_lines(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


# Data


def test_questions_are_read_with_the_first_turn_and_the_group(tmp_path):
    path = write_lines(
        tmp_path / "q.jsonl",
        question(81, "writing", ["one", "two"], reference=[]),
        "\n",
        question("x", "rag"),
    )
    assert data.read_questions(path) == [
        data.Question(81, "writing", "mt_bench", "one"),
        data.Question("x", "rag", "rag", "What?"),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json}\n", "Expecting property name"),
        ("[1, 2]\n", "an object is wanted, and this is list"),
        ({"category": "qa", "turns": ["a"]}, "'question_id' is missing"),
        (question(True), "'question_id' must be an integer or a string, and is True"),
        (question(1.5), "'question_id' must be"),
        ({"question_id": 2, "category": None, "turns": ["a"]}, "'category' must be a string, and is None"),
        ({"question_id": 2, "category": "qa", "turns": "a"}, "'turns' must be a list of strings, and is 'a'"),
        (question(2, turns=[]), "'turns' must hold at least one string"),
        (question(2, turns=["a", 3]), "'turns' must hold"),
        (question(2, turns=["  "]), "'turns' must hold"),
        (question(1), "question_id 1 stands on an earlier line already"),
    ],
)
def test_a_malformed_line_is_named_with_its_file_and_number(tmp_path, line, complaint):
    path = write_lines(tmp_path / "q.jsonl", question(1), "\n", line)
    with pytest.raises(data.DataError) as error:
        data.read_questions(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert complaint in str(error.value)


def test_bytes_that_are_no_text_are_named_too(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question_id": 1, "category": "\xff\xfe", "turns": ["a"]}\n')
    with pytest.raises(data.DataError, match=r"q\.jsonl:1: "):
        data.read_questions(path)


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="no questions"):
        data.read_questions(write_lines(tmp_path / "q.jsonl", "\n"))


# Statistics


def lcs_by_recursion(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + lcs_by_recursion(a[:-1], b[:-1])
    return max(lcs_by_recursion(a[:-1], b), lcs_by_recursion(a, b[:-1]))


def test_lcs_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (rng.integers(0, 3, rng.integers(0, 8)).tolist() for _ in range(2))
        assert statistics.lcs_length(a, b) == lcs_by_recursion(a, b)


def test_rouge_l_known_answers():
    assert statistics.rouge_l([1, 2, 3], [1, 2, 3]) == 1.0
    assert statistics.rouge_l([1, 2], [3, 4]) == 0.0
    assert statistics.rouge_l([], []) == 1.0
    assert statistics.rouge_l([], [1]) == 0.0
    # "police killed the gunman" and "police kill the gunman" (Lin, 2004): 3 of 4 words either way.
    assert statistics.rouge_l([1, 2, 3, 4], [1, 5, 3, 4]) == 0.75
    # Recall 2/2, precision 2/4.
    assert statistics.rouge_l([1, 9, 2, 9], [1, 2]) == pytest.approx(2 * 0.5 / 1.5)


def test_copied_tokens_lie_in_long_enough_runs():
    prompt = list(range(100, 120))
    assert statistics.num_copied(prompt[3:11], prompt, span=8) == 8
    assert statistics.num_copied(prompt[3:10], prompt, span=8) == 0
    # Two runs that overlap in the output count each token once; the tokens around them don't count.
    assert statistics.num_copied([1, *prompt[:10], 2, *prompt[5:13]], prompt, span=8) == 18
    assert statistics.num_copied(prompt[-8:], prompt, span=8) == 8
    assert statistics.num_copied([1, 2, 3], [1, 2], span=8) == 0


def test_repeats_are_runs_that_stood_earlier():
    assert statistics.num_repeats([1, 2, 3, 4, 5], span=4) == (0, 2)
    assert statistics.num_repeats([7] * 10, span=4) == (6, 7)
    assert statistics.num_repeats([1, 2, 3, 4, 9, 1, 2, 3, 4], span=4) == (1, 6)
    assert statistics.num_repeats([1, 2, 3], span=4) == (0, 0)


def test_ratio_is_pooled_within_groups_and_averaged_over_them():
    figure = statistics.stratified_ratio([1, 9, 4], [1, 3, 2], ["a", "a", "b"])
    assert figure["value"] == pytest.approx((10 / 4 + 4 / 2) / 2)
    assert figure["low"] <= figure["value"] <= figure["high"]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # 400 samples of two groups of 30, of means 1 and 3: 95 % nominal, and the percentile bootstrap of 30 is
    # known to fall a little short. Below 0.90 would come by chance with p < 1e-4 at a true coverage of 0.94.
    rng = np.random.default_rng(1)
    groups = ["a"] * 30 + ["b"] * 30
    covered = 0
    for trial in range(400):
        values = np.concatenate([rng.exponential(1.0, 30), rng.normal(3.0, 1.0, 30)])
        figure = statistics.stratified_ratio(values, np.ones(60), groups, seed=trial)
        covered += figure["low"] <= 2.0 <= figure["high"]
    assert 0.90 <= covered / 400 <= 0.985


def test_interval_does_not_resample_across_groups():
    # Each group is constant: whatever is drawn within it, its mean stays.
    figure = statistics.stratified_ratio([1, 1, 5, 5], [1, 1, 1, 1], ["a", "a", "b", "b"])
    assert figure == {"value": 3.0, "low": 3.0, "high": 3.0}


# Steps


def test_acceptance_of_hand_made_logs():
    # a: 6 tokens in 3 steps and 2 in 2; b: 4 in 1; the last question ended with its first token.
    counts = [
        steps.Counts(3, 6, 9, 3),
        steps.Counts(2, 2, 0, 0),
        steps.Counts(1, 4, 8, 3),
        steps.Counts(0, 0, 0, 0),
    ]
    figures = steps.acceptance(counts, ["a", "a", "b", "b"])
    assert figures["mal"]["value"] == pytest.approx((8 / 5 + 4) / 2)
    assert figures["mal_per_question"]["value"] == pytest.approx(((2 + 1) / 2 + 4) / 2)
    assert figures["drafted_per_step"] == pytest.approx((9 / 5 + 8) / 2)
    assert figures["accepted_per_step"] == pytest.approx((3 / 5 + 3) / 2)
    assert figures["acceptance_rate"] == pytest.approx((3 / 9 + 3 / 8) / 2)
    assert figures["num_questions"] == 4


def test_acceptance_without_drafts_has_no_rate():
    figures = steps.acceptance([steps.Counts(2, 2, 0, 0)], ["a"])
    assert figures["mal"]["value"] == 1.0
    assert figures["acceptance_rate"] is None


# Methods


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (None, True),
        ({"method": "ngram"}, True),
        ({"method": "aasd"}, False),
        ({"method": "aasd", "aasd_verification": "conditional"}, False),
        ({"method": "aasd", "aasd_verification": "strict"}, True),
    ],
)
def test_which_methods_promise_exact_answers(config, exact):
    assert methods.is_exact(config) is exact


# Results, and what the demonstration prints


def test_results_come_back_as_written_and_rows_stand_on_lines_of_their_own(tmp_path):
    result = {
        "a": {"b": [1, 2], "c": None},
        "questions": [{"id": 1, "n": 2.5}, {"id": 2, "n": 3}],
        "empty": [],
    }
    results.write(tmp_path / "new" / "r.json", result)
    text = (tmp_path / "new" / "r.json").read_text()
    assert json.loads(text) == result == results.read(tmp_path / "new" / "r.json")
    assert text.count('"id"') == 2 and max(line.count('"id"') for line in text.splitlines()) == 1


def test_metadata_keeps_no_absolute_path(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/benchmarks/ablation.py", "--data", "/home/me/questions.jsonl"])
    run = results.metadata(data=pathlib.Path("/home/me/questions.jsonl"), limit=3)
    assert run["command"] == "python -m benchmarks.ablation --data questions.jsonl"
    assert run["conditions"] == {"data": "questions.jsonl", "limit": 3}
    assert "/home/me" not in json.dumps(run)


def test_counters_are_read_from_the_text_of_metrics():
    text = (
        "# HELP vllm:spec_decode_num_drafts_total Number of drafts\n"
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="model"} 7.0\n'
        'vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="model"} 31.0\n'
        'vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="model"} 1.2e+01\n'
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 5.0\n'
        'vllm:spec_decode_num_drafts_total{engine="1",model_name="model"} 2.0\n'
    )
    assert server.parse_counters(text) == server.SpecCounters(9, 31, 12)
    assert server.parse_counters("") == server.SpecCounters(0, 0, 0)
    assert server.SpecCounters(9, 31, 12).since(server.SpecCounters(2, 1, 2)) == server.SpecCounters(7, 30, 10)


def test_tokens_per_step_leaves_the_first_token_out():
    answer = demo.Answer("", 13, 2.0, 0.5, server.SpecCounters(3, 20, 8))
    assert answer.tokens_per_second == 6.5
    assert answer.tokens_per_step == 12 / 4


@pytest.mark.parametrize(
    ("one", "other", "marked"),
    [
        ("the same", "the same", ("the same", "the same")),
        ("a cat sat", "a car sat", ("a >>cat sat", "a >>car sat")),
        ("left", "right", (">>left", ">>right")),
        ("a cat", "a cat sat", ("a >>cat", "a >>cat sat")),
    ],
)
def test_the_first_difference_is_marked_before_its_word(one, other, marked):
    assert demo.mark_difference(one, other) == marked
