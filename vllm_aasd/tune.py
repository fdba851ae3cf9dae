"""Find the verification that is fastest on your own prompts and does no more to the answers than you allow.

    python -m vllm_aasd.tune --model MODEL --prompts FILE ... [--limit 32] [--max-tokens 128] [--rounds 2]
                             [--settings JSON ...] [--min-agreement 0.9] [--max-copied 0.02] [--max-repeated 0.02]
                             [--json OUT] [--plot OUT.svg] [arguments of vLLM's engine]

A FILE holds one JSON object a line: ``prompt``, or ``messages`` as of the OpenAI API, perhaps with a ``reference`` that
the answer is to hold and a ``category``; or Spec-Bench's or HotpotQA's format. One engine answers all prompts under
every setting in turn, each request bringing its setting as a request's own options; so the settings are compared on
the same machine, at the same load, within seconds of each other. Greedy throughout: what sampled requests get is strict
unless ``aasd_relax_sampling`` says otherwise.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_aasd.tuning import figures, report
from vllm_aasd.tuning.candidates import DEFAULTS, OFF, STRICT, Candidate, candidates, parsed
from vllm_aasd.tuning.json_lines import DataError
from vllm_aasd.tuning.prompts import tokenise
from vllm_aasd.tuning.scores import score
from vllm_aasd.tuning.tasks import Task, by_category, read_tasks


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with a message, where the prompts or the arguments are of no use.
    """
    parser = argument_parser()
    ours, engine_arguments = parser.parse_known_args(arguments)
    try:
        result = compare(ours, engine_arguments)
        if ours.json is not None:
            ours.json.write_text(json.dumps(result, indent=1) + "\n")
        if ours.plot is not None:
            report.figure(result).savefig(ours.plot)
    except (DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}; --plot needs matplotlib: pip install vllm-aasd[bench]")
    print(summary(result))


def argument_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_aasd.tune",
        description="Measure verification settings on your own prompts, speed against damage.",
        epilog="All other arguments are those of vLLM's engine, such as --max-num-seqs 32 (how many requests at once).",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="path or name of the target model")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help="one JSON object a line")
    parser.add_argument("--limit", type=_number(int, 1), default=32, help="prompts of each category (default: 32)")
    parser.add_argument("--max-tokens", type=_number(int, 2), default=128, help="of an answer (default: 128)")
    parser.add_argument("--rounds", type=_number(int, 1), default=2, help="how often each is timed (default: 2)")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=_options,
        default=DEFAULTS,
        metavar="JSON",
        help="settings to compare beside strict, as a request would bring them",
    )
    parser.add_argument(
        "--drafting",
        type=_options,
        default={},
        metavar="JSON",
        help="further keys of --speculative-config, for all rows",
    )
    parser.add_argument(
        "--temperature", type=_number(float, 0), default=0.7, help="of the row of plain sampling; 0 for none"
    )
    parser.add_argument("--top-p", type=_number(float, 0, 1), default=0.9, help="of that row")
    parser.add_argument(
        "--min-agreement", type=_number(float, 0, 1), default=0.9, help="bound: least ROUGE-L to no speculation"
    )
    for name, what in (("copied", "tokens copied from the prompt"), ("repeated", "runs repeated")):
        parser.add_argument(
            f"--max-{name}",
            type=_number(float, 0, 1),
            default=0.02,
            help=f"bound: more {what}, as a share (default: 0.02)",
        )
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for all figures")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="SVG or PNG file for the plot")
    return parser


