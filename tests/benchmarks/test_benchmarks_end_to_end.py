"""The end-to-end benchmark without an engine: tasks, prompts, pairing, near ties, scores, figures, tables."""

import json
import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Behind what is installed, and only for these imports: the root also holds `kernels`, a name that
# transformers looks for.
sys.path.append(str(ROOT))
from benchmarks import (  # noqa: E402
    builtin,
    comparison,
    data,
    end_to_end,
    end_to_end_report,
    exactness,
    methods,
    resume,
    rounds,
)
from vllm_aasd.drafting import prior as prior_file  # noqa: E402
from vllm_aasd.engine.model_key import model_key  # noqa: E402
from vllm_aasd.tuning import prompts, scores, statistics, tasks  # noqa: E402

sys.path.remove(str(ROOT))


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


# Tasks


def test_the_three_formats_are_read_from_one_file(tmp_path):
    path = write_lines(
        tmp_path / "mine.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 5, "category": "math_reasoning", "turns": ["1 + 1?"], "reference": ["#### 2"]},
        {"question_id": 6, "category": "math_reasoning", "turns": ["1 + 2?"]},
        {
            "id": "h1",
            "question": "Who?",
            "answer": "Me",
            "context": [{"title": "A", "text": "a b. "}, ["B", ["c. ", "d."]]],
        },
        {"prompt": "Go on."},
        {"prompt": "And on.", "category": "other", "id": 7},
    )
    passages = "Answer the question based on the given passages.\n\nA\na b.\n\nB\nc. d.\n\nQuestion: Who?"
    assert tasks.read_tasks(path) == [
        tasks.Task("writing/81", "mt_bench", "Write."),
        tasks.Task("5", "math_reasoning", "1 + 1?", None, "last_number", "#### 2"),
        tasks.Task("6", "math_reasoning", "1 + 2?"),
        tasks.Task("h1", "hotpotqa", passages, f"{passages}\nAnswer:", "answer", "Me"),
        tasks.Task("5", "mine", "Go on.", "Go on."),
        tasks.Task("7", "other", "And on.", "And on."),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"text": "a"}, "nor 'messages' is there, but 'text'"),
        ({"prompt": "  "}, "'prompt' must be a string, not an empty one"),
        ({"prompt": "a", "category": 3}, "'category' must be a string"),
        ({"question": "q", "context": [], "answer": "a"}, "'context' must be a list of passages"),
        ({"question": "q", "context": ["a"], "answer": "a"}, "a passage must be an object"),
        ({"question": "q", "context": [{"title": "t"}], "answer": "a"}, "'text' must be"),
        ({"question": "q", "context": [{"title": "t", "text": "x"}]}, "'answer' must be"),
        ({"question_id": 1, "category": "qa", "turns": []}, "'turns' must hold"),
        ({"prompt": "b", "id": "1"}, "'1' stands on an earlier line of 'f' already"),
        ([1], "an object is wanted"),
    ],
)
def test_a_malformed_task_is_named_with_its_file_and_line(tmp_path, line, complaint):
    path = write_lines(tmp_path / "f.jsonl", {"prompt": "a"}, line)
    with pytest.raises(data.DataError) as error:
        tasks.read_tasks(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert complaint in str(error.value)


def test_a_file_without_tasks_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="no tasks"):
        tasks.read_tasks(write_lines(tmp_path / "f.jsonl"))


def test_kinds_of_a_category_are_taken_in_turn():
    ids = ("writing/1", "writing/2", "math/3", "math/4", "math/5")
    found = tasks.by_category([tasks.Task(i, "mt_bench", "t") for i in ids], 3, None)
    assert [task.task_id for task in found["mt_bench"]] == ["writing/1", "math/3", "writing/2"]


def test_only_the_wanted_categories_are_kept_and_an_unknown_one_is_named():
    two = [tasks.Task("1", "a", "t"), tasks.Task("1", "b", "t")]
    assert list(tasks.by_category(two, 3, ["b"])) == ["b"]
    with pytest.raises(data.DataError, match="'c'; there are: a, b"):
        tasks.by_category(two, 3, ["c"])


