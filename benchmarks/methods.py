"""The methods that are compared: their speculative configs, their labels, and which of them promise exact answers."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_aasd.drafting import prior
from vllm_aasd.engine.model_key import model_key

Config = dict[str, Any] | None

METHODS: dict[str, Config] = {
    "none": None,
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 5},
    "suffix": {"method": "suffix"},
    "aasd": {"method": "aasd"},
}
"""By name: no speculation, vLLM's own at settings that are good for it, and aasd at its defaults."""

NEAR_TIE = {"bfloat16": 0.5, "float16": 0.1, "float32": 1e-3}
"""Nats between two tokens that an exact method and plain decoding may swap, by dtype.

A bfloat16 logit between 16 and 32 is a multiple of 0.125, and what reaches it has been rounded in every layer; in
float16 the multiple is 0.016. In float32 only the order of summation is left.
"""


def chosen(names: Sequence[str], variants: Sequence[dict[str, Any]]) -> dict[str, Config]:
    """The speculative configs to run, by label.

    Args:
        names: of `METHODS`.
        variants: settings of aasd, each a further method.

    Raises:
        ValueError: a method needs a package that isn't installed.
    """
    if "suffix" in names and importlib.util.find_spec("arctic_inference") is None:
        raise ValueError("suffix needs `pip install --no-deps arctic-inference==0.1.1`")
    found: dict[str, Config] = {name: METHODS[name] for name in names}
    for settings in variants:
        if not isinstance(settings, dict):
            raise ValueError(f"--aasd takes JSON objects, not {settings!r}")
        words = [f"{key.removeprefix('aasd_')}={value}" for key, value in settings.items()]
        found[" ".join(["aasd", *words])] = {"method": "aasd", **settings}
    return found


def has_prior(model: str, methods: Mapping[str, Config]) -> bool:
    """Whether the model has a prior; printed where it has none and a method would use it."""
    key = model_key(model)
    path = key and prior.cache_path(key)
    if path and path.exists():
        return True
    if any(config and config["method"] == "aasd" and config.get("aasd_prior") != "off" for config in methods.values()):
        where = path or "the model isn't on this machine"
        print(f"aasd has no prior yet ({where}); python -m vllm_aasd.prior makes it", file=sys.stderr, flush=True)
    return False


def is_exact(config: Config) -> bool:
    """Whether the method promises the greedy answers of plain decoding."""
    return config is None or config["method"] != "aasd" or config.get("aasd_verification") == "strict"
