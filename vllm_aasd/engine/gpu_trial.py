"""The parts of `vllm_aasd.gpu_check` that need vLLM: its own kernels for comparison, and engines that serve a model."""

import contextlib
import gc
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from vllm import LLM, SamplingParams

from vllm_aasd.engine import diagnosis

STRICT = {"method": "aasd", "aasd_verification": "strict"}


class Served(NamedTuple):
    """The models to serve, and the requests to send them.

    Attributes:
        small: sizes of a model with random weights, for transformers' ``LlamaConfig``.
        large: sizes of the model whose speed is measured; its weights are vLLM's dummy weights.
        options: more engine arguments.
        blocks: KV cache blocks, few enough that requests are preempted; None for as many as fit.
        at_once: the numbers of concurrent requests at which speed is measured.
        max_tokens: tokens per answer.
        draws: requests in the check of sampling.
    """

    small: dict[str, int]
    large: dict[str, int]
    options: dict[str, Any]
    blocks: int | None
    at_once: tuple[int, ...]
    max_tokens: int
    draws: int


SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
FULL = Served(
    SMALL | {"num_key_value_heads": 4, "vocab_size": 32000},
    LARGE | {"num_key_value_heads": 8, "vocab_size": 128256},
    # Without Inductor, which would add a minute to each start.
    {
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.8,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    },
    120,
    (1, 8, 64, 256),
    64,
    1500,
)


def check_doctor() -> str:
    """Check that the doctor finds no changes in vLLM."""
    lines, works = diagnosis.diagnose()
    if not works:
        raise AssertionError("; ".join(lines))
    return lines[0]


def stock_calls(step: Any) -> dict[str, Callable[[], Any]]:
    """Calls of vLLM's rejection sampler and ``ngram_gpu`` speculator on the same inputs."""
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    given, draft = step.verify._asdict(), step.draft
    for ours in ("policies", "stop_token_ids", "num_drafts", "survival", "totals", "all_greedy"):
        del given[ours]
    num_reqs, width = draft.draft_token_ids.shape
    max_num_reqs, max_model_len = draft.all_token_ids.shape
    spec = {"prompt_lookup_min": 2, "prompt_lookup_max": 5, "num_speculative_tokens": width}
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(**spec),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_reqs),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )
    tensors = {"all_token_ids": draft.all_token_ids, "total_len": draft.total_len}
    states = SimpleNamespace(**{name: SimpleNamespace(gpu=tensor) for name, tensor in tensors.items()})
    speculator: Any = NgramGPUSpeculator(config, draft.all_token_ids.device, states)
    batch = SimpleNamespace(num_reqs=num_reqs, idx_mapping=draft.idx_mapping)
    ones = draft.num_sampled
    last = torch.zeros((max_num_reqs, 1), dtype=torch.int64, device=ones.device)
    return {
        "vLLM's rejection_sample": lambda: rejection_sample(draft_logits=None, **given),
        "vLLM's ngram_gpu": lambda: speculator.propose(batch, *[None] * 4, ones, ones, last, *[None] * 3),
    }


def make_model(folder: Path, sizes: dict[str, int], weights: bool) -> str:
    """Save a Llama of these sizes, with random weights that give peaked distributions, or without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # The large range spreads the logits by more than rounding errors.
    config = LlamaConfig(**sizes, max_position_embeddings=131072, initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    if weights:
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    return str(folder)


@contextlib.contextmanager
def engine(model: str, speculative: dict[str, Any] | None, **options: Any) -> Iterator[LLM]:
    """Start an engine, and free its memory afterwards."""
    served = LLM(
        model=model, speculative_config=speculative, skip_tokenizer_init=True, disable_log_stats=False, **options
    )
    try:
        yield served
    finally:
        served.llm_engine.engine_core.shutdown()
        del served
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def prompts(count: int, length: int, vocab_size: int, planted: bool) -> list[dict[str, list[int]]]:
    """Random token ids: a motif of 24 tokens that repeats if `planted`, otherwise nothing that repeats."""
    rng = np.random.default_rng(count)
    found = []
    for _ in range(count):
        tokens = np.resize(rng.integers(3, vocab_size, 24), length) if planted else rng.integers(3, vocab_size, length)
        found.append({"prompt_token_ids": tokens.tolist()})
    return found


def answers(served: LLM, asked: list[Any], params: Any) -> list[list[int]]:
    """Generate, and return each answer's token ids."""
    return [list(one.outputs[0].token_ids) for one in served.generate(asked, params, use_tqdm=False)]


def metric(served: LLM, name: str) -> float:
    """The value of one of vLLM's counters, summed over its series."""
    return sum(getattr(one, "value", 0) for one in served.get_metrics() if one.name == f"vllm:{name}")


def faults(served: LLM) -> dict[str, int]:
    """The faults that the engine's workers have counted, by component."""
    counts: Counter[str] = Counter()
    for of_worker in served.collective_rpc("aasd_faults"):
        counts.update({name: number for name, number in of_worker.items() if number})
    return dict(counts)