@pytest.fixture(scope="module")
def built_in():
    found = {}
    for task in builtin.builtin_tasks():
        found.setdefault(task.category, []).append(task)
    return found


def test_built_in_tasks_are_the_same_each_time_and_enough(built_in):
    again = builtin.builtin_tasks()
    assert sorted(again) == sorted(task for members in built_in.values() for task in members)
    assert len({(task.category, task.task_id) for task in again}) == len(again)
    assert {category: len(members) >= 20 for category, members in built_in.items()} == {
        "code_infile": True,
        "code_crossfile": True,
        "quote": True,
        "edit": True,
    }


def test_code_stands_as_in_the_file_and_the_reference_is_the_line_that_follows(built_in):
    for task in built_in["code_infile"] + built_in["code_crossfile"]:
        name, _, number = task.task_id.rpartition(":")
        lines = (builtin.LIBRARY / name).read_text().split("\n")
        assert lines[int(number) - 1] == task.reference
        shown = task.raw.split("\n")[-4:-1]
        assert shown == lines[int(number) - 4 : int(number) - 1]
        assert task.raw in task.text and task.score == "next_line"


def test_what_a_cross_file_line_uses_is_defined_before_it(built_in):
    for task in built_in["code_crossfile"]:
        source, _, here = task.raw.partition(f"\n# {task.task_id.rpartition(':')[0]}\n")
        assert here, "the file's own part has its name above"
        defined = source.split("\n")[1].replace("(", " ").replace(":", " ").split()
        names = [defined[1]] if defined[0] in ("def", "class") else [defined[2]]
        path = builtin.LIBRARY / task.task_id.rpartition(":")[0]
        aliases = [line for line in path.read_text().split("\n") if f"{names[0]} as " in line]
        assert names[0] in task.reference or aliases


def test_an_edit_changes_the_case_of_one_word_only(built_in):
    for task in built_in["edit"]:
        original = task.text.partition("\n\n")[2]
        assert task.reference != original and task.reference.lower() == original.lower()
        assert sum(a == b for a, b in zip(task.reference, original, strict=True)) > 0.8 * len(original)


# Prompts


class WordTokenizer:
    """A token per word; a chat template of two tokens before and one behind."""

    chat_template = "there is one"

    def __init__(self):
        self.words = []

    def encode(self, text, add_special_tokens=True):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return ([1000] if add_special_tokens else []) + [self.words.index(word) for word in text.split()]

    def decode(self, token_ids):
        return "".join(f"{self.words[token]} " for token in token_ids)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return [-1, -2, *self.encode(messages[0]["content"], add_special_tokens=False), -3]


def test_a_long_prompt_loses_its_middle_and_keeps_its_frame():
    tokenizer = WordTokenizer()
    text = " ".join(f"w{i}" for i in range(20))
    task = tasks.Task("1", "a", text)
    (whole,) = prompts.tokenise(tokenizer, [task], 23)
    assert whole == [-1, -2, *range(20), -3]
    (cut,) = prompts.tokenise(tokenizer, [task], 10)
    assert cut == [-1, -2, 0, 1, 2, 3, 17, 18, 19, -3]
    with pytest.raises(ValueError, match="2 tokens don't hold an empty prompt: 3"):
        prompts.tokenise(tokenizer, [task], 2)


def test_a_model_without_a_template_goes_on_with_the_raw_text():
    tokenizer = WordTokenizer()
    tokenizer.chat_template = None
    found = prompts.tokenise(tokenizer, [tasks.Task("1", "a", "please go on", "on"), tasks.Task("2", "a", "on")], 9)
    assert found == [[1000, 0], [1000, 0]]


# The measuring loop


