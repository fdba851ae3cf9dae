"""The real ``vllm serve``: a case is run against it over HTTP, and its state is looked at when all is quiet."""

import asyncio
import contextlib
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from aasd_testing.fuzz import over_http
from aasd_testing.fuzz.cases import Case, Step
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.fuzz.observed import Observation
from aasd_testing.fuzz.oracle import Finding
from aasd_testing.fuzz.prompts_of_tokens import Prompts
from aasd_testing.fuzz.server import Server, ServerError

ROOT = pathlib.Path(__file__).parents[4]

MAX_IN_FLIGHT = 24
"""Requests that are sent before one has ended; three times what the engine runs at once."""

_QUIET_SECONDS = 30.0

_PREFIX = re.compile(r"^(\(.*?\) )?((ERROR|WARNING) [\d-]+ [\d:]+ \[.*?\] ?)?")
_CHAINED = ("The above exception was", "During handling of the above")

# vLLM's own, of what isn't a fault of the server's: a stream that is refused, a model's call of a tool that isn't JSON,
# and log-probabilities of an echoed prompt whose request was aborted before there were any.
_VLLMS_OWN = ("VLLMValidationError", "RequestOptionsError", "hermes_tool_parser.py", "_create_completion_logprobs")


class ServerTarget:
    """A server for the fuzzer, from `__enter__` to `__exit__`.

    Args:
        model: path of the checkpoint.
        profile: of `limits.PROFILES`.
        adapters: paths by name, for a profile that has them.
        mutant: of `mutants.MUTANTS`, to see that it is noticed.
        progress: is told what the server does as it starts.
    """

    def __init__(
        self,
        model: str,
        profile: str,
        adapters: Mapping[str, str] | None = None,
        mutant: str = "",
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._limits = PROFILES[profile]
        self._adapters, self._mutant = adapters or {}, mutant
        self.prompts = Prompts(model)
        self._loaded: set[str] = set()
        self._in_flight: dict[asyncio.Task, Observation] = {}
        # What, from when, and until when.
        self._disturbances: list[list[Any]] = []
        self._num_tracebacks = 0
        arguments = [argument for name, value in self._limits.engine.items() for argument in _option(name, value)]
        arguments += ["--speculative-config", json.dumps({"method": "aasd", **self._limits.aasd})]
        arguments += ["--worker-extension-cls", "aasd_testing.fuzz.hooks.FuzzHooks", "--enforce-eager"]
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        self._server = Server(model, arguments, progress, environment=_environment())

    def __enter__(self) -> Self:
        self._server.__enter__()
        try:
            self.rpc("fuzz_begin", self._mutant)
            if self._adapters:
                self.rpc("fuzz_mend_lora")
        except BaseException:
            self._server.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.__exit__(*exception)

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        try:
            return httpx.get(f"{self._server.url}/health", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def log(self) -> str:
        """All that it has logged."""
        return self._server.log_tail(10**9)

    def rpc(self, method: str, *args: str) -> Any:
        """Call a method of the worker."""
        body = {"method": method, "args": list(args)}
        answer = httpx.post(f"{self._server.url}/collective_rpc", json=body, timeout=120)
        answer.raise_for_status()
        return answer.json()["results"][0]

    def metrics(self) -> dict[str, float]:
        """Every sample of the server's page, summed over labels but for our places: ``aasd:faults_total:draft``."""
        page = httpx.get(f"{self._server.url}/metrics", timeout=30).text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                name = ":".join([sample.name, *([sample.labels["place"]] if "place" in sample.labels else [])])
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def run(self, case: Case) -> list[Observation | None]:
        """What became of each request of a case, None for its events; returns when all have ended."""
        return asyncio.run(self._run(case))

    async def _run(self, case: Case) -> list[Observation | None]:
        seen: list[Observation | None] = [None] * len(case["steps"])
        self._disturbances.clear()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=over_http.TIMEOUT, limits=limits) as client:
            running: set[asyncio.Task] = set()
            for index, step in enumerate(case["steps"]):
                while len(running) >= MAX_IN_FLIGHT:
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if step["do"] == "ask":
                    running.add(asyncio.create_task(self._ask(client, index, step, seen)))
                else:
                    async with asyncio.timeout(over_http.TIMEOUT):
                        await self._event(client, step)
                await asyncio.sleep(step["wait"] / 1000)
            if running:
                await asyncio.wait(running)
                for task in running:
                    task.result()
            await client.post("/wake_up")
        return seen

    async def _ask(self, client: httpx.AsyncClient, index: int, step: Step, seen: list[Observation | None]) -> None:
        began, was_loaded = time.monotonic(), step.get("adapter") in {None, *self._loaded}
        found = await over_http.ask(client, step, self.prompts)
        found.disturbed = {what for what, _, until in self._disturbances if until >= began}
        if not was_loaded:
            found.disturbed.add("adapter")
        seen[index] = found

    @contextlib.contextmanager
    def _disturbing(self, what: str) -> Iterator[None]:
        """For requests that run meanwhile, or come before it is over."""
        disturbance = [what, time.monotonic(), math.inf]
        self._disturbances.append(disturbance)
        try:
            yield
        finally:
            disturbance[-1] = time.monotonic()

    async def _event(self, client: httpx.AsyncClient, step: Step) -> None:
        async def post(path: str, **body: Any) -> httpx.Response:
            return await client.post(path, json=body)

        async def rpc(method: str, *args: str) -> None:
            (await post("/collective_rpc", method=method, args=list(args))).raise_for_status()

        match step["do"]:
            case "fault":
                await rpc("fuzz_inject", step["where"], step["place"], str(step["times"]))
            case "off":
                await rpc("fuzz_off", step["place"])
            case "on":
                await rpc("fuzz_calm")
            case "clear_memory":
                await rpc("aasd_clear_memory")
            case "reload_weights":
                await rpc("reload_weights")
            case "reset_prefix_cache":
                (await client.post(f"/reset_prefix_cache?reset_running_requests={step['running']}")).raise_for_status()
            case "sleep":
                with self._disturbing(step["mode"]):
                    (await client.post(f"/sleep?level={step['level']}&mode={step['mode']}")).raise_for_status()
                    await asyncio.sleep(step["for"] / 1000)
                    (await client.post("/wake_up")).raise_for_status()
            case "load_adapter" if step["name"] not in self._loaded:
                with self._disturbing("adapter"):
                    path = self._adapters[step["name"]]
                    answer = await post("/v1/load_lora_adapter", lora_name=step["name"], lora_path=path)
                    answer.raise_for_status()
                self._loaded.add(step["name"])
            case "unload_adapter" if step["name"] in self._loaded:
                self._loaded.discard(step["name"])
                with self._disturbing("adapter"):
                    (await post("/v1/unload_lora_adapter", lora_name=step["name"])).raise_for_status()

    def settle(self) -> tuple[list[Finding], dict[str, Any]]:
        """Wait until nothing runs, and say what isn't as it must be then; also what the worker told of itself."""
        self.rpc("fuzz_calm")
        deadline, left = time.monotonic() + _QUIET_SECONDS, {"": 1.0}
        while left and time.monotonic() < deadline:
            time.sleep(0.5)
            look, shown = self.rpc("fuzz_look"), self.metrics()
            gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            left = {name: shown[name] for name in gauges if shown[name]} | look["held"]
            faults = {place: count for place, count in look["faults"].items() if count}
            told = {
                name.rpartition(":")[2]: int(value)
                for name, value in shown.items()
                if name.startswith("aasd:faults_total:") and value
            }
            if told != faults:
                left["the page's faults"] = sum(told.values())
        findings = [Finding("leftover", None, f"{name}: {value:g}") for name, value in left.items()]
        if faults != look["injected"]:
            findings.append(Finding("faults", None, f"counted {faults}, injected {look['injected']}"))
        return findings + self._new_tracebacks(), look | {"metrics": shown, "server_mib": self._resident_mib()}

    def _resident_mib(self) -> float:
        """Resident memory of all of the server's processes, shared pages counted for each."""
        total = 0
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                # Behind the name: state, parent, group, session. The server began a session of its own.
                if int((process / "stat").read_text().rpartition(")")[2].split()[3]) == self._server.pid:
                    total += int((process / "statm").read_text().split()[1])
        return total * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _new_tracebacks(self) -> list[Finding]:
        """Tracebacks in the log that aren't an injected fault's."""
        unexpected = tracebacks(self.log())
        new, self._num_tracebacks = unexpected[self._num_tracebacks :], len(unexpected)
        return [Finding("log", None, text[:1500]) for text in new]


def tracebacks(log: str) -> list[str]:
    """Every traceback of a log but those of injected faults and `_VLLMS_OWN`; one that was raised from another, once."""
    found, cause = [], ""
    for part in re.split(r"(?m)^.*Traceback \(most recent call last\):", log)[1:]:
        # The stack is indented behind the log's own prefix; the first line that isn't names the exception.
        lines = [_PREFIX.sub("", line) for line in part.splitlines()[1:]]
        end = next((number for number, line in enumerate(lines) if line and not line.startswith(" ")), 0)
        text = cause + "\n".join([lines[end], *lines[:end]])
        if any(line.startswith(_CHAINED) for line in lines[end : end + 4]):
            cause = text + "\n"
            continue
        cause = ""
        if "InjectedFault" not in lines[end] and not any(known in text for known in _VLLMS_OWN):
            found.append(text)
    return found


def _option(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    return [option] if value is True else [option, str(value)]


def _environment() -> dict[str, str]:
    support = str(pathlib.Path(__file__).parents[2])
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOG_STATS_INTERVAL": "2",
        # vLLM binds threads to cores, which would undo a taskset.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join(filter(None, (support, os.environ.get("PYTHONPATH")))),
    }


__all__ = ["ROOT", "ServerError", "ServerTarget", "tracebacks"]