def check_served(sizes: Served, how: dict[str, Any] | None = None) -> str:
    """Check that strict greedy answers equal those without speculation, and that samples follow the same distribution.

    The engines run in float32 with vLLM's defaults (CUDA graphs, asynchronous scheduling, prefix caching), and with few
    enough KV cache blocks that requests are preempted.
    """
    vocab_size, tokens = sizes.small["vocab_size"], sizes.max_tokens
    options = sizes.options | {"dtype": "float32"} | ({"num_gpu_blocks_override": sizes.blocks} if sizes.blocks else {})
    asked = [*prompts(17, 100, vocab_size, True), *prompts(16, 60, vocab_size, False)][: max(sizes.at_once)]
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "small"), sizes.small, weights=True)
        for offset, speculative in ((0, None), (sizes.draws, STRICT | (how or {}))):
            with engine(model, speculative, **options) as served:
                # One request alone, then all at once, then all again with their prompts in the prefix cache.
                said = [answers(served, asked[:1], greedy), *(answers(served, asked, greedy) for _ in range(2))]
                drawn = _draws(served, asked[0], sizes.draws, offset)
                seen = {name: metric(served, name) for name in ("num_preemptions", "prefix_cache_hits")}
                seen["accepted"] = metric(served, "spec_decode_num_accepted_tokens")
                found.append((said, drawn, seen, faults(served) if speculative else {}))
    (plain, plain_drawn, _, _), (ours, drawn, seen, wrong) = found
    if wrong:
        raise AssertionError(f"faults: {wrong}")
    if ours != plain:
        pairs = [pair for both in zip(ours, plain, strict=True) for pair in zip(*both, strict=True)]
        differ = [number for number, (one, other) in enumerate(pairs) if one != other]
        raise AssertionError(
            f"{len(differ)} of {len(pairs)} answers differ from those without speculation: {differ[:8]}"
        )
    if not all(number for name, number in seen.items() if sizes.blocks or name != "num_preemptions"):
        raise AssertionError(f"the run didn't cover what it should: {seen}")
    p = _same_distribution(plain_drawn, drawn)
    if p < 1e-4:
        raise AssertionError(f"sampled tokens have another distribution, p = {p:.1e}: {plain_drawn} and {drawn}")
    return f"{len(ours[1])} answers equal, p = {p:.2f} of {sizes.draws} draws, {seen}"


def _draws(served: LLM, asked: Any, count: int, first_seed: int) -> Counter:
    """Sample three tokens in each of `count` requests, and count them by position and token id."""
    params = [
        SamplingParams(
            temperature=1.0, max_tokens=3, seed=first_seed + i, allowed_token_ids=[*range(3, 9)], detokenize=False
        )
        for i in range(count)
    ]
    return Counter(
        (at, token) for answer in answers(served, [asked] * count, params) for at, token in enumerate(answer)
    )


def _same_distribution(one: Counter, other: Counter) -> float:
    """The p-value of a chi-square test that two samples of equal size have one distribution (Wilson-Hilferty)."""
    cells = {cell for cell in one | other if one[cell] + other[cell] >= 10}
    chi = sum((one[cell] - other[cell]) ** 2 / (one[cell] + other[cell]) for cell in cells)
    freedom = max(len(cells) - len({at for at, _ in cells}), 1)
    deviate = ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(deviate / math.sqrt(2))


def check_steady(sizes: Served) -> str:
    """Check that serving never waits for the device or compiles a kernel; vLLM is set to end the engine if it does."""
    requests = prompts(9, 80, sizes.small["vocab_size"], True)[: max(sizes.at_once)]
    mixed = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=sizes.max_tokens, detokenize=False, ignore_eos=True)
        for i in range(len(requests))
    ]
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, VLLM_GPU_SYNC_CHECK="error"):
        model = make_model(Path(folder, "small"), sizes.small, weights=True)
        with engine(model, STRICT, dtype="bfloat16", jit_monitor_mode="error", **sizes.options) as served:
            for count in (1, len(requests)):
                answers(served, requests[:count], mixed[:count])
            wrong = faults(served)
    if wrong:
        raise AssertionError(f"faults: {wrong}")
    return f"{len(requests)} greedy and sampled requests"


def check_speed(sizes: Served, free_bytes: int, least: float = 0.95) -> str:
    """Measure tokens per second with and without aasd; no case may be slower than `least` times plain decoding."""
    large = dict(sizes.large)
    while free_bytes < 2.5 * 12 * large["hidden_size"] ** 2 * large["num_hidden_layers"]:
        large["num_hidden_layers"] //= 2
    rates: dict[str, list[float]] = {}
    options = {**sizes.options, "max_num_seqs": max(sizes.at_once)}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "large"), large, weights=False)
        for speculative in (None, {"method": "aasd"}):
            with engine(model, speculative, load_format="dummy", dtype="bfloat16", **options) as served:
                for count in sizes.at_once:
                    for planted in (True, False):
                        params = SamplingParams(
                            temperature=0.0 if planted else 1.0,
                            max_tokens=sizes.max_tokens,
                            ignore_eos=True,
                            detokenize=False,
                        )
                        # The first run is a warm-up: step times aren't known yet.
                        for _ in range(2):
                            began = time.perf_counter()
                            said = answers(served, prompts(count, 128, large["vocab_size"], planted), params)
                            seconds = time.perf_counter() - began
                        name = f"{count} requests, {'planted' if planted else 'nothing'} to find"
                        rates.setdefault(name, []).append(sum(map(len, said)) / seconds)
    shown = [f"{name}: {plain:.0f} and {ours:.0f} tokens/s" for name, (plain, ours) in rates.items()]
    if any(ours < least * plain for plain, ours in rates.values()):
        raise AssertionError("; ".join(shown))
    return "; ".join(shown)
