"""What is asked: data files, the tasks that ship with Python, prompts, and the scores of answers."""

import gzip
import itertools
import json
import re

import pytest

from benchmarks import builtin, scores, tasks
from benchmarks.fitting_tasks import fitting_tasks


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_the_three_formats_are_read_from_one_file(tmp_path):
    context = [{"title": "A", "text": "a b. "}, ["B", ["c. ", "d."]]]
    path = write_lines(
        tmp_path / "mine.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 5, "category": "math_reasoning", "turns": ["1 + 1?"], "reference": ["#### 2"]},
        {"question_id": 6, "category": "qa", "turns": ["Who?"], "reference": ["Me"]},
        {"id": "h1", "question": "Who?", "answer": "Me", "context": context},
        {"prompt": "Go on."},
        {"prompt": "And on.", "category": "other", "id": 7, "reference": "on"},
    )
    text = "Answer the question based on the given passages.\n\nA\na b.\n\nB\nc. d.\n\nQuestion: Who?"
    assert tasks.read_tasks(path) == [
        tasks.Task("writing/81", "mt_bench", "Write."),
        tasks.Task("5", "math_reasoning", "1 + 1?", None, "#### 2"),
        tasks.Task("6", "qa", "Who?"),
        tasks.Task("h1", "hotpotqa", text, f"{text}\nAnswer:", "Me"),
        tasks.Task("5", "mine", "Go on.", "Go on."),
        tasks.Task("7", "other", "And on.", "And on.", "on"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"{not json}",
        b"[1, 2]",
        b'{"question_id": 1, "category": "qa", "turns": ["  "]}',
        b'{"question": "Who?", "answer": "Me", "context": [{"title": "A"}]}',
        b'{"prompt": 3}',
        b'{"prompt": "\xff\xfe"}',
    ],
)
def test_a_malformed_line_is_named_with_its_file_and_number(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"q\.jsonl:3: not a task"):
        tasks.read_tasks(path)
    with pytest.raises(ValueError, match="no tasks"):
        tasks.read_tasks(write_lines(tmp_path / "empty.jsonl"))


def test_kinds_of_a_category_are_taken_in_turn_and_an_unknown_category_is_named():
    found = [tasks.Task(f"{kind}/{i}", "mt_bench", "") for kind in ("a", "b") for i in range(3)]
    chosen = tasks.by_category([*found, tasks.Task("1", "qa", "")], 4, ["mt_bench"])
    assert [task.task_id for task in chosen.pop("mt_bench")] == ["a/0", "b/0", "a/1", "b/1"] and not chosen
    with pytest.raises(ValueError, match="no task of category 'x'; there are: mt_bench"):
        tasks.by_category(found, 3, ["x"])


def test_every_turn_of_an_agent_quotes_the_edits_of_those_before():
    session = list(itertools.islice(builtin.agent(), 20))
    assert [task.task_id.rpartition(":")[2] for task in session] == [str(turn) for turn in range(1, 11)] * 2
    for before, after in itertools.pairwise(session[:10]):
        name = re.findall("rename `(.*?)`", before.text)[-1]
        code = before.text.rpartition("```python\n")[2].partition("```")[0]
        assert after.text.startswith(before.text) and re.search(rf"\b{name}\b", code)
        assert re.sub(rf"\b{name}\b", f"new_{name}", code) in after.text[len(before.text) :]


def test_halves_hold_every_task_once():
    given = {name: [tasks.Task(f"{name}{number}", name, "x") for number in range(5)] for name in "ab"}
    found = tasks.halves(given)
    assert {name: len(of) for name, of in found.items()} == {"first half": 5, "last half": 5}
    assert sorted(itertools.chain(*found.values())) == sorted(itertools.chain(*given.values()))
    assert found == tasks.halves(given)
    assert {task.category for task in found["first half"]} == {"a", "b"}


def test_builtin_tasks_are_the_same_each_time_and_nothing_is_fitted_on_them():
    found = tasks.by_category(builtin.builtin_tasks(), 10**6)
    assert set(found) == {"code_infile", "code_crossfile", "quote", "edit"}
    assert min(map(len, found.values())) >= 20
    assert found == tasks.by_category(builtin.builtin_tasks(), 10**6)
    for task in found["code_infile"]:
        name, _, number = task.task_id.rpartition(":")
        lines = (builtin.LIBRARY / name).read_text().split("\n")
        assert task.raw.split("\n")[-4:-1] == lines[int(number) - 4 : int(number) - 1], "the file up to that line"
    measured = {task.text for of in found.values() for task in of[:32]}
    fitted = {task.text for task in fitting_tasks()}
    assert len(fitted) == 140 and not measured & fitted


class WordTokenizer:
    """A token per word; a chat template of two tokens before and one after."""

    chat_template = "there is one"

    def __init__(self):
        self.words = []

    def encode(self, text, add_special_tokens=True):
        self.words += [word for word in dict.fromkeys(text.split()) if word not in self.words]
        return ([1000] if add_special_tokens else []) + [self.words.index(word) for word in text.split()]

    def decode(self, token_ids):
        return "".join(f"{self.words[token]} " for token in token_ids)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return [-1, -2, *self.encode(messages[0]["content"], add_special_tokens=False), -3]


def test_a_long_prompt_loses_its_middle_and_keeps_its_frame():
    tokenizer = WordTokenizer()
    task = tasks.Task("1", "a", " ".join(f"w{i}" for i in range(20)))
    assert tasks.tokenize(tokenizer, [task], 23) == [[-1, -2, *range(20), -3]]
    assert tasks.tokenize(tokenizer, [task], 10) == [[-1, -2, 0, 1, 2, 3, 17, 18, 19, -3]]
    with pytest.raises(ValueError, match="an empty prompt has 3 tokens, more than the 2 allowed"):
        tasks.tokenize(tokenizer, [task], 2)
    tokenizer.chat_template = None
    assert tasks.tokenize(tokenizer, [tasks.Task("1", "a", "please", "w1")], 9) == [[1000, 1]]


def test_scores():
    assert scores.contains("It was The  Cat, surely.", "the cat") and not scores.contains("concatenated", "cat")
    assert scores.last_number("First 3, so $1,200.50", "#### 1200.5")
    assert not scores.last_number("it is 4, not 5", "4") and not scores.last_number("none", "4")
    summary = tasks.Task("1", "summarization", "...", reference="The cat sat, quietly.")
    assert scores.score(summary, "a cat sat") == pytest.approx(2 * 2 / (2 + 3))


def test_a_program_is_run_within_limits(tmp_path):
    line = {"task_id": "H/0", "prompt": 'def two():\n    """2"""\n', "entry_point": "two"}
    line["test"] = "def check(candidate):\n    assert candidate() == 2"
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(line).encode()))
    (task,) = tasks.read_tasks(path)
    for right in ("```python\ndef two():\n    return 2\n```\nIt returns 2.", "    return 1 + 1"):
        assert scores.score(task, right) == 1
    spoiling = "    import os\n    os.environ['HOME']\n    return 2"
    endless, huge = "    while True: pass", "    x = bytearray(2 << 30)\n    return 2"
    for wrong in ("```python\ndef two():\n    return 3", "no code", "    return 2\x00", spoiling, endless, huge):
        assert scores.score(task, wrong) == 0
