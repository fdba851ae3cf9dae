"""The whole set: every program that a figure of the README comes from, one after the other (``make bench``).

    python -m benchmarks.suite --data question.jsonl hotpotqa.jsonl
    python -m benchmarks.suite --list
    python -m benchmarks.suite --data question.jsonl --only ablation projection
    python -m benchmarks.suite --quick

The first file of ``--data`` is in Spec-Bench's format; without one, the programs that need it are left out, and said
so. A result that was made by the same command on the same sources (``vllm_aasd/``, ``kernels/``, ``benchmarks/``) isn't
made again, and the programs that can are resumed, so an interrupted run is just started again. At the end the figures
and the README's tables are drawn. It needs a quiet machine of two cores. Two lanes of programs run at once, each pinned to
one core, where every ratio is of runs that took turns on that core; what uses both cores, or times microseconds, has the
machine to itself after them. In float32, or with less memory than two comparisons need, one lane follows the other, and it
takes longer. ``--quick`` runs two programs small, into a folder of its own.

Left out: `benchmarks.load`, a result about what is lost under overload (nothing) more than about speed; `end_to_end_many` and
`end_to_end_sampled_many`, several at once, made since the last run of all, which has the same with vLLM's own methods;
`end_to_end_sampled_repeated`, its lowest category in three rounds; `end_to_end_float32`, `…_sampled`, `…_repeated` and `…_qa`, the same comparison on a CPU without arithmetic in bfloat16, which another
machine can't make; and `benchmarks.drafter_quality fit`, whose result is the constants that are shipped. They are run by hand.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks import methods, plot, readme, results
from vllm_aasd.host import emulates_bfloat16

BUDGET_MINUTES = 180

# Eight engines of up to 2.8 GiB: a vLLM process of 1.8, and a KV cache for 32 requests in bfloat16.
_GIB_OF_TWO_LANES = 23
_GIB_OF_KV_CACHE = 1

_STRICT = '{"aasd_verification": "strict"}'


class Program(NamedTuple):
    """One run of a program.

    Attributes:
        name: of its result.
        module: of `benchmarks`.
        arguments: of the full run; ``DATA`` stands for all data files, ``QUESTIONS`` for the first.
        minutes: how long it may take.
        core: the core that it is pinned to, beside programs on the other; None for one that has the machine to itself.
        resumes: whether it knows ``--resume``.
        takes_dtype: whether it computes in the ``--dtype`` of the suite. Those that stay in float32 whatever it is are
            those that judge answers token by token.
        quick: arguments of a small run; None where there is none.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    minutes: int
    core: int | None = None
    resumes: bool = False
    takes_dtype: bool = False
    quick: tuple[str, ...] | None = None

    @property
    def needs_data(self) -> bool:
        """Whether it can't do without a file of questions."""
        has_own = "DATA" not in self.arguments or "--builtin" in self.arguments
        return "QUESTIONS" in self.arguments or not has_own


_TASKS = ("--data", "DATA", "--builtin")
_METHODS = ("--methods", "none", "ngram", "suffix", "--aasd", _STRICT)

