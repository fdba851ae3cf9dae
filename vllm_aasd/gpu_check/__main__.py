"""Check a GPU before it serves: kernels against their references, speed, memory, and a served model.

    python -m vllm_aasd.gpu_check [--quick] [--report FILE.json]

Takes ten minutes at most, or three, in an order in which being cut short tells the most; the report is written after
each check. Without vLLM, kernels are checked alone, which takes torch and Triton. Exits with 0 only if all passed.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_aasd import __version__

EVERY_WAY = ("plain", "side", "graph")
SECONDS = {False: 600, True: 180}
"""At most, by whether it is quick."""


class Check(NamedTuple):
    """A check: its name, when it passes, what makes it and says what was found, and whether a quick run has it."""

    name: str
    criterion: str
    run: Callable[[], str]
    is_quick: bool = True


def checks(gpu: Any, quick: bool, seed: int) -> list[Check]:
    """All checks of a device, in their order."""
    from vllm_aasd.gpu_check import kernels, speed

    sizes, timed = (kernels.QUICK if quick else kernels.FULL), speed.FULL
    if quick:
        timed = timed._replace(contexts=timed.contexts[:2])
    equal = "every output equals the reference's, float32 sums to 1e-4"
    served = {name: _vllm(name) for name in ("check_doctor", "check_served", "check_steady", "check_speed", "FULL")}
    return [
        Check("small", equal, lambda: kernels.check_kernels(gpu, kernels.SMALL, seed, EVERY_WAY)),
        Check("doctor", "the doctor finds nothing that has changed", lambda: served["check_doctor"]()()),
        Check("kernels", equal, lambda: kernels.check_kernels(gpu, sizes, seed)),
        Check("waits", "no op waits for the device", lambda: speed.check_no_synchronization(gpu, timed)),
        Check("compiled", "nothing is compiled after a warm-up", lambda: speed.check_compilations(gpu, timed)),
        Check(
            "served",
            "strict answers equal those without speculation in float32; sampled ones with p > 1e-4",
            lambda: served["check_served"]()(served["FULL"]()),
        ),
        Check("times", "each op within its limit", lambda: speed.check_times(gpu, timed, _stock_calls)),
        Check("launches", "few launches, 200 us of host an op", lambda: speed.check_launches(gpu, timed), False),
        Check("offsets", equal, lambda: kernels.check_offsets(gpu, sizes, seed)),
        Check("memory", "what is taken is what is announced", lambda: speed.check_memory(gpu, timed)),
        Check(
            "steady",
            "no wait and no compilation while requests are served",
            lambda: served["check_steady"]()(served["FULL"]()),
            False,
        ),
        Check(
            "speed",
            "with aasd at least 95% of the tokens a second without",
            lambda: served["check_speed"]()(served["FULL"](), gpu.free_bytes()),
            False,
        ),
        Check("graphs", equal, lambda: kernels.check_kernels(gpu, sizes, seed + 1, EVERY_WAY[1:]), False),
        Check("sanitizer", "no error", lambda: kernels.check_sanitizer(gpu, seed), False),
    ]


def _vllm(name: str) -> Callable[[], Any]:
    """What finds a function of `vllm_aasd.engine.gpu_trial`, which imports vLLM."""

    def find() -> Any:
        from vllm_aasd.gpu_check.gpu import Skipped

        # Read when vLLM is imported: a line for each check is enough.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm_aasd.engine import gpu_trial
        except ImportError as error:
            raise Skipped(f"vLLM can't be imported ({error})") from error
        return getattr(gpu_trial, name)

    return find


def _stock_calls(step: Any) -> dict[str, Callable[[], Any]]:
    """vLLM's own kernels for a step; none without vLLM."""
    from vllm_aasd.gpu_check.gpu import Skipped

    try:
        return _vllm("stock_calls")()(step)
    except Skipped:
        return {}


def main(arguments: list[str] | None = None, gpu: Any = None, of: Callable[..., list[Check]] = checks) -> None:
    """Run the command.

    Args:
        arguments: of the command line.
        gpu: what is checked, by default the current device.
        of: gives the checks.

    Raises:
        SystemExit: 0 if all passed, 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog="python -m vllm_aasd.gpu_check", description="Check a GPU before it serves.")
    parser.add_argument("--quick", action="store_true", help="the first checks, in three minutes")
    parser.add_argument("--report", type=pathlib.Path, metavar="FILE.json", help="where the results go")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the inputs; by default another")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="the checks to run")
    given = parser.parse_args(arguments)
    if gpu is None:
        try:
            import torch
            import triton  # noqa: F401
        except ImportError as error:
            sys.exit(f"error: {error.name} can't be imported, and gpu_check needs torch and Triton")
        if not torch.cuda.is_available():
            sys.exit("error: torch sees no CUDA or ROCm device, and gpu_check checks one; nothing was checked")
        from vllm_aasd.gpu_check.gpu import Gpu

        gpu = Gpu()
    machine = gpu.describe()
    print(f"vllm-aasd {__version__}, seed {given.seed}: {machine}", flush=True)
    wanted = [one for one in of(gpu, given.quick, given.seed) if one.is_quick or not given.quick]
    if given.only:
        wanted = [one for one in wanted if one.name in given.only]
    report = {"version": __version__, "machine": machine, "seed": given.seed, "quick": given.quick, "checks": []}
    ends = time.monotonic() + SECONDS[given.quick]
    for check in wanted:
        result = _run(check, ends - time.monotonic())
        report["checks"].append(result)
        print("{result:8}{name:10}{seconds:6.1f} s  {found} [{criterion}]".format(**result), flush=True)
        if given.report:
            given.report.write_text(json.dumps(report, indent=1))
    sys.exit(0 if all(one["result"] in ("pass", "skip") for one in report["checks"]) else 1)


def _run(check: Check, seconds: float) -> dict[str, Any]:
    from vllm_aasd.gpu_check.gpu import Skipped

    def cut(*unused: Any) -> None:
        raise TimeoutError("there was no time left")

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, cut)
    try:
        signal.alarm(max(int(seconds), 1))
        result, found = "pass", check.run()
    except Skipped as error:
        result, found = "skip", str(error)
    except Exception as error:
        result, found = "FAIL", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    took = round(time.monotonic() - began, 1)
    return {"name": check.name, "criterion": check.criterion, "result": result, "seconds": took, "found": found}


if __name__ == "__main__":
    main()
