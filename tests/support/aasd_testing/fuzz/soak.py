"""The fuzzer for as long as is wanted (``make soak``): rounds of random requests and events on a real server.

    PYTHONPATH=tests/support python -m aasd_testing.fuzz.soak --minutes 60 --seed 1
    PYTHONPATH=tests/support python -m aasd_testing.fuzz.soak --seed 1 --profiles v1 --round 7 --shrink

A round is a case of its own, made from the seed and its number; after it, the server must be idle and hold nothing. The
command for a round that fails is printed: ``--round`` runs it alone, and ``--shrink`` looks for the steps that matter.
Exit code 1 if anything was found.
"""

import argparse
import collections
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from aasd_testing.fuzz.cases import Case, generate, referenced_requests
from aasd_testing.fuzz.checks import Finding, check, check_log, failures
from aasd_testing.fuzz.client import Response
from aasd_testing.fuzz.profiles import ADAPTERS, PROFILES
from aasd_testing.fuzz.prompts import Prompts
from aasd_testing.fuzz.request_types import Request
from aasd_testing.fuzz.server_target import ServerTarget, references
from aasd_testing.tiny_models import lora_adapter


class Fuzzer:
    """Cases for the servers of one profile, and what became of them.

    Args:
        model: path of the checkpoint.
        profile: name in `PROFILES`.
        seed: of requests and rounds.
        num_references: requests that are also answered without speculation.
        folder: for adapters.

    Attributes:
        counts: of everything so far.
        state: what the worker and ``/metrics`` reported after the last round.
    """

    def __init__(self, model: str, profile: str, seed: int, num_references: int, folder: pathlib.Path) -> None:
        self._model, self._profile, self._seed = model, PROFILES[profile], seed
        self._prompts = Prompts(model)
        self._adapters = {}
        if "lora" in self._profile.features:
            self._adapters = {name: lora_adapter(folder / name, model, seed=i) for i, name in enumerate(ADAPTERS)}
        self._pool = referenced_requests(seed, self._profile, self._prompts, num_references)
        self._references = references(model, self._profile, self._pool, self._adapters)
        self.counts: collections.Counter[str] = collections.Counter()
        self.state: dict[str, Any] = {}

    def server(self, mutant: str = "") -> ServerTarget:
        """A server to run cases on; of `hooks.MUTANTS` if one is named."""
        return ServerTarget(self._model, self._profile, self._prompts, self._adapters, mutant)

    def case(self, number: int, size: int) -> Case:
        """The case of a round."""
        return generate(self._seed, number, self._profile, self._prompts, size, self._pool)

    def run(self, server: ServerTarget, case: Case) -> list[Finding]:
        """Run a case and return all that is wrong; a server that has died is a finding."""
        try:
            responses = server.run(case)
            idle, self.state = server.check_idle()
        except Exception as error:
            # Whatever it is, the round is to be reported.
            self.counts["finding dead"] += 1
            # The first traceback in the log is the reason.
            return [Finding("dead", f"{type(error).__name__}: {error}"), *check_log(server.log())[:2]]
        findings = []
        for index, (step, response) in enumerate(zip(case, responses, strict=True)):
            if isinstance(step, Request):
                reference = None if step.reference is None else self._references[step.reference]
                found = check(step, response, reference)
                findings += [Finding(what, f"step {index}: {detail}") for what, detail in found]
                self._count(step, response)
            else:
                self.counts[f"event {step.name}"] += 1
        self.counts.update(f"finding {finding.what}" for finding in [*findings, *idle])
        return findings + idle

    def _count(self, request: Request, response: Response) -> None:
        tokens = sum(len(choice.token_ids or ()) for choice in response.choices)
        is_compared = request.reference is not None and response.status == 200 and tokens > 0
        self.counts.update(requests=1, tokens=tokens, compared=is_compared, disconnected=response.disconnected)
        self.counts["refused"] += response.status == 400
        self.counts[f"type {request.type}"] += 1


def main() -> None:
    """Run rounds of each profile, or one round again."""
    arguments = _arguments()
    report, failed = {}, False
    for profile in arguments.profiles:
        with tempfile.TemporaryDirectory() as folder:
            say(f"{profile}: answering {arguments.references} requests without speculation")
            fuzzer = Fuzzer(arguments.model, profile, arguments.seed, arguments.references, pathlib.Path(folder))
            if arguments.round is not None:
                failed |= again(fuzzer, arguments)
            else:
                failed |= soak(fuzzer, arguments, profile)
        report[profile] = {**dict(sorted(fuzzer.counts.items())), **fuzzer.state}
    print(json.dumps(report, indent=1))
    sys.exit(int(failed))


def soak(fuzzer: Fuzzer, arguments: argparse.Namespace, profile: str) -> bool:
    """Run rounds for as long as is wanted, or until the server dies; whether any failed."""
    failed = False
    number = 0
    with fuzzer.server(arguments.mutant) as server:
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            found = failures(fuzzer.run(server, fuzzer.case(number, arguments.size)))
            said = f"{fuzzer.counts['requests']} requests, {fuzzer.counts['compared']} compared"
            say(f"{profile} round {number}: {said}, {fuzzer.state.get('mib')} MiB")
            for finding in found[:10]:
                say(f"FOUND {finding.what}: {finding.detail}")
            if found:
                failed = True
                say(f"again: --profiles {profile} --seed {arguments.seed} --size {arguments.size} --round {number}")
            if any(finding.what == "dead" for finding in found):
                break
            number += 1
    return failed


def again(fuzzer: Fuzzer, arguments: argparse.Namespace) -> bool:
    """Run one round, and look for the steps that matter if it fails; whether it failed."""

    def fails(case: Case) -> bool:
        # A server of its own for each: what an earlier case left behind must not matter.
        with fuzzer.server(arguments.mutant) as server:
            found = failures(fuzzer.run(server, case))
        say(f"{len(case)} steps: {found[0] if found else 'nothing'}")
        return bool(found)

    case = fuzzer.case(arguments.round, arguments.size)
    failed = fails(case)
    if failed and arguments.shrink:
        for step in shrink(case, fails):
            say(str(step)[:2000])
    return failed


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Leave out half of the steps, a quarter, ..., one, as long as the rest still fails."""
    size = len(case)
    while size > 1:
        size = (size + 1) // 2
        at = 0
        while at < len(case):
            fewer = case[:at] + case[at + size :]
            if fewer and fails(fewer):
                case = fewer
            else:
                at += size
    return case


def say(text: str) -> None:
    """Report progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=os.environ.get("AASD_TEST_MODEL"), help="path (default: $AASD_TEST_MODEL)")
    add("--profiles", nargs="+", choices=PROFILES, default=["v1", "lora"], help="of servers (default: v1 lora)")
    add("--minutes", type=float, default=30.0, help="for each profile (default %(default)s)")
    add("--seed", type=int, default=1, help="of requests and rounds (default %(default)s)")
    add("--references", type=int, default=56, help="requests to answer without speculation, too (default %(default)s)")
    add("--size", type=int, default=80, help="steps of a round (default %(default)s)")
    add("--round", type=int, help="run this round alone")
    add("--shrink", action="store_true", help="and look for the steps that matter")
    add("--mutant", default="", help="of fuzz.hooks: break the product, to see that it is noticed")
    return parser.parse_args()


if __name__ == "__main__":
    # A server must end with us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