class FakeEngine:
    """Answers with its name and what it was sent; notes the order of everything."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def forget(self):
        self.log.append(("forget", self.name))

    def run(self, requests, concurrency):
        self.log.append((self.name, concurrency, tuple(request["prompt_token_ids"] for request in requests)))
        answers = [answered([7] * (i + 1), sent=0.5 * i, first=1.0 + i, last=2.0 + i) for i in range(len(requests))]
        return answers, 4.0


def asked(prompt):
    return {"prompt_token_ids": prompt, "sampling": {"max_tokens": 96}}


def answered(token_ids, sent=0.0, first=1.0, last=2.0, drafted=(), accepted=()):
    return {
        "token_ids": token_ids,
        "emitted": [1] * len(token_ids),
        "sent": sent,
        "first_token": first,
        "last_token": last,
        "draft_tokens": sum(drafted),
        "accepted_tokens": sum(accepted),
        "drafted": list(drafted),
        "accepted": list(accepted),
    }


def test_methods_take_turns_over_the_same_prompts():
    log = []
    engines = {name: FakeEngine(name, log) for name in "ABC"}
    requests = {category: [asked(f"{category}{i}") for i in range(3)] for category in "xy"}
    sizes = {1: {"x": 2, "y": 1}, 4: {"x": 3, "y": 3}}
    counted = []
    found, saved = {}, []
    rounds.measure(
        engines,
        requests,
        sizes,
        2,
        found,
        lambda *counts: counted.append(counts),
        lambda found: saved.append(len(found)),
    )
    forgets = [("forget", name) for name in "ABC"]
    in_turn = [entry for entry in log if entry[0] != "forget"]
    # Each unit is done by all three, one after the other, before the next.
    done = [in_turn[i : i + 3] for i in range(0, len(in_turn), 3)]
    assert all(len({entry[1:] for entry in unit}) == 1 for unit in done)
    assert [unit[0][1:] for unit in done[:5]] == [
        (1, ("x0",)),
        (1, ("x1",)),
        (1, ("y0",)),
        (4, ("x0", "x1", "x2")),
        (4, ("y0", "y1", "y2")),
    ]
    orders = ["".join(entry[0] for entry in unit) for unit in done]
    assert orders == ["ABC", "BCA", "CAB", "ABC", "BCA", "BCA", "CAB", "ABC", "BCA", "CAB"]
    # All forget before each round and concurrency, so no answer is asked for twice in between.
    assert log[:3] == forgets
    assert [i for i, entry in enumerate(log) if entry == forgets[0]] == [0, 12, 21, 33]
    assert counted == [(n, True) for n in [1, 1, 1, 3, 3] * 2]
    assert saved == [6, 12, 18, 24]
    assert set(found) == {(m, c, n, r) for m in "ABC" for c in "xy" for n in (1, 4) for r in (0, 1)}
    assert [row[0] for row in found["A", "x", 1, 1].rows] == [0, 1]
    assert found["A", "x", 1, 1].seconds == 8.0


def test_answers_that_begin_together_do_not_end_together():
    requests = [asked(f"x{i}") for i in range(6)]

    def lengths(concurrency):
        cut = rounds.staggered(requests, concurrency)
        assert [one["prompt_token_ids"] for one in cut] == [one["prompt_token_ids"] for one in requests]
        return [one["sampling"]["max_tokens"] for one in cut]

    assert lengths(1) == [96] * 6
    assert lengths(4) == [24, 48, 72, 96, 96, 96]
    assert lengths(200)[0] == 1
    assert requests == [asked(f"x{i}") for i in range(6)]

    class Sent(FakeEngine):
        def run(self, requests, concurrency):
            self.lengths = [request["sampling"]["max_tokens"] for request in requests]
            return super().run(requests, concurrency)

    engines = {name: Sent(name, []) for name in "AB"}
    rounds.measure(engines, {"x": requests}, {2: {"x": 3}}, 1, {}, lambda *_: None, lambda _: None)
    assert [engine.lengths for engine in engines.values()] == [[48, 96, 96]] * 2


def kept(store):
    return {place: rounds.Measurement(*measured) for place, measured in store.load().items()}


def test_a_run_goes_on_behind_its_last_whole_pass(tmp_path):
    log, sizes, requests = [], {1: {"x": 1}, 2: {"x": 2}}, {"x": [asked("x0"), asked("x1")]}
    engines = {name: FakeEngine(name, log) for name in "AB"}
    store = resume.Store(tmp_path / "r.unfinished", [sizes, "settings"])
    assert store.load() == {}
    whole, counted = {}, []
    rounds.measure(engines, requests, sizes, 2, whole, lambda *_: None, store.save)
    assert kept(store) == whole
    # As if it had ended within the last pass.
    store.save({place: measured for place, measured in whole.items() if place[2:] != (2, 1)})
    log.clear()
    again = kept(store)
    rounds.measure(engines, requests, sizes, 2, again, lambda *one: counted.append(one), store.save)
    assert again == whole
    assert counted == [(1, False), (2, False), (1, False), (2, True)]
    assert [entry for entry in log if entry[0] != "forget"] == [
        ("A", 2, ("x0", "x1")),
        ("B", 2, ("x0", "x1")),
    ]
    with pytest.raises(ValueError, match="other settings"):
        resume.Store(tmp_path / "r.unfinished", [sizes, "others"]).load()
    store.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_tells_how_far_it_is_and_the_time_left_of_what_is_still_to_run(is_terminal, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    progress = rounds.Progress(100)
    # Known from an interrupted run: counts as done, but tells nothing of how fast it goes.
    progress(40, False)
    now[0] += 30
    progress(10, True)
    now[0] += 90
    progress(10, True)
    said = capsys.readouterr().err
    # 20 took 120 s, so the 40 that are left take 240.
    assert "60 of 100 requests answered by every method, about 4 min left" in said
    assert said.count("min left") == said.count("requests answered") - is_terminal
    # A terminal has one line that overwrites itself; a log gets a line a minute at most.
    assert said.count("requests answered") == (3 if is_terminal else 1)


def test_the_rows_of_a_batch_run_share_its_wall_time():
    answers = [
        answered([1, 2, 3], 0.0, 1.0, 3.0, drafted=(3, 1), accepted=(2, 0)),
        answered([4], 2.0, 3.0, 3.0),
    ]
    got = rounds.measurement(answers, 3.2, [5, 6])
    assert got.rows == [[5, 3, 2, 4, 2, 1000, 2000, 2400], [6, 1, 0, 0, 0, 1000, 0, 800]]
    assert (got.drafted_at, got.accepted_at) == ([2, 1, 1], [1, 1, 0])
    assert rounds.joined(got, got).drafted_at == [4, 2, 2]
    one = rounds.measurement([answered([1], drafted=(1,), accepted=(1,))], 1.0, [0])
    assert rounds.joined(got, one).accepted_at == [2, 1, 0]


# Near ties


class FakeTarget:
    """Scores the last token of a prompt by a table."""

    def __init__(self, scores):
        self.scores = scores

    def run(self, requests, concurrency):
        answers = []
        for request in requests:
            assert request["score_from"] == len(request["prompt_token_ids"]) - 1
            answers.append({"scores": [self.scores[tuple(request["prompt_token_ids"])]]})
        return answers, 0.0


def judged(one, other, scores, bound=0.5):
    difference = exactness.first_difference([9, 9], one, other)
    found = exactness.gaps(FakeTarget(scores), [difference] if difference else [])
    return exactness.verdict([difference], found, bound)


def test_equal_answers_are_exact():
    assert judged([1, 2], [1, 2], {}) == {
        "num_answers": 1,
        "num_different": 0,
        "num_wider": 0,
        "largest_gap_nats": 0.0,
        "is_exact": True,
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "exact", "gap"),
    [
        ((-0.7, -0.7), (-0.9, -0.7), True, 0.2),
        ((-0.7, -0.7), (-1.3, -0.7), False, 0.6),
        # Both alike, and both far from what the target would have said.
        ((-3.0, -0.1), (-3.0, -0.1), False, 2.9),
        # Which of the two is the unlikely one doesn't matter.
        ((-1.3, -0.7), (-0.7, -0.7), False, 0.6),
        ((-0.7, -0.7), (float("nan"), -0.7), False, None),
    ],
)
def test_a_difference_is_judged_where_it_begins(ours, theirs, exact, gap):
    got = judged([1, 2, 3], [1, 5, 4], {(9, 9, 1, 2): ours, (9, 9, 1, 5): theirs})
    assert got["is_exact"] is exact
    assert got["num_different"] == 1 and got["num_wider"] == (not exact)
    assert got["largest_gap_nats"] == (gap if gap is None else pytest.approx(gap))


def test_an_answer_that_ends_early_is_never_a_tie():
    got = judged([1, 2], [1, 2, 3], {})
    assert got["largest_gap_nats"] is None and not got["is_exact"]


# Methods


def test_labels_come_from_the_settings():
    found = methods.chosen(["none", "aasd"], [{"aasd_verification": "strict", "aasd_top_k": 2}])
    assert found == {
        "none": None,
        "aasd": {"method": "aasd"},
        "aasd verification=strict top_k=2": {
            "method": "aasd",
            "aasd_verification": "strict",
            "aasd_top_k": 2,
        },
    }


def test_a_missing_package_stops_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    methods.require(["none", "ngram", "aasd"])
    with pytest.raises(methods.MissingPackage, match="pip install --no-deps arctic-inference==0.1.1"):
        methods.require(["none", "suffix"])


@pytest.mark.parametrize(
    ("config", "is_said"),
    [
        ({"method": "aasd"}, True),
        ({"method": "aasd", "aasd_prior": False}, False),
        ({"method": "ngram"}, False),
        (None, False),
    ],
)
def test_a_prior_that_is_missing_is_said_where_it_would_be_drafted_from(config, is_said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path / "cache"))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    chosen = {"some": config}
    assert not methods.has_prior(str(tmp_path), chosen)
    assert ("without a prior" in capsys.readouterr().err) == is_said
    path = prior_file.cache_path(model_key(str(tmp_path)))
    path.parent.mkdir()
    path.touch()
    assert methods.has_prior(str(tmp_path), chosen)
    assert not methods.has_prior(str(tmp_path / "nowhere"), {})
    assert capsys.readouterr().err == ""


# Scores


def scored(kind, text="", reference=None, token_ids=(), prompt=(), first=()):
    return scores.SCORES[kind](scores.Answer(prompt, token_ids, first, text, reference))


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("It was the U.S. Army.", "US army", 1.0),
        ("a cat, the dog", "dog", 1.0),
        ("yesterday", "yes", 0.0),
        ("No.", "yes", 0.0),
    ],
)
def test_an_answer_matches_as_words(text, reference, value):
    assert scored("answer", text, reference) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 400 + 600 = 1,000.", 1.0),
        ("1000.0 dollars", 1.0),
        ("1000, or 999", 0.0),
        ("none", 0.0),
        ("-1000", 0.0),
    ],
)
def test_the_last_number_counts(text, value):
    assert scored("last_number", text, "400+600=<<400+600=1000>>1000\n#### 1000") == value


def test_the_first_line_of_code_is_compared():
    assert scored("next_line", "```python\n# so\n\nreturn a\nreturn b", "return a") == 1.0
    assert scored("next_line", "", "return a") == 0.0
    # rapidfuzz.fuzz.ratio("kitten", "sitting") is 61.54: 4 letters of 6 and 7 stand in both in order.
    assert scored("next_line", "kitten", "sitting") == pytest.approx(0.61538, abs=1e-4)


def test_an_edit_is_compared_with_as_much_of_the_reference():
    assert scored("edit_similarity", "one TWO", "one TWO three TWO") == 1.0
    assert scored("edit_similarity", "one two", "one TWO three") == pytest.approx(2 * 4 / 14)


def test_copies_and_agreement_are_shares_of_tokens():
    prompt = list(range(20))
    assert scored("copied", token_ids=[*prompt[:8], 99, 98], prompt=prompt) == 0.8
    assert scored("copied", token_ids=[], prompt=prompt) == 0.0
    assert scored("rouge_l", token_ids=[1, 9, 2, 9], first=[1, 2]) == pytest.approx(2 / 3)


# Figures


def test_a_crossed_ratio_weighs_prompts_and_rounds():
    top, bottom = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])
    got = statistics.crossed_ratio(top, bottom, np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 2.0]]))
    assert got[0] == 10 / 4 and got[1] == 6 / 4 and np.isnan(got[2])


def test_the_interval_of_a_figure_that_cant_be_told_is_none():
    nothing = {"value": None, "low": None, "high": None}
    assert statistics.with_interval(np.array([np.nan, 1.0])) == nothing
    assert statistics.with_interval(np.array([1.0, np.nan])) == nothing | {"value": 1.0}


def made_up(speeds, num_prompts=6, num_rounds=3, seed=0):
    """A result in which each method's speed is known: `speeds[label][category]`, in tokens a second."""
    rng = np.random.default_rng(seed)
    runs = []
    for category in next(iter(speeds.values())):
        tokens = rng.integers(20, 90, num_prompts)
        for number in range(num_rounds):
            # What a round and a prompt cost is the same for all methods: it must cancel.
            slow = rng.uniform(0.5, 2.0) * rng.uniform(0.5, 2.0, num_prompts)
            for label, by_category in speeds.items():
                seconds = tokens * slow / by_category[category]
                rows = [
                    [
                        p,
                        int(tokens[p]),
                        10,
                        20,
                        5,
                        100.0,
                        900 * seconds[p],
                        1000 * seconds[p],
                    ]
                    + [1.0, 0.5]
                    for p in range(num_prompts)
                ]
                run = {"method": label, "category": category, "concurrency": 1, "round": number}
                run |= {
                    "seconds": float(seconds.sum()),
                    "drafted_at": [9, 4],
                    "accepted_at": [6, 1],
                    "rows": rows,
                }
                runs.append(run)
    columns = [*rounds.COLUMNS, "common_prefix", "score"]
    return {"methods": dict.fromkeys(speeds), "columns": columns, "runs": runs}