def compare(ours: argparse.Namespace, engine_arguments: list[str]) -> dict[str, Any]:
    """Measure.

    Args:
        ours: as from `argument_parser`.
        engine_arguments: vLLM's own.

    Returns:
        ``runs``: by name, the figures (see `vllm_aasd.tuning.figures.figures`), the options, what exceeds the bounds, and
        ``rows``, one per prompt; ``recommended``: the name of one of them; and the bounds.

    Raises:
        DataError: the prompts can't be read.
        ValueError: a setting isn't allowed.
    """
    compared = candidates(ours.settings, ours.temperature, ours.top_p)
    read = [task for path in ours.prompts for task in read_tasks(path)]
    tasks = [task for members in by_category(read, ours.limit, None).values() for task in members]

    # Here, so that --help and bad arguments don't wait for vLLM.
    from vllm_aasd.engine import trial

    engine = trial.Trial(trial.engine_arguments(ours.model, engine_arguments, ours.drafting))
    # One more, for the engine says something of its own where answers are scored.
    prompts = tokenise(engine.tokenizer, tasks, engine.max_model_len - ours.max_tokens - 1)
    answers, accepted = _timed(engine, compared, prompts, ours.max_tokens, ours.rounds)
    rows = _judged(engine, tasks, prompts, answers)
    bounds = figures.Bounds(ours.min_agreement, ours.max_copied, ours.max_repeated)
    groups = [task.category for task in tasks]
    found = {
        name: figures.figures(rows[name], rows[OFF], rows[STRICT], accepted[name] // ours.rounds, groups)
        for name in rows
    }
    over = {name: figures.excess(found[name], found[OFF], bounds) for name in found}
    allowed = [one.name for one in compared if one.is_offered and not over[one.name]]
    return {
        "bounds": bounds._asdict(),
        "recommended": figures.fastest(found, allowed, STRICT),
        "runs": {
            one.name: {"options": one.options, **found[one.name], "exceeds": over[one.name], "rows": rows[one.name]}
            for one in compared
        },
    }


def summary(result: dict[str, Any]) -> str:
    """The table, and the configuration to take."""
    chosen = result["recommended"]
    bounds = result["bounds"]
    lines = [report.table(result), ""]
    for name, run in result["runs"].items():
        if run["exceeds"] and name != OFF:
            lines.append(f"{name}: exceeds the bounds in {', '.join(run['exceeds'])}")
    lines.append(
        f"Fastest within the bounds (agreement at least {bounds['agreement']:g}, copied at most {bounds['copied']:g} and "
        f"repeated at most {bounds['repeated']:g} more than without speculation, no lower score beyond noise): {chosen}."
    )
    if chosen == STRICT:
        lines.append("No relaxed setting within them is faster than strict beyond the noise.")
    lines.append(f"--speculative-config '{json.dumps({'method': 'aasd', **result['runs'][chosen]['options']})}'")
    return "\n".join(lines)


def _timed(
    engine: Any, compared: Sequence[Candidate], prompts: list[list[int]], max_tokens: int, rounds: int
) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Each one's answers of the first round, with the seconds of all, and how many draft tokens were accepted in all."""
    # Fills the prefix cache, and compiles what is compiled late.
    engine.answer(prompts, max_tokens, compared[0].options, {})
    answers: dict[str, list[Any]] = {}
    accepted = {one.name: 0 for one in compared}
    began = time.monotonic()
    for number in range(rounds):
        # Another order in each round, so that no one always comes behind the same.
        for done, one in enumerate(compared[::-1] if number % 2 else compared):
            found, count = engine.answer(prompts, max_tokens, one.options, one.sampling)
            accepted[one.name] += count
            before = answers.get(one.name, [answer._replace(decode_seconds=0.0) for answer in found])
            answers[one.name] = [
                first._replace(decode_seconds=first.decode_seconds + answer.decode_seconds / rounds)
                for first, answer in zip(before, found, strict=True)
            ]
            share = (number * len(compared) + done + 1) / (rounds * len(compared))
            left = (time.monotonic() - began) * (1 / share - 1)
            print(f"round {number + 1} of {rounds}: {one.name} done, {left:.0f} s left", file=sys.stderr, flush=True)
    return answers, accepted


def _judged(
    engine: Any, tasks: Sequence[Task], prompts: Sequence[list[int]], answers: dict[str, list[Any]]
) -> dict[str, list[dict[str, Any]]]:
    """By name and prompt, what an answer comes to."""
    # Many settings give the same answers.
    places = dict.fromkeys((index, *answer.token_ids) for run in answers.values() for index, answer in enumerate(run))
    scored = dict(zip(places, engine.score([(prompts[index], list(ids)) for index, *ids in places]), strict=True))
    rows = {}
    for name, run in answers.items():
        rows[name] = []
        for index, (task, prompt, answer, off) in enumerate(zip(tasks, prompts, run, answers[OFF], strict=True)):
            parts = {
                "prompt": prompt,
                "token_ids": answer.token_ids,
                "first": off.token_ids,
                "reference": task.reference,
            }
            # Without a reference a score holds an answer against the first one, as agreement does.
            task_score = score(task.score if task.reference is not None else None, engine.tokenizer, **parts)
            judged = scored[index, *answer.token_ids]
            judged_row = figures.row(prompt, answer.token_ids, off.token_ids, answer.decode_seconds, judged, task_score)
            rows[name].append({"task": task.task_id, "category": task.category, **judged_row})
    return rows


def _options(text: str) -> dict[str, Any]:
    try:
        return parsed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(kind: type, low: float, high: float = float("inf")) -> Any:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            words = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it takes a number {words}")
        return value

    return read


if __name__ == "__main__":
    main()