PROGRAMS = (
    Program("end_to_end", "end_to_end", (*_TASKS, "--core", "0", "--rounds", "1", "--limit", "5", "6", "8", "16", "32",
            *_METHODS, "--concurrency", "1", "4", "8", "16", "32"), 80, 0, True, True,
            ("--quick", "--methods", "none", "--aasd", _STRICT)),
    Program("end_to_end_one", "end_to_end", (*_TASKS, "--core", "0", "--rounds", "1", "--limit", "10", *_METHODS,
            "--concurrency", "1"), 30, 0, True, True),
    Program("prefill", "prefill", ("--core", "0", "--methods", "none", "aasd", "--prompts", "8"), 20, 0, takes_dtype=True),
    Program("end_to_end_sampled", "end_to_end", (*_TASKS, "--core", "1", "--rounds", "1", "--limit", "3", "4", "6", "16",
            "32", "--temperature", "0.7", "--methods", "none", "ngram", "suffix", "aasd", "--concurrency", "1", "4", "8",
            "16", "32"), 72, 1, True, True),
    Program("end_to_end_sampled_one", "end_to_end", (*_TASKS, "--core", "1", "--rounds", "1", "--limit", "8",
            "--temperature", "0.7", "--methods", "none", "ngram", "suffix", "aasd", "--concurrency", "1"), 28, 1, True, True),
    Program("kernels", "kernels", (), 3, 1),
    Program("ablation", "ablation", (*_TASKS, "--limit", "12"), 3, 1, takes_dtype=True),
    Program("calibration", "drafter_quality", ("calibration", *_TASKS, "--limit", "12"), 1, 1, takes_dtype=True),
    Program("projection", "projection", (*_TASKS, "--limit", "12", "--batches", "1", "4", "16", "64", "256"), 4, 1,
            takes_dtype=True),
    Program("drafter_time", "drafter_time", ("--data", "QUESTIONS"), 1, quick=("--lengths", "1024", "--steps", "10")),
    Program("worst_case", "worst_case",
            ("--data", "QUESTIONS", "--lengths", "1024", "32768", "--steps", "100", "--repeats", "6", "--requests", "500"), 2),
    Program("verifier_time", "verifier_time", ("--steps", "60"), 2),
    Program("serving", "serving", (*_TASKS, "--limit", "8", "--methods", "none", "ngram", "aasd", "--rates", "1", "3",
            "--requests", "30"), 11, resumes=True, takes_dtype=True),
    Program("frontier", "frontier",
            ("--data", "DATA", "--limit", "8", "--rounds", "1", "--gpu-memory-utilization", "0.5"), 28),
)  # fmt: skip
"""In their order: the comparison itself comes first, so that a run that is cut short has it."""


def main() -> None:
    """Run what isn't there yet; exit code 1 if a program fails."""
    arguments = _arguments()
    chosen = [program for program in PROGRAMS if arguments.only is None or program.name in arguments.only]
    if arguments.quick:
        chosen = [program._replace(core=None) for program in chosen if program.quick is not None]
    folder = arguments.results
    left = []
    for program in chosen:
        command = command_of(program, arguments.data, folder, arguments.quick, arguments.dtype)
        if program.needs_data and not arguments.data and not arguments.quick:
            print(f"{program.name} is left out: it needs questions in Spec-Bench's format (--data)")
        elif not arguments.quick and is_current(folder / f"{program.name}.json", command):
            print(f"{program.name} is there, made by this command on these sources")
        else:
            left.append((program, command))
    minutes = minutes_of([program for program, _ in left])
    if arguments.list:
        print("\n".join(f"{program.minutes:3} min  {shlex.join(command)}" for program, command in left))
        return
    missing = {program.core for program, _ in left} - {None, *os.sched_getaffinity(0)}
    if missing:
        sys.exit(f"core {min(missing)} isn't among those that this process may use: {sorted(os.sched_getaffinity(0))}")
    print(f"{len(left)} programs to run" + ("" if arguments.quick else f", about {minutes} minutes"), flush=True)
    failed = run_all(left, _fits_two_lanes(arguments.dtype))
    draw(folder, arguments.quick)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; start it again to go on")


def minutes_of(programs: Sequence[Program]) -> int:
    """How long programs may take, those of the two lanes at once."""
    by_lane = {core: sum(program.minutes for program in programs if program.core == core) for core in (0, 1, None)}
    return max(by_lane[0], by_lane[1]) + by_lane[None]


def run_all(left: Sequence[tuple[Program, list[str]]], at_once: bool) -> list[str]:
    """Run commands, each lane's in order; one that fails doesn't keep the others from running.

    Args:
        left: what is to be run.
        at_once: whether the lanes run beside each other.

    Returns:
        The names of those that failed.
    """
    environment = dict(os.environ)
    if at_once:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_GIB_OF_KV_CACHE))
    with concurrent.futures.ThreadPoolExecutor(1 + at_once) as lanes:
        of_lanes = [
            lanes.submit(_run_lane, core, [pair for pair in left if pair[0].core == core], environment)
            for core in (0, 1)
        ]
    failed = [name for lane in of_lanes for name in lane.result()]
    return failed + _run_lane(None, [pair for pair in left if pair[0].core is None], dict(os.environ))