def test_ratios_are_paired_and_their_mean_is_geometric():
    result = made_up({"none": {"a": 50.0, "b": 80.0}, "fast": {"a": 100.0, "b": 160.0}})
    found = comparison.figures(result)["1"]
    for place in ("a", "b", comparison.MEAN):
        for name in ("tokens_per_s_ratio", "tpot_ratio"):
            # Every row is twice as fast, so nothing that a resample draws changes it.
            assert found[place]["fast"][name] == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0})
            assert found[place]["none"][name] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    uneven = comparison.figures(made_up({"none": {"a": 50.0, "b": 50.0}, "x": {"a": 200.0, "b": 25.0}}))["1"]
    assert uneven[comparison.MEAN]["x"]["tokens_per_s_ratio"]["value"] == pytest.approx(2**0.5)


def test_figures_of_a_category_known_answers():
    columns = [*rounds.COLUMNS, "common_prefix", "score"]
    runs = [
        {"seconds": 4.0, "drafted_at": [4, 2], "accepted_at": [3, 1], "round": 0}
        | {
            "rows": [
                [0, 11, 5, 6, 4, 200.0, 1000.0, 1600.0, 1.0, 1.0],
                [1, 1, 0, 0, 0, 350.0, 0.0, 2400.0, 0.5, 0.0],
            ]
        },
        {"seconds": 2.0, "drafted_at": [4], "accepted_at": [3], "round": 1}
        | {
            "rows": [
                [0, 11, 5, 4, 3, 100.0, 1000.0, 1000.0, 1.0, 1.0],
                [1, 1, 0, 0, 0, 320.0, 0.0, 1000.0, 1.0, 0.5],
            ]
        },
    ]
    got = comparison.category_figures(runs, columns)
    assert got["tokens_per_s"] == pytest.approx(24 / 6)
    assert got["ttft_ms"] == 260.0
    assert got["tpot_ms"] == pytest.approx(2000 / 20)
    assert got["in_flight"] == pytest.approx(2.97 / 6)
    assert got["mal"]["value"] == 2.0 and got["mal_per_question"]["value"] == 2.0
    assert got["drafted_per_step"] == 1.0 and got["acceptance_rate"] == pytest.approx(7 / 10)
    assert got["drafted_at"] == [8, 2] and got["accepted_at"] == [6, 1]
    assert got["equal"] == 0.75 and got["common_prefix"] == 0.875
    # Prompt 0 scored 1 in both rounds, prompt 1 in the mean 0.25.
    assert got["score"]["value"] == pytest.approx(0.625)


