"""The fuzzer for as long as is wanted (``make soak``): rounds of random requests and events on a real server.

    PYTHONPATH=tests/support python -m aasd_testing.fuzz.soak --minutes 60 --seed 1
    PYTHONPATH=tests/support python -m aasd_testing.fuzz.soak --replay .bench/fuzz/failure-server-1-7.json --shrink

A round is a case of its own, from the seed and its number; after it the server must be idle and hold nothing. A round
in which something isn't as it must be is written down as a case that ``--replay`` runs again, and ``--shrink`` makes
small. The report is written after every round, so an interrupted run has one too. Exit code 1 if anything was found.
"""

import argparse
import collections
import json
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aasd_testing.fuzz import cases
from aasd_testing.fuzz.observed import Finding, Observation, Reference, failures
from aasd_testing.fuzz.oracle import judge_case
from aasd_testing.fuzz.server import ServerError
from aasd_testing.fuzz.server_target import ROOT, ServerTarget, references
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
    report: dict[str, Any] = {"metadata": _metadata(arguments), "engines": {}}
    for profile, minutes in {"server": arguments.minutes, "server-lora": adapted}.items():
        if minutes > 0:
            soak(arguments, profile, minutes, report)
    failed = sum(engine["failures"] for engine in report["engines"].values())
    say(f"{arguments.out}: {failed or 'nothing'} found")
    sys.exit(int(failed > 0))


def soak(arguments: argparse.Namespace, profile: str, minutes: float, report: dict[str, Any]) -> None:
    """Run rounds on a server of a profile; the report gets its part after each."""
    pool = cases.questions(arguments.seed, profile, arguments.questions)
    adapters = adapters_of(arguments, profile)
    say(f"{profile}: asking {len(pool)} questions without speculation")
    known = references(arguments.model, profile, pool, adapters)
    tally, number, began = Tally(), 0, 0.0
    while not began or time.monotonic() - began < 60 * minutes:
        with ServerTarget(arguments.model, profile, adapters, arguments.mutant) as target:
            began = began or time.monotonic()
            while time.monotonic() - began < 60 * minutes:
                case = cases.generate(arguments.seed, number, profile, arguments.size, pool)
                seen, findings, look = run_round(target, case, known)
                tally.add(case, seen, findings, look)
                if failures(findings):
                    keep(arguments, case, findings).with_suffix(".log").write_text(target.log())
                passed = (time.monotonic() - began) / 60
                figures = {"minutes": round(passed, 2), **tally.result()}
                report["engines"][profile] = figures
                results.write(arguments.out, report)
                told = {name: figures[name] for name in ("requests", "compared", "failures", "near_ties")}
                say(f"{profile} round {number}, {passed:.1f} min: {told}, {tally.mib[-1:]} MiB")
                number += 1
                if not target.is_alive:
                    say("the server is dead; another is started")
                    tally.looks.append({})
                    break


def run_round(
    target: ServerTarget, case: cases.Case, known: Mapping[str, Reference]
) -> tuple[list, list[Finding], dict[str, Any]]:
    """Run a case and judge it; a server that has died is a finding."""
    seen: list = [None] * len(case["steps"])
    try:
        seen = target.run(case["steps"])
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
    kept = {**case, "findings": [finding._asdict() for finding in findings], "command": command}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    for finding in failures(findings)[:10]:
        say(f"FOUND {finding.what} at step {finding.step}: {finding.detail[:400]}")
    say(f"kept as {path}; again: {command}")
    return path


