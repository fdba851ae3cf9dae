"""The real ``vllm serve``: a case is run against it over HTTP, and its state is checked when it is idle."""

import asyncio
import collections
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx

from aasd_testing.engines import engine
from aasd_testing.fuzz import client
from aasd_testing.fuzz.cases import Case, Event
from aasd_testing.fuzz.checks import Finding, Reference, check_log
from aasd_testing.fuzz.client import Response
from aasd_testing.fuzz.profiles import CORPORA, FLEETING, Profile
from aasd_testing.fuzz.prompts import Prompts
from aasd_testing.fuzz.request_types import Request
from aasd_testing.server import Server

MAX_IN_FLIGHT = 24
"""Requests that are sent before one has ended; three times what the engine runs at once."""

_IDLE_SECONDS = 30.0


class ServerTarget:
    """A server for the fuzzer, from `__enter__` to `__exit__`.

    Args:
        model: path of the checkpoint.
        profile: what to start.
        prompts: for embeddings.
        adapters: paths by name, for a profile that has them.
        mutant: of `hooks.MUTANTS`, to see that it is noticed.
    """

    def __init__(
        self,
        model: str,
        profile: Profile,
        prompts: Prompts,
        adapters: Mapping[str, str] | None = None,
        mutant: str = "",
    ) -> None:
        self._prompts, self._mutant = prompts, mutant
        self._log_chars = 0
        arguments = [argument for name, value in profile.engine.items() for argument in _option(name, value)]
        arguments += ["--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        draft_model = {"model": model} if "draft_model" in profile.features else {}
        arguments += ["--speculative-config", json.dumps({"method": "aasd", **draft_model, **profile.aasd})]
        arguments += ["--worker-extension-cls", "aasd_testing.fuzz.hooks.FuzzHooks"]
        if adapters:
            arguments += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
        self._server = Server(model, arguments, _environment(profile.runner == "V2"))

    def __enter__(self) -> Self:
        self._server.__enter__()
        try:
            self._hook("begin", self._mutant)
        except BaseException:
            self._server.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.__exit__(*exception)

    def log(self) -> str:
        """All that it has logged."""
        return self._server.log()

    def _hook(self, method: str, *args: str) -> Any:
        """Call a method of `hooks.Hooks`."""
        body = {"method": "fuzz", "args": [method, *args]}
        answer = httpx.post(f"{self._server.url}/collective_rpc", json=body, timeout=120)
        answer.raise_for_status()
        return answer.json()["results"][0]

    def run(self, case: Case) -> list[Response | None]:
        """The response of each request, None for events; returns when all have ended."""
        return asyncio.run(self._run(case))

    async def _run(self, case: Case) -> list[Response | None]:
        responses: list[Response | None] = [None] * len(case)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=client.TIMEOUT, limits=limits) as connection:

            async def send(index: int, request: Request) -> None:
                responses[index] = await client.send(connection, request, self._prompts)

            running: set[asyncio.Task] = set()
            for index, step in enumerate(case):
                while len(running) >= MAX_IN_FLIGHT:
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if isinstance(step, Request):
                    running.add(asyncio.create_task(send(index, step)))
                else:
                    async with asyncio.timeout(client.TIMEOUT):
                        await _trigger(connection, step)
                await asyncio.sleep(step.wait / 1000)
            await asyncio.gather(*running)
        return responses

    def check_idle(self) -> tuple[list[Finding], dict[str, Any]]:
        """Wait until nothing runs; what is wrong then, and what the worker and ``/metrics`` report."""
        self._hook("recover")
        deadline, left, problems = time.monotonic() + _IDLE_SECONDS, {"": 1.0}, []
        while left and time.monotonic() < deadline:
            time.sleep(0.5)
            state, metrics = self._hook("inspect"), collections.Counter()
            shown: dict[str, float] = {}
            for (name, *labels), value in self._server.metrics().items():
                metrics[name] += value
                if name == "aasd:faults_total" and value:
                    shown[dict(labels)["place"]] = value
            problems = state["problems"]
            gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            left = {name: metrics[name] for name in gauges if metrics[name]} | state["held"]
            if shown != state["faults"]:
                left["faults in /metrics"] = sum(shown.values())
        findings = [Finding("leftover", f"{name}: {value:g}") for name, value in left.items()]
        findings += [Finding(what, detail) for what, detail in problems]
        log = self.log()
        findings += check_log(log[self._log_chars :])
        self._log_chars = len(log)
        return findings, {**state, "metrics": metrics}


async def _trigger(connection: httpx.AsyncClient, event: Event) -> None:
    async def post(path: str, **body: Any) -> None:
        (await connection.post(path, json=body)).raise_for_status()

    async def rpc(method: str, *args: str) -> None:
        await post("/collective_rpc", method=method, args=list(args))

    arguments = event.arguments
    match event.name:
        case "inject" | "turn_off" | "recover":
            await rpc("fuzz", event.name, *map(str, arguments.values()))
        case "clear_memory":
            await rpc("aasd_clear_memory")
        case "add_corpus":
            await rpc("aasd_add_corpus", *arguments.values())
        case "add_and_drop_corpus":
            await rpc("aasd_add_corpus", FLEETING, CORPORA["guide"])
            await asyncio.sleep(arguments["seconds"])
            await rpc("aasd_drop_corpus", FLEETING)
        case "reload_weights":
            await rpc("reload_weights")
        case "reset_prefix_cache":
            await post(f"/reset_prefix_cache?reset_running_requests={arguments['running']}")
        case "sleep":
            await post(f"/sleep?level={arguments['level']}&mode={arguments['mode']}")
            await asyncio.sleep(arguments["seconds"])
            await post("/wake_up")
        case _:
            raise ValueError(f"event {event.name!r} is unknown")


def references(
    model: str, profile: Profile, requests: Sequence[Request], adapters: Mapping[str, str]
) -> list[Reference]:
    """The answers of an engine without speculation, on the V1 model runner, to one request after the other."""
    asked = []
    for request in requests:
        # With embeddings, the answer is that to their tokens.
        sampling = {**request.sampling, "logprobs": 5}
        sampling.pop("logprob_token_ids", None)
        adapter = adapters[request.adapter] if request.adapter else None
        asked.append({"prompt": request.prompt, "sampling": sampling, "adapter": adapter})
    names = ("max_model_len", "block_size", "reasoning_config")
    options = {name: value for name, value in profile.engine.items() if name in names or "lora" in name}
    # Log-probabilities are those that tokens are chosen by: penalties and masks included.
    options |= {"max_num_seqs": 1, "enable_prefix_caching": False, "logprobs_mode": "processed_logprobs"}
    with engine(model, **options) as plain:
        outputs = plain.run(asked).outputs
    return [
        Reference(output["token_ids"], output["text"], output["finish_reason"], output["logprobs"])
        for output in outputs
    ]


def _option(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if value is True:
        return [option]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]


def _environment(is_v2: bool) -> dict[str, str]:
    support = pathlib.Path(__file__).parents[2]
    # Its sitecustomize.py prepares every process of the server.
    folders = [str(pathlib.Path(__file__).with_name("v2_site"))] if is_v2 else []
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        # Else vLLM's CPU platform makes every worker a process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOG_STATS_INTERVAL": "2",
        # vLLM binds threads to cores, which would undo a taskset.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join([*folders, str(support), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