def test_the_first_token_does_not_count_for_tpot():
    result = made_up({"none": {"a": 50.0}, "short": {"a": 50.0}}, num_prompts=1, num_rounds=1)
    for run, tokens in zip(result["runs"], (11, 6), strict=True):
        run["rows"][0][1] = tokens
    # In the same time 10 tokens behind the first, and 5.
    assert comparison.figures(result)["1"]["a"]["short"]["tpot_ratio"]["value"] == pytest.approx(0.5)


def test_tokens_a_second_are_compared_at_the_same_length_of_answers():
    result = made_up({"none": {"a": 50.0}, "short": {"a": 50.0}}, num_prompts=1, num_rounds=1)
    for run, tokens in zip(result["runs"], (41, 11), strict=True):
        # 2 s of prefill, then 0.1 s a token, which is all the same by both.
        decode = 100.0 * (tokens - 1)
        run["rows"][0][1] = tokens
        run["rows"][0][5:8] = [2000.0, decode, 2000.0 + decode]
        run["seconds"] = (2000.0 + decode) / 1000
    found = comparison.figures(result)["1"]["a"]
    assert found["short"]["tokens_per_s"] < 0.6 * found["none"]["tokens_per_s"]
    assert found["short"]["tokens_per_s_ratio"]["value"] == pytest.approx(1.0)


