"""The real ``vllm serve``: a case is run against it over HTTP, and its state is looked at when all is quiet."""

import asyncio
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from aasd_testing.fuzz import over_http
from aasd_testing.fuzz.cases import Step, key
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.fuzz.observed import Finding, Observation, Reference
from aasd_testing.fuzz.oracle import in_log
from aasd_testing.fuzz.prompts_of_tokens import Prompts
from aasd_testing.fuzz.server import Server

ROOT = pathlib.Path(__file__).parents[4]

MAX_IN_FLIGHT = 24
"""Requests that are sent before one has ended; three times what the engine runs at once."""

_QUIET_SECONDS = 30.0

# Of the engine with one request at a time: not for it, and instead.
_SPECULATIVE = ("per_request_spec_decode_metrics", "num_gpu_blocks_override", "max_num_batched_tokens")
# Log-probabilities are of what the tokens are chosen from: penalties and masks included.
_ALONE = ["--max-num-seqs", "1", "--no-enable-prefix-caching", "--logprobs-mode", "processed_logprobs"]


class ServerTarget:
    """A server for the fuzzer, from `__enter__` to `__exit__`.

    Args:
        model: path of the checkpoint.
        profile: of `limits.PROFILES`.
        adapters: paths by name, for a profile that has them.
        mutant: of `hooks.MUTANTS`, to see that it is noticed.
        plain: one without speculation on the V1 model runner, which serves one request at a time.
    """

    def __init__(
        self,
        model: str,
        profile: str,
        adapters: Mapping[str, str] | None = None,
        mutant: str = "",
        plain: bool = False,
    ) -> None:
        limits = PROFILES[profile]
        self._adapters, self._mutant, self._plain = adapters or {}, mutant, plain
        self.prompts = Prompts(model)
        self._loaded: set[str] = set()
        # What, from when, and until when.
        self._disturbances: list[list[Any]] = []
        self._log_chars = 0
        engine = {name: value for name, value in limits.engine.items() if not (plain and name in _SPECULATIVE)}
        arguments = [argument for name, value in engine.items() for argument in _option(name, value)]
        arguments += ["--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        if plain:
            arguments += _ALONE
        else:
            arguments += ["--speculative-config", json.dumps({"method": "aasd", **limits.aasd})]
            arguments += ["--worker-extension-cls", "aasd_testing.fuzz.hooks.FuzzHooks"]
        self._server = Server(model, arguments, _environment(limits.runner == "V2" and not plain))

    def __enter__(self) -> Self:
        self._server.__enter__()
        try:
            if not self._plain:
                self.rpc("begin", self._mutant)
                if self._adapters:
                    self.rpc("mend_lora")
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
        return self._server.log()

    def rpc(self, method: str, *args: str) -> Any:
        """Call a method of `hooks.Hooks`."""
        body = {"method": "fuzz", "args": [method, *args]}
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

    def run(self, steps: Sequence[Step], max_in_flight: int = MAX_IN_FLIGHT) -> list[Observation | None]:
        """What became of each request, None for events; returns when all have ended."""
        return asyncio.run(self._run(steps, max_in_flight))

    async def _run(self, steps: Sequence[Step], max_in_flight: int) -> list[Observation | None]:
        seen: list[Observation | None] = [None] * len(steps)
        self._disturbances.clear()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=over_http.TIMEOUT, limits=limits) as client:
            running: set[asyncio.Task] = set()
            for index, step in enumerate(steps):
                while len(running) >= max_in_flight:
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
        async def post(path: str, **body: Any) -> None:
            (await client.post(path, json=body)).raise_for_status()

        async def rpc(method: str, *args: str) -> None:
            await post("/collective_rpc", method=method, args=list(args))

        match step["do"]:
            case "fault":
                await rpc("fuzz", "inject", step["where"], step["place"], str(step["times"]))
            case "off":
                await rpc("fuzz", "off", step["place"])
            case "on":
                await rpc("fuzz", "calm")
            case "clear_memory":
                await rpc("aasd_clear_memory")
            case "reload_weights":
                await rpc("reload_weights")
            case "reset_prefix_cache":
                await post(f"/reset_prefix_cache?reset_running_requests={step['running']}")
            case "sleep":
                with self._disturbing(step["mode"]):
                    await post(f"/sleep?level={step['level']}&mode={step['mode']}")
                    await asyncio.sleep(step["for"] / 1000)
                    await post("/wake_up")
            case "load_adapter" if step["name"] not in self._loaded:
                with self._disturbing("adapter"):
                    path = self._adapters[step["name"]]
                    await post("/v1/load_lora_adapter", lora_name=step["name"], lora_path=path)
                self._loaded.add(step["name"])
            case "unload_adapter" if step["name"] in self._loaded:
                self._loaded.discard(step["name"])
                with self._disturbing("adapter"):
                    await post("/v1/unload_lora_adapter", lora_name=step["name"])

    def settle(self) -> tuple[list[Finding], dict[str, Any]]:
        """Wait until nothing runs, and say what isn't as it must be then; also what the worker told of itself."""
        self.rpc("calm")
        deadline, left, problems = time.monotonic() + _QUIET_SECONDS, {"": 1.0}, []
        while left and time.monotonic() < deadline:
            time.sleep(0.5)
            look, shown = self.rpc("look"), self.metrics()
            problems += [problem for problem in look["problems"] if problem not in problems]
            gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            left = {name: shown[name] for name in gauges if shown[name]} | look["held"]
            told = {
                name.rpartition(":")[2]: int(value)
                for name, value in shown.items()
                if name.startswith("aasd:faults_total:") and value
            }
            if told != look["faults"]:
                left["the page's faults"] = sum(told.values())
        findings = [Finding("leftover", None, f"{name}: {value:g}") for name, value in left.items()]
        findings += [Finding(what, None, detail) for what, detail in problems]
        log = self.log()
        findings += in_log(log[self._log_chars :])
        self._log_chars = len(log)
        return findings, look | {"metrics": shown}


