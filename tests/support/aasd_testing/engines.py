"""Real vLLM engines, each in a process of its own."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from aasd_testing.process import Process

_SWITCHES = ("gloo", "ahead")


@dataclasses.dataclass
class Round:
    """What became of requests that ran at once.

    Attributes:
        outputs: of each request, see `engine_process.described`.
        metrics: the increase of each counter, by name and own label.
        faults: by component, those that came up in this round.
        records: what was recorded, see `Engine.run`.
    """

    outputs: list[dict[str, Any]]
    metrics: dict[str, float]
    faults: dict[str, int]
    records: list[dict[str, Any]]

    @property
    def token_ids(self) -> list[list[int]]:
        """The emitted tokens of each output."""
        return [output["token_ids"] for output in self.outputs]

    @property
    def drafted(self) -> float:
        """Draft tokens, by vLLM's counter."""
        return self.metrics["vllm:spec_decode_num_draft_tokens"]

    @property
    def accepted(self) -> float:
        """Accepted draft tokens, by vLLM's counter."""
        return self.metrics["vllm:spec_decode_num_accepted_tokens"]


class Engine:
    """An engine that serves until `close`.

    Args:
        model: path of the checkpoint.
        aasd: keys of the speculative config; None for no speculation.
        v2: whether it has the V2 model runner, its kernels interpreted: about 11 tokens a second.
        **options: ``gloo`` and ``ahead`` (V2 only: see `v2_on_cpu`), and whatever `vllm.LLM` takes.
    """

    def __init__(self, model: str, aasd: dict[str, Any] | None = None, v2: bool = False, **options: Any) -> None:
        switches = {f"AASD_TEST_{name.upper()}": str(int(options.pop(name, False))) for name in _SWITCHES}
        if v2:
            # The CPU's attention takes blocks of whole 32 tokens there.
            options = {"max_num_seqs": 3, "block_size": 32, "max_model_len": 512, **options}
        is_alone = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1) == 1
        options = {
            "model": model,
            "dtype": "float32",
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "distributed_executor_backend": "uni" if is_alone else "mp",
            **options,
        }
        if aasd is not None:
            options["speculative_config"] = {"method": "aasd", "aasd_prior": "off", **aasd}
        environment = {**_ENVIRONMENT, **{name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}}
        # Deleted when closed, so nothing is left behind.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment |= {**switches, "AASD_TEST_V2": str(int(v2))}
        self._process = Process("aasd_testing.engine_process", environment, self._log)
        try:
            self._call("start", options)
        except BaseException:
            self.close()
            raise

    def run(self, requests: list[dict], fault: str | None = None, record: str | None = None) -> Round:
        """Serve requests at once.

        Args:
            requests: ``{"prompt": str | list[int], "sampling": {...}}`` each; with ``images``, a list of seeds, that
                many images of noise come with the prompt; with ``embeds`` true, it comes as embeddings; with
                ``adapter``, it is for the adapter at that path; ``salt`` is its ``cache_salt``.
            fault: a function of `FAULT_POINTS` that fails whenever it is called.
            record: ``store``, for what the store holds whenever drafts are asked for, or ``verification`` (V2 only),
                for what the verifier was asked and answered.
        """
        return Round(**self._call("run", requests, fault, record))

    def plant(self, token_id: int, predicted: int) -> None:
        """Fill the whole store with entries of a token that predict another, and have no prompt stored."""
        self._call("plant", token_id, predicted)

    def forget(self, how: str) -> None:
        """Have it forget earlier answers: by ``reset_prefix_cache``, or by a worker's method."""
        self._call("forget", how)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """What a worker's method returns, by ``collective_rpc``."""
        return self._call("rpc", method, args)

    def kernels(self) -> set[str]:
        """The modules of `vllm_aasd.kernels` that were imported."""
        return self._call("kernels")

    def log(self) -> str:
        """All that it has logged."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def close(self) -> None:
        """End its process."""
        self._process.close()
        self._log.close()

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return self._process.call(f"__main__:{name}", *args)
        except Exception as error:
            error.add_note(self.log()[-30000:])
            raise


# The engine, and a single worker, in that process: it can be looked into, and two starts of Python are saved. vLLM
# binds no OpenMP threads then, and several that share a busy core would wait for each other.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
# Ranks share the few cores there are.
_DEFAULTS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@contextlib.contextmanager
def engine(model: str, **options: Any) -> Iterator[Engine]:
    """An `Engine` that is closed at the end."""
    with contextlib.closing(Engine(model, **options)) as started:
        yield started


def greedy(prompts: list, max_tokens: int = 48, **sampling: Any) -> list[dict]:
    """Greedy requests."""
    params = {"temperature": 0.0, "max_tokens": max_tokens, **sampling}
    return [{"prompt": prompt, "sampling": params} for prompt in prompts]


def with_options(requests: list[dict], **options: Any) -> list[dict]:
    """The same requests with options of ours, beside those that they have."""
    return [
        {**request, "sampling": {**sampling, "extra_args": {**sampling.get("extra_args", {}), **options}}}
        for request in requests
        for sampling in [request["sampling"]]
    ]