def test_ratios_can_be_to_another_method():
    result = made_up({"none": {"a": 50.0}, "x": {"a": 100.0}, "y": {"a": 150.0}})
    found = comparison.figures(result, "x")["1"]["a"]
    assert [found[label]["tokens_per_s_ratio"]["value"] for label in result["methods"]] == pytest.approx(
        [0.5, 1.0, 1.5]
    )


def test_a_method_that_remembers_earlier_rounds_is_called_out():
    result = made_up({"none": {"a": 50.0}, "x": {"a": 100.0}})
    assert comparison.notes(result) == []
    steps_at = result["columns"].index("steps")
    for run in result["runs"]:
        if run["method"] == "x" and run["round"] == 2:
            for row in run["rows"]:
                row[steps_at] = 5
    (note,) = comparison.notes(result)
    assert note.startswith("NOTE: x had a MAL of ") and "remembers" in note


def test_a_batch_that_is_smaller_than_its_concurrency_is_called_out():
    result = made_up({"none": {"a": 50.0}})
    for run in result["runs"]:
        run["concurrency"] = 8
    (note,) = comparison.notes(result)
    assert note == "NOTE: a has 6 prompts, not the 8 that should have been in flight."


def test_ratio_intervals_cover_the_truth_about_as_often_as_they_say():
    # Speeds of a prompt and of a round vary for one method alone; truth 1. 200 trials of 12 prompts and 6
    # rounds: so few make the percentile bootstrap fall short of 95 %; under 0.80 something is wrong.
    covered = 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt_effect, round_effect = rng.normal(0, 0.2, (12, 1)), rng.normal(0, 0.05, (1, 6))
        seconds = np.exp(prompt_effect + round_effect - 0.2**2 / 2 - 0.05**2 / 2)
        drawn = statistics.crossed_ratio(
            seconds, np.ones_like(seconds), statistics.draws(12, rng), statistics.draws(6, rng)
        )
        figure = statistics.with_interval(drawn)
        covered += figure["low"] <= 1.0 <= figure["high"]
    assert 0.80 <= covered / 200 <= 0.99