def references(
    model: str, profile: str, steps: Sequence[Step], adapters: Mapping[str, str] | None = None
) -> dict[str, Reference]:
    """What the target says alone and without speculation to questions, by `cases.key`; each is asked once."""
    questions = {key(step): step for step in steps}
    if not questions:
        return {}
    asked: list[Step] = [{"do": "load_adapter", "name": name, "wait": 0} for name in adapters or ()]
    num_events = len(asked)
    for step in questions.values():
        sampling = {**step["sampling"], "logprobs": 5}
        for beside in ("prompt_logprobs", "logprob_token_ids"):
            sampling.pop(beside, None)
        # An embedded prompt has the answer of its tokens.
        plain = {"do": "ask", "sampling": sampling, "xargs": {}, "priority": 0, "wait": 0, "via": "completions"}
        asked.append({**plain, "prompt": step["prompt"], "adapter": step.get("adapter")})
    with ServerTarget(model, profile, adapters, plain=True) as target:
        seen = target.run(asked, max_in_flight=1)[num_events:]
    found = {}
    for name, one in zip(questions, seen, strict=True):
        assert one is not None and one.choices, f"{name}: {one and one.error[:300]}"
        choice = one.choices[0]
        likely = [{int(token.partition(":")[2]): at for token, at in top.items()} for _, top in choice.logprobs or ()]
        found[name] = Reference(choice.token_ids or [], choice.text, choice.finish_reason, likely)
    return found


def _option(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if value is True:
        return [option]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]


def _environment(v2: bool) -> dict[str, str]:
    support = pathlib.Path(__file__).parents[2]
    folders = [str(pathlib.Path(__file__).with_name("v2_site"))] if v2 else []
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOG_STATS_INTERVAL": "2",
        # vLLM binds threads to cores, which would undo a taskset.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join([*folders, str(support), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