def replay(arguments: argparse.Namespace) -> int:
    """Run a case again, made small if that is asked; the exit code."""
    case = json.loads(arguments.replay.read_text())
    profile = case["profile"]
    adapters = adapters_of(arguments, profile)
    asked = [step for step in case["steps"] if step.get("compared")]
    known = references(arguments.model, profile, asked, adapters)
    started: list[ServerTarget] = []

    def fails(steps: list[cases.Step]) -> bool:
        if started and not started[0].is_alive:
            started.pop().__exit__(None, None, None)
        if not started:
            target = ServerTarget(arguments.model, profile, adapters, arguments.mutant)
            started.append(target.__enter__())
        findings = failures(run_round(started[0], {**case, "steps": steps}, known)[1])
        say(f"{len(steps)} steps: {findings[0] if findings else 'nothing'}")
        return bool(findings)

    try:
        failed = fails(case["steps"])
        if failed and arguments.shrink:
            path = arguments.replay.with_suffix(".small.json")
            path.write_text(json.dumps({**case, "steps": shrink(case["steps"], fails)}, indent=1) + "\n")
            say(f"the smallest that fails is {path}")
    finally:
        for target in started:
            target.__exit__(None, None, None)
    return int(failed)


def shrink(steps: list[cases.Step], fails: Callable[[list[cases.Step]], bool]) -> list[cases.Step]:
    """Leave out half of the steps, a quarter, ..., one, as long as what is left still fails."""
    size = len(steps)
    while size > 1:
        size = (size + 1) // 2
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            if fewer and fails(fewer):
                steps = fewer
            else:
                at += size
    return steps


class Tally:
    """Counts of rounds; `looks` are what the worker of each engine told last, `mib` its memory after each round."""

    def __init__(self) -> None:
        self.mib: list[float] = []
        self._counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.looks: list[dict[str, Any]] = [{}]

    def add(self, case: cases.Case, seen: Sequence[Observation | None], findings: list, look: dict[str, Any]) -> None:
        """Count a round, and keep what the worker told of itself after it."""
        counts = self._counts
        counts["findings"].update(finding.what for finding in findings)
        for step, one in zip(case["steps"], seen, strict=True):
            if step["do"] != "ask":
                counts["events"][step["do"]] += 1
            elif one is not None:
                tokens = sum(len(choice.token_ids or ()) for choice in one.choices)
                compared = step["compared"] and one.status == 200 and tokens > 0
                counts["requests_by_kind"][step["kind"]] += 1
                counts[""].update(requests=1, tokens=tokens, compared=compared, left=one.left)
                counts[""]["refused"] += one.status in (400, 404)
        if look:
            self.looks[-1] = look
            self.mib.append(round(look["mib"], 1))

    def result(self) -> dict[str, Any]:
        """Everything counted, as JSON has it."""
        found = self._counts["findings"]
        # vLLM's own counters, which end with each engine.
        totals = collections.Counter()
        for look in self.looks:
            metrics = look.get("metrics", {})
            for name in ("num_preemptions", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"):
                totals[name.removeprefix("spec_decode_num_")] += int(metrics.get(f"vllm:{name}_total", 0))
            totals["faults"] += sum(look.get("faults", {}).values())
        return {
            **self._counts[""],
            **totals,
            "failures": found.total() - found["near_tie"],
            "near_ties": found["near_tie"],
            "engines_lost": len(self.looks) - 1,
            "worker_mib": self.mib,
            **{name: dict(sorted(self._counts[name].items())) for name in ("findings", "requests_by_kind", "events")},
        }


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


def _metadata(arguments: argparse.Namespace) -> dict[str, Any]:
    conditions = results.conditions(arguments, "folder", "replay", "shrink")
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
    add("--questions", type=int, default=56, help="asked without speculation too (default %(default)s)")
    add("--size", type=int, default=80, help="steps of a round (default %(default)s)")
    add("--folder", type=pathlib.Path, default=ROOT / ".bench" / "fuzz", help="for failing cases and scratch files")
    add("--replay", type=pathlib.Path, metavar="FILE", help="only run a case again")
    add("--shrink", action="store_true", help="and make it small")
    add("--mutant", default="", help="of fuzz.hooks: break the product, to see that it is noticed")
    return parser.parse_args()


if __name__ == "__main__":
    # A server must end with us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except ServerError as error:
        sys.exit(f"error: {error}")