def _fits_two_lanes(dtype: str | None) -> bool:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return dtype != "float32" and gib >= _GIB_OF_TWO_LANES


def _run_lane(core: int | None, left: Sequence[tuple[Program, list[str]]], environment: Mapping[str, str]) -> list[str]:
    if core is not None:
        # Of this thread, which what it starts inherits.
        os.sched_setaffinity(0, {core})
        # Engines that compile the same model at once would write the same files.
        environment = {**environment, "VLLM_CACHE_ROOT": str(results.ROOT / f".bench/core{core}")}
    failed = []
    for number, (program, command) in enumerate(left):
        remaining = sum(other.minutes for other, _ in left[number:])
        where = "" if core is None else f" on core {core}"
        print(f"[{number + 1} of {len(left)}{where}, {remaining} min budgeted] {shlex.join(command)}", flush=True)
        began = time.monotonic()
        more = ["--resume"] if program.resumes else []
        command = [sys.executable, *command[1:], *more]
        code = subprocess.run(command, cwd=results.ROOT, env=environment, check=False).returncode
        took = (time.monotonic() - began) / 60
        print(f"{program.name}: {'done' if code == 0 else f'FAILED with {code}'} in {took:.1f} min "
              f"(budget {program.minutes})", flush=True)  # fmt: skip
        if code:
            failed.append(program.name)
    return failed


def command_of(
    program: Program, data: Sequence[pathlib.Path], folder: pathlib.Path, quick: bool, dtype: str | None = None
) -> list[str]:
    """The command of a program, as its result records it but for paths."""
    given = program.quick if quick else program.arguments
    command = ["python", "-m", f"benchmarks.{program.module}"]
    for argument in given:
        if argument == "DATA":
            command += map(str, data)
        elif argument == "QUESTIONS":
            command += [str(path) for path in data[:1]]
        elif argument == "suffix" and not methods.without_missing(["suffix"]):
            continue
        else:
            command.append(argument)
    # An option whose files there aren't any of.
    if not data and "--data" in command:
        command.remove("--data")
    if dtype is not None and program.takes_dtype:
        command += ["--dtype", dtype]
    return [*command, "--out", str(folder / f"{program.name}.json")]


def is_current(path: pathlib.Path, command: Sequence[str]) -> bool:
    """Whether a result was made by this command, resumed or not, on the sources as they are now."""
    if not path.exists():
        return False
    run = results.read(path)["metadata"]
    made = [argument for argument in shlex.split(run["command"]) if argument != "--resume"]
    wanted = [results.shortened(argument) for argument in command]
    return made == wanted and not run["uncommitted_changes"] and results.same_sources(run["commit"])


def draw(folder: pathlib.Path, quick: bool) -> None:
    """Draw the figures, and the README's tables unless it is a quick run."""
    for name, (result, _) in plot.FIGURES.items():
        if (folder / result).exists():
            try:
                print(*plot.draw([name], folder))
            except ValueError as error:  # a run that isn't exact has no speed
                print(f"{name} isn't drawn: {error}")
    if not quick:
        readme.README.write_text(readme.updated(readme.README.read_text(), folder))
        print(readme.README)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=_file, nargs="+", default=[], metavar="FILE", help="the first in Spec-Bench's format")
    add("--only", nargs="+", choices=[program.name for program in PROGRAMS], help="these programs")
    add("--list", action="store_true", help="only print the commands that would run")
    add("--dtype", choices=tuple(methods.NEAR_TIE), help="default bfloat16, or float32 on a CPU that would emulate it")
    add("--quick", action="store_true", help="small runs, to see that it works; for no figures")
    add("--results", type=pathlib.Path, help="folder of the results (default: benchmarks/results; quick: .bench/quick)")
    arguments = parser.parse_args()
    if arguments.dtype is None and emulates_bfloat16():
        arguments.dtype = "float32"
    if arguments.results is None:
        arguments.results = results.ROOT / ".bench/quick" if arguments.quick else results.RESULTS
    arguments.results = arguments.results.absolute()
    return arguments


def _file(text: str) -> pathlib.Path:
    path = pathlib.Path(text).absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no file {text}")
    return path


if __name__ == "__main__":
    main()
