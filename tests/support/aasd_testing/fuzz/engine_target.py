"""Cases against an engine in a process of its own: the V1 model runner, or V2 with its kernels interpreted."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from aasd_testing.fuzz.cases import Case
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.fuzz.observed import Choice, Observation
from aasd_testing.fuzz.oracle import Finding
from aasd_testing.fuzz.server_target import tracebacks

_PROCESS = pathlib.Path(__file__).with_name("engine_process.py")

Run = tuple[list[Observation | None], list[Finding], dict[str, Any]]


def run_cases(
    model: str, profile: str, cases: Sequence[Case], folder: pathlib.Path, mutant: str = "", timeout: float = 3000.0
) -> list[Run]:
    """Run cases one after the other on one engine.

    Args:
        model: path of the checkpoint.
        profile: ``v1`` or ``v2``.
        cases: of that profile.
        folder: for the process's answer.
        mutant: of `mutants.MUTANTS`.
        timeout: seconds.

    Returns:
        Of each case: what became of its requests, what isn't as it must be of the engine then, and what the worker
        told of itself. An engine that dies is one finding of the first case, with the end of its log.
    """
    out = folder / "seen.json"
    out.unlink(missing_ok=True)
    asked = {"model": model, "profile": profile, "cases": list(cases), "out": str(out), "mutant": mutant}
    support = str(_PROCESS.parents[2])
    process = subprocess.run(
        [sys.executable, str(_PROCESS)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={
            **os.environ,
            "AASD_TEST_V2": str(int(PROFILES[profile].runner == "V2")),
            "PYTHONPATH": os.pathsep.join(filter(None, (support, os.environ.get("PYTHONPATH")))),
        },
    )
    log = process.stdout + process.stderr
    if process.returncode != 0:
        return [([None] * len(cases[0]["steps"]), [Finding("dead", None, log[-4000:])], {})]
    findings = [Finding("log", None, text[:1500]) for text in tracebacks(log)]
    runs: list[Run] = []
    for told in json.loads(out.read_text()):
        look = told["look"]
        faults = {place: count for place, count in look["faults"].items() if count}
        if faults != look["injected"]:
            findings.append(Finding("faults", None, f"counted {faults}, injected {look['injected']}"))
        findings += [Finding("leftover", None, f"{path}: {count}") for path, count in look["held"].items()]
        seen = [None if one is None else _observation(one) for one in told["seen"]]
        runs.append((seen, findings, look | {"metrics": told["metrics"]}))
        findings = []
    return runs


def _observation(told: dict[str, Any]) -> Observation:
    seen = Observation(**{**told, "disturbed": set(), "choices": [Choice(**choice) for choice in told["choices"]]})
    seen.seconds = tuple(seen.seconds)
    return seen
