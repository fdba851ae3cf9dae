"""What the set-up tools print, and how they run something slow."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HEARTBEAT_SECONDS = 15.0
LOG_TAIL_LINES = 30


class SetupError(Exception):
    """Something that the user has to act on; its text is the message."""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"[aasd] {text}", flush=True)


def run_logged(doing: str, command: list[str], log: Path) -> None:
    """Run `command` and say how it goes.

    On a terminal the command writes there itself, progress bars included. Elsewhere its output goes to `log`,
    with a short line every `HEARTBEAT_SECONDS`, and its end is shown if it fails.

    Raises: SetupError where the command fails.
    """
    say(doing)
    started = time.monotonic()
    if sys.stdout.isatty():
        code = subprocess.run(command).returncode
    else:
        with log.open("w") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            try:
                while (code := _wait(process, HEARTBEAT_SECONDS)) is None:
                    say(f"  {time.monotonic() - started:.0f} s  {_last_line(log)}")
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if code:
            print("\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]), file=sys.stderr)
    if code:
        raise SetupError(f"{doing}: failed ({' '.join(command)})")
    say(f"  took {time.monotonic() - started:.0f} s")


def report_errors(main: Callable[[], None]) -> None:
    """Run `main`, and turn what the user has to act on into one line and exit code 1."""
    try:
        main()
    except SetupError as error:
        sys.exit(f"[aasd] error: {error}")
    except KeyboardInterrupt:
        sys.exit("\n[aasd] interrupted; run the same command again to go on")


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()  # at a progress bar's carriage returns, too
    telling = (line.strip() for line in reversed(lines) if not line.startswith("WARNING"))
    return next((line[:90] for line in telling if line), "")
