"""The fuzzer for as long as is wanted (``make soak``): rounds of random requests and events on a real server.

    PYTHONPATH=tests/support python -m aasd_testing.fuzz.soak --minutes 60 --seed 1
    PYTHONPATH=tests/support python -m aasd_testing.fuzz.soak --replay .bench/fuzz/failure-1-7.json --shrink

A round is a case of its own, from the seed and its number; after it the server must be idle and hold nothing. A round
in which something isn't as it must be is written down as a case that ``--replay`` runs again, and ``--shrink`` makes
small. The report is written after every round, so an interrupted run has one too. Exit code 1 if anything was found.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from aasd_testing.fuzz import cases, references
from aasd_testing.fuzz.judging import judge_case
from aasd_testing.fuzz.oracle import Finding, Reference
from aasd_testing.fuzz.server_target import ROOT, ServerError, ServerTarget
from aasd_testing.fuzz.shrink import shrink
from aasd_testing.fuzz.tally import Tally, has_failed
from aasd_testing.tiny_models import lora_adapter

# The root only for this import: it also holds `kernels`, a name that transformers looks for.
sys.path.append(str(ROOT))
from benchmarks import results

sys.path.remove(str(ROOT))


def main() -> None:
    """Run, or replay; see the module's text."""
    arguments = _arguments()
    results.require_model(arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.replay:
        sys.exit(replay(arguments))
    adapted = arguments.minutes / 4 if arguments.lora_minutes is None else arguments.lora_minutes
    parts = {"server": arguments.minutes, "server-lora": adapted}
    report: dict[str, Any] = {"metadata": _metadata(arguments), "engines": {}}
    for profile, minutes in parts.items():
        if minutes > 0:
            soak(arguments, profile, minutes, report)
    failed = sum(engine["failures"] for engine in report["engines"].values())
    say(f"{arguments.out}: {'nothing' if not failed else failed} found")
    sys.exit(int(failed > 0))


def soak(arguments: argparse.Namespace, profile: str, minutes: float, report: dict[str, Any]) -> None:
    """Run rounds on a server of a profile; the report gets its part after each."""
    pool = cases.questions(arguments.seed, profile, arguments.questions)
    adapters = adapters_of(arguments, profile)
    say(f"{profile}: asking {len(pool)} questions without speculation")
    known = references.references(arguments.model, profile, pool, arguments.folder, adapters)
    tally, number, began = Tally(), 0, 0.0
    while not began or time.monotonic() - began < 60 * minutes:
        with ServerTarget(arguments.model, profile, adapters, arguments.mutant, _starting()) as target:
            began = began or time.monotonic()
            while time.monotonic() - began < 60 * minutes:
                case = cases.generate(arguments.seed, number, profile, arguments.size, pool)
                seen, findings, look = run_round(target, case, known)
                tally.add(case, seen, findings, look, (time.monotonic() - began) / 60)
                if has_failed(findings):
                    keep(arguments, case, findings).with_suffix(".log").write_text(target.log())
                report["engines"][profile] = {"minutes": round((time.monotonic() - began) / 60, 2), **tally.result()}
                results.write(arguments.out, report)
                say(_line(profile, number, report["engines"][profile]))
                number += 1
                if not target.is_alive:
                    say("the server is dead; another is started")
                    tally.restarted()
                    break


def run_round(
    target: ServerTarget, case: cases.Case, known: Mapping[str, Reference]
) -> tuple[list, list[Finding], dict[str, Any]]:
    """Run a case and judge it; a server that has died is a finding."""
    seen: list = [None] * len(case["steps"])
    try:
        seen = target.run(case)
        findings = judge_case(case, seen, known, target.prompts)
        quiet, look = target.settle()
    except Exception as error:
        # Whatever it is: the round's case is what matters, and it is kept.
        return seen, [Finding("dead", None, f"{type(error).__name__}: {error}")], {}
    return seen, findings + quiet, look


def keep(arguments: argparse.Namespace, case: cases.Case, findings: list[Finding]) -> pathlib.Path:
    """Write a failing case down, with what was found and the command that runs it again."""
    path = arguments.folder / f"failure-{case['profile']}-{case['seed']}-{case['round']}.json"
    command = f"PYTHONPATH=tests/support .venv/bin/python -m aasd_testing.fuzz.soak --replay {path} --shrink"
    command += f" --mutant {arguments.mutant}" if arguments.mutant else ""
    kept = {**case, "findings": [finding._asdict() for finding in findings], "command": command}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    for finding in findings[:10]:
        say(f"FOUND {finding.what} at step {finding.step}: {finding.detail}")
    say(f"kept as {path}; again: {command}")
    return path


def replay(arguments: argparse.Namespace) -> int:
    """Run a case again, made small if that is asked; the exit code."""
    case = json.loads(arguments.replay.read_text())
    case = {name: case[name] for name in ("seed", "round", "profile", "steps")}
    adapters = adapters_of(arguments, case["profile"])
    known = references.references(arguments.model, case["profile"], cases.compared(case), arguments.folder, adapters)
    started: list[ServerTarget] = []

    def stop() -> None:
        while started:
            started.pop().__exit__(None, None, None)

    def found(trial: cases.Case) -> list[Finding]:
        if started and not started[0].is_alive:
            stop()
        if not started:
            started.append(
                ServerTarget(arguments.model, case["profile"], adapters, arguments.mutant, _starting()).__enter__()
            )
        return run_round(started[0], trial, known)[1]

    def fails(trial: cases.Case) -> bool:
        # What depends on timing doesn't come every time.
        for _ in range(arguments.repeats):
            findings = found(trial)
            if has_failed(findings):
                say(f"{len(trial['steps'])} steps: {findings[0].what}, {findings[0].detail[:100]}")
                return True
        say(f"{len(trial['steps'])} steps: nothing")
        return False

    try:
        if not fails(case):
            say("nothing found")
            return 0
        if arguments.shrink:
            case, trials = shrink(case, fails, arguments.trials)
            stop()
            findings = found(case)
            path = arguments.replay.with_suffix(".small.json")
            kept = {**case, "findings": [finding._asdict() for finding in findings]}
            path.write_text(json.dumps(kept, indent=1) + "\n")
            say(
                f"{len(case['steps'])} steps after {trials} trials, in {path}; on a new server it finds {len(findings)}"
            )
    finally:
        stop()
    return 1


def adapters_of(arguments: argparse.Namespace, profile: str) -> dict[str, str]:
    """Paths of random adapters by name, for a profile that has some; no two are alike."""
    found = {}
    for seed, name in enumerate(cases.ADAPTERS if "lora" in profile else ()):
        path = arguments.folder / name
        found[name] = str(path) if path.exists() else lora_adapter(path, arguments.model, seed=seed)
    return found


def say(text: str) -> None:
    """Tell of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _starting() -> Callable[[str], None]:
    """Tells what a server says as it starts, each line once."""
    said: set[str] = set()

    def progress(text: str) -> None:
        words = text.partition(": ")[2]
        if words and words not in said:
            said.add(words)
            say(text[:120])

    return progress


def _line(profile: str, number: int, figures: dict[str, Any]) -> str:
    return (
        f"{profile} round {number}, {figures['minutes']:.1f} min: {figures['requests']} requests, "
        f"{figures['compared']} compared, {figures['mismatches']} mismatches, {figures['near_ties']} near ties, "
        f"{figures['failures']} failures, {figures['preemptions']} preemptions, "
        f"{sum(figures['faults_injected'].values())} faults, {figures['memory'].get('last_worker_mib')} MiB"
    )


def _metadata(arguments: argparse.Namespace) -> dict[str, Any]:
    conditions = results.conditions(arguments, "folder", "replay", "shrink", "repeats", "trials")
    found = results.metadata(**conditions, omp_num_threads=os.environ.get("OMP_NUM_THREADS"))
    words = ["python", "-m", "aasd_testing.fuzz.soak", *map(results.shortened, sys.argv[1:])]
    return {**found, "command": f"PYTHONPATH=tests/support {shlex.join(words)}"}


def _arguments() -> argparse.Namespace:
    parser = results.arguments(__doc__, out="soak.json")
    results.add_model_argument(parser)
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, help="of the server without adapters (default %(default)s)")
    add("--lora-minutes", type=float, help="of the one with adapters, afterwards (default: a quarter of --minutes)")
    add("--seed", type=int, default=1, help="of questions and rounds (default %(default)s)")
    add("--questions", type=int, default=51, help="asked without speculation too (default %(default)s)")
    add("--size", type=int, default=80, help="steps of a round (default %(default)s)")
    add("--folder", type=pathlib.Path, default=ROOT / ".bench" / "fuzz", help="for failing cases and scratch files")
    add("--replay", type=pathlib.Path, metavar="FILE", help="only run a case again")
    add("--shrink", action="store_true", help="and make it small")
    add("--repeats", type=int, default=1, help="how often a case is run to see it fail (default %(default)s)")
    add("--trials", type=int, default=120, help="of shrinking, at most (default %(default)s)")
    add("--mutant", default="", help="of fuzz.mutants: break the product, to see that it is noticed")
    return parser.parse_args()


if __name__ == "__main__":
    # A server must end with us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except ServerError as error:
        sys.exit(f"error: {error}")
