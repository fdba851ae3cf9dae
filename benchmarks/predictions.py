"""Edits with a prediction: how fast a model rewrites code when its client expects most lines to stay.

    python -m benchmarks.predictions --model MODEL --limit 6

Each task shows the model a piece of Python's own library, and asks for the same code with one name replaced, one that
stands in about a tenth of its lines. Every task is answered without speculation, by aasd (strict, without memory), by
aasd with the unchanged code as its prediction, and with the code of another task, which is of no use. They take turns,
one request at a time; the answers are compared as in `benchmarks.end_to_end`.
"""

import contextlib
import io
import itertools
import keyword
import re
import sys
import tokenize as python_tokens
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import exactness, methods, results
from benchmarks.builtin import LIBRARY
from benchmarks.engine import Engine, EngineError
from benchmarks.tasks import Task, load_tokenizer, tokenize
from vllm_aasd.tuning import stratified_ratio

_MIN_CHARS, _MAX_CHARS = 1200, 2400
_SHARE_OF_LINES = (0.07, 0.15)
SETTINGS = {"method": "aasd", "aasd_verification": "strict", "aasd_memory": "off"}
CASES = ("none", "aasd", "aasd, prediction", "aasd, unrelated prediction")


class Edit(NamedTuple):
    """A task: some code, and the name in it that is to be replaced."""

    code: str
    name: str

    def question(self) -> str:
        """What the model is asked."""
        return (
            f"Rename `{self.name}` to `new_{self.name}` everywhere in this code, and change nothing else. "
            f"Answer with all of the code.\n\n```python\n{self.code}```"
        )

    def prediction(self) -> str:
        """What a client would expect, having nothing but the code."""
        return f"```python\n{self.code}```"


def edits() -> Iterator[Edit]:
    """Tasks from the library's modules, one of each at most."""
    for path in sorted(LIBRARY.glob("[a-z]*.py")):
        # Whole definitions, up to the largest size.
        parts = re.split(r"(?m)^(?=(?:def|class) )", path.read_text())[1:]
        for part in parts:
            name = _name_to_replace(part) if _MIN_CHARS <= len(part) <= _MAX_CHARS else None
            if name is not None:
                yield Edit(part.rstrip() + "\n", name)
                break


def _name_to_replace(code: str) -> str | None:
    """A name that stands in about a tenth of the lines; None if there is none."""
    num_lines = code.count("\n")
    lines: dict[str, set[int]] = {}
    with contextlib.suppress(python_tokens.TokenError, IndentationError):
        for token in python_tokens.generate_tokens(io.StringIO(code).readline):
            if token.type == python_tokens.NAME and not keyword.iskeyword(token.string):
                lines.setdefault(token.string, set()).add(token.start[0])
    low, high = _SHARE_OF_LINES
    shares = Counter({name: len(of) for name, of in lines.items() if low <= len(of) / num_lines <= high})
    return shares.most_common(1)[0][0] if shares else None


def measure(engines: dict[str, Engine], tasks: Sequence[Edit], prompts: Sequence[list[int]], max_tokens: int) -> dict:
    """By case, the answers to every task in turn; see `Engine.run`."""
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for number, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        predictions = {CASES[2]: task.prediction(), CASES[3]: tasks[number - 1].prediction()}
        for case in itertools.islice(itertools.cycle(CASES), number, number + len(CASES)):
            options = {"extra_args": {"aasd_prediction": predictions[case]}} if case in predictions else {}
            sampling = {"temperature": 0.0, "max_tokens": max_tokens, **options}
            engine = engines["none" if case == "none" else "aasd"]
            answers, _ = engine.run([{"prompt_token_ids": prompt, "sampling": sampling}])
            found[case] += answers
        print(f"{number + 1} of {len(tasks)} tasks", file=sys.stderr, flush=True)
    return found


def figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By case: tokens per step, and how many times as fast as each other case it is per output token."""
    groups = ["edit"] * len(found["none"])
    emitted = {case: [len(one["token_ids"]) - 1 for one in of] for case, of in found.items()}
    seconds = {case: [one["last_token"] - one["first_token"] for one in of] for case, of in found.items()}
    return {
        case: {
            "tokens_per_step": sum(emitted[case]) / sum(one["steps"] - 1 for one in of),
            "speed_over": {
                other: stratified_ratio(emitted[case], seconds[case], groups, (emitted[other], seconds[other]))
                for other in CASES
                if other != case
            },
        }
        for case, of in found.items()
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [
        [
            case,
            results.number(of["tokens_per_step"]),
            *(results.interval(of["speed_over"].get(other)) for other in CASES[:2]),
        ]
        for case, of in result["figures"].items()
    ]
    return results.table(["case", "tokens per step", "over none", "over aasd without a prediction"], rows)


def main() -> None:
    """Measure, write the result, print it."""
    parser = results.arguments(__doc__, "predictions.json")
    results.add_model_argument(parser)
    parser.add_argument("--limit", type=int, default=8, help="tasks (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=700, help="per answer (default %(default)s)")
    parser.add_argument("--dtype", choices=methods.NEAR_TIE, default="bfloat16", help="default %(default)s")
    parser.add_argument("--core", type=int, help="the only CPU core that the engines may use")
    arguments = parser.parse_args()
    results.require_model(arguments)
    tasks = list(itertools.islice(edits(), arguments.limit))
    questions = [Task(str(number), "edit", task.question()) for number, task in enumerate(tasks)]
    prompts = tokenize(load_tokenizer(arguments.model), questions, 2000)
    options = {"model": arguments.model, "dtype": arguments.dtype, "max_model_len": 3000, "max_num_seqs": 2}
    options |= {"distributed_executor_backend": "uni"}
    try:
        with (
            Engine("none", options, arguments.core) as none,
            Engine("aasd", options | {"speculative_config": SETTINGS}, arguments.core) as aasd,
        ):
            engines = {"none": none, "aasd": aasd}
            # What is compiled or allocated at first isn't measured.
            measure(engines, tasks[-1:], prompts[-1:], 32)
            found = measure(engines, tasks, prompts, arguments.max_tokens)
            verdicts = exactness.verdicts(none, prompts, found, methods.NEAR_TIE[arguments.dtype])
    except EngineError as error:
        sys.exit(f"error: {error}")
    if exactness.failed(verdicts):
        sys.exit(f"no figures, nothing written: not exact: {verdicts}")
    result = {"metadata": results.metadata(**results.conditions(arguments)), "exactness": verdicts}
    result["figures"] = figures(found)
    result = results.rounded(result)
    results.write(arguments.out, result)
    print(f"{results.heading(result)}\n\n{table(result)}\n\nExactness: {verdicts}")


if __name__ == "__main__":
    main()
