"""Start ``vllm serve`` out of ``.venv`` with method ``aasd`` (``make serve``).

Reads MODEL (a path or a name on the hub; the demo model where unset), PORT (8000) and ARGS (further arguments
of ``vllm serve``; a ``--speculative-config`` among them replaces ours) from the environment, and becomes the
server. It listens on this machine alone unless a ``--host`` is among ARGS.
"""

import os
import shlex
import sys
from collections.abc import Mapping

from console import SetupError, report_errors, say
from demo_model import MODEL_PATH
from environment import VENV, read_state

SPECULATIVE_CONFIG = '{"method":"aasd"}'
DEFAULT_PORT = 8000
LOCAL_HOST = "127.0.0.1"
KV_CACHE_GIB = "2"  # vLLM would take most of the memory; this holds 90 000 tokens of the demo model
EXAMPLE_REQUEST = """\
  curl -s http://localhost:PORT/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello!"}]}'"""


def parse_port(text: str) -> int:
    """The port that `text` names; the default where it is empty."""
    if not text:
        return DEFAULT_PORT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise SetupError(f"PORT={text!r}: must be a whole number from 1 to 65535, or unset")
    return int(text)


def parse_arguments(text: str) -> list[str]:
    """ARGS, split as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SetupError(f"ARGS={text!r}: {error}") from error


def serve_command(model: str, port: int, arguments: list[str]) -> list[str]:
    """The ``vllm serve`` command line."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    command = [str(VENV / "bin" / "vllm"), "serve", model]
    if "--host" not in given:
        command += ["--host", LOCAL_HOST]
    command += ["--port", str(port)]
    if not given & {"--speculative-config", "-sc"}:
        command += ["--speculative-config", SPECULATIVE_CONFIG]
    return command + arguments


def serve_environment(environment: Mapping[str, str], flavour: str, offline: bool) -> dict[str, str]:
    """The server's environment; what the user has set stays. `offline` keeps it from asking the hub."""
    result = dict(environment)
    if flavour == "cpu":
        result.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)
    if offline:
        result.setdefault("HF_HUB_OFFLINE", "1")
    return result


def main() -> None:
    asked = {name: os.environ.get(name, "").strip() for name in ("MODEL", "PORT", "ARGS")}
    port = parse_port(asked["PORT"])
    arguments = parse_arguments(asked["ARGS"])
    if sys.argv[1:] == ["--check"]:  # before a set-up that may take minutes
        return
    state = read_state(VENV)
    if state is None or not state.digest:
        raise SetupError("there is no complete .venv; run `make serve`, or `make setup` first")
    command = serve_command(asked["MODEL"] or str(MODEL_PATH), port, arguments)
    say(shlex.join(command))
    if LOCAL_HOST in command:
        say('only this machine reaches it; for others: VLLM_API_KEY=a-secret make serve ARGS="--host 0.0.0.0"')
    say("once it says 'Application startup complete.', ask it something:")
    print(EXAMPLE_REQUEST.replace("PORT", str(port)), flush=True)
    environment = serve_environment(os.environ, state.identity.flavour, offline=not asked["MODEL"])
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    report_errors(main)