# The report


CONDITIONS = {
    "model": "m",
    "dtype": "bfloat16",
    "eager": False,
    "temperature": 0.0,
    "max_tokens": 96,
    "max_prompt_tokens": 1500,
    "rounds": 3,
    "threads": 1,
    "core": 0,
    "prefix_caching": False,
}


def reported(exact=True):
    result = made_up({"none": {"a": 50.0}, "slow": {"a": 25.0}})
    verdict = {"num_answers": 18, "num_different": 2, "num_wider": 2 - 2 * exact, "largest_gap_nats": 0.25}
    return result | {
        "metadata": {
            "command": "python -m benchmarks.end_to_end",
            "time": "now",
            "commit": "c",
            "uncommitted_changes": False,
            "versions": {"vllm": "0.32"},
            "machine": {"cpu": "x", "cores": 2, "memory_gib": 8},
            "conditions": CONDITIONS,
        },
        "exactness": {"none": None, "slow": verdict | {"is_exact": exact}},
    }


def test_losing_rows_stay_and_the_tables_say_what_is_compared(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(reported()))
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--draw", str(path)])
    end_to_end.main()
    text = capsys.readouterr().out
    speeds = next(line for line in text.split("\n") if line.startswith("| a "))
    assert speeds.count("0.50 [0.50, 0.50]") == 2
    assert "| slow   | 0.67 | 0.25 |" in text
    assert "slow, tokens/s" in text and "| geometric mean" in text and "as a ratio to none" in text
    assert "1 thread(s) on core 0" in text and "2 of 18 part, 0 beyond a near tie; gaps of up to 0.25" in text


