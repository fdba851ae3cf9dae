"""Scores of answers to tasks with a right answer: maths, questions, summaries, and programs, which are run."""

import re
import resource
import string
import subprocess
import sys
import tempfile

from benchmarks.tasks import Task
from vllm_aasd.tuning import rouge_l

_SECONDS = 3
_BYTES = 1 << 30


def score(task: Task, text: str) -> float:
    """How good an answer to a task with a reference is, from 0 to 1.

    Maths: the last number is right. Summaries: ROUGE-L F1 of the words. Programs (HumanEval): they pass their tests.
    Others: the reference stands in the answer.
    """
    reference = task.reference or ""
    if task.category == "math_reasoning":
        return float(last_number(text, reference))
    if task.category == "summarization":
        return rouge_l(_normalized(text).split(), _normalized(reference).split())
    if task.category == "humaneval":
        return float(passes(f"{task.raw}\n{code_of(text)}\n{reference}"))
    return float(contains(text, reference))


def contains(text: str, reference: str) -> bool:
    """Whether the reference stands in the text: case, punctuation, articles and spaces apart (as in SQuAD)."""
    return f" {_normalized(reference)} " in f" {_normalized(text)} "


def last_number(text: str, reference: str) -> bool:
    """Whether the last number of the text is that of the reference (as in GSM8K)."""
    ours, theirs = (re.findall(r"-?\d[\d,]*(?:\.\d+)?", one) for one in (text, reference))
    number = lambda found: float(found[-1].replace(",", ""))
    return bool(ours and theirs) and number(ours) == number(theirs)


def code_of(text: str) -> str:
    """The first block of code in an answer, whether or not it has ended; without one, all of the answer."""
    found = re.search(r"```[a-z]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found[1] if found else text


def passes(program: str) -> bool:
    """Whether a program that a model wrote ends by itself without an error.

    It runs in a process of its own with an empty environment, in a folder that is deleted, with at most 3 seconds of
    CPU, 1 GiB of memory, no child processes (unless run by root) and no file above 1 MiB. That contains mistakes, not
    malice: it has the user's rights and network.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * _SECONDS,
                preexec_fn=_limit,
            )
        except (subprocess.TimeoutExpired, ValueError):  # a program with a null byte is none
            return False
    return done.returncode == 0


def _limit() -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_AS, _BYTES),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _normalized(text: str) -> str:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))