@pytest.mark.parametrize(
    "line",
    ["--methods none ngram aasd --concurrency 1 8 --out o", "--methods none,ngram,aasd --concurrency 1,8 --json o"],
)
def test_lists_stand_apart_by_spaces_or_commas(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["end_to_end", *line.split()])
    found = end_to_end._arguments()
    assert (found.methods, found.concurrency, found.limit) == (["none", "ngram", "aasd"], [1, 8], [8])
    assert found.out == pathlib.Path("o")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--methods none,ngra", "argument --methods: 'ngra' is not allowed: it takes none, ngram, suffix, aasd"),
        ("--concurrency 1,x", "argument --concurrency: x is not allowed: it takes an integer of at least 1"),
        ("--limit 0", "argument --limit: 0 is not allowed"),
    ],
)
def test_a_value_in_a_list_is_named_that_cannot_be(line, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["end_to_end", *line.split()])
    with pytest.raises(SystemExit):
        end_to_end._arguments()
    assert complaint in capsys.readouterr().err


def test_sampled_answers_are_not_said_to_be_exact():
    result = reported()
    result["metadata"]["conditions"] = CONDITIONS | {"temperature": 0.7}
    text = end_to_end_report.report(result)
    assert "exactness isn't checked" in text and "near tie" not in text


def test_no_figure_is_shown_of_a_run_that_isnt_exact(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["end_to_end"])
    monkeypatch.setattr(end_to_end, "compare", lambda arguments: reported(exact=False))
    with pytest.raises(SystemExit) as ended:
        end_to_end.main()
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert "NO FIGURES: slow isn't exact. 2 of 18 part, 2 beyond a near tie" in text
    assert "|" not in text
