"""The methods that are compared: their speculative configs, their labels, and which of them promise what."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.engine.model_key import model_key

METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 5},
    "suffix": {"method": "suffix"},
    "aasd": {"method": "aasd"},
}
"""By name: vLLM's own at settings that are good for it, and aasd as it is shipped."""

SUFFIX_NEEDS = "suffix needs `pip install --no-deps arctic-inference==0.1.1`"
PANDAS_NEEDED = "`vllm bench serve` needs `pip install vllm-aasd[bench]` (pandas) for prompts from a file"

NEAR_TIE = {"bfloat16": 0.5, "float16": 0.1, "float32": 1e-3}
"""Nats between two tokens that an exact method and plain decoding may swap, by dtype.

A bfloat16 logit between 16 and 32 is a multiple of 0.125, and what reaches it has been rounded in every
layer; in float16 the multiple is 0.016. In float32 only the order of summation is left.
"""


class MissingPackage(RuntimeError):
    """A method needs a package that isn't installed; the text says how to install it."""


def require(methods: Sequence[str]) -> None:
    """Look whether what the methods need is installed.

    Raises:
        MissingPackage: if it isn't.
    """
    if "suffix" in methods and importlib.util.find_spec("arctic_inference") is None:
        raise MissingPackage(SUFFIX_NEEDS)


def require_pandas() -> None:
    """Look whether what ``vllm bench serve`` reads files of prompts with is installed.

    Raises:
        MissingPackage: if it isn't.
    """
    if importlib.util.find_spec("pandas") is None:
        raise MissingPackage(PANDAS_NEEDED)


def without_missing(names: Sequence[str]) -> list[str]:
    """The methods whose packages are installed; what is left out is said."""
    try:
        require(names)
    except MissingPackage as error:
        print(f"suffix is left out: {error}", file=sys.stderr)
        return [name for name in names if name != "suffix"]
    return list(names)


def chosen(names: Sequence[str], variants: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """The speculative config of each run, by label.

    Args:
        names: of `METHODS`.
        variants: of aasd, each its settings.
    """
    pairs = [(name, METHODS[name]) for name in names]
    pairs += [(label(settings), METHODS["aasd"] | settings) for settings in variants]
    return dict(pairs)


def label(settings: dict[str, Any]) -> str:
    """How a variant of aasd is called: its settings, without their prefix."""
    words = [f"{key.removeprefix('aasd_')}={value}" for key, value in settings.items() if key != "method"]
    return " ".join(["aasd", *words])


def has_prior(model: str, chosen: Mapping[str, dict[str, Any] | None]) -> bool:
    """Whether there is a prior of the model; said where there is none and a method would draft from it.

    Args:
        model: a folder, or a name.
        chosen: the methods' speculative configs.
    """
    key = model_key(model)
    path = key and prior_file.cache_path(key)
    if path and path.exists():
        return True
    if any(config and config["method"] == "aasd" and config.get("aasd_prior", True) for config in chosen.values()):
        where = path or "no files of the model here"
        print(f"aasd runs without a prior ({where}): python -m vllm_aasd.prior makes it", file=sys.stderr, flush=True)
    return False


def is_exact(speculative_config: dict[str, Any] | None) -> bool:
    """Whether the method promises the greedy answers of plain decoding."""
    if speculative_config is None or speculative_config["method"] != "aasd":
        return True
    return speculative_config.get("aasd_verification") == "strict"


def settings(text: str) -> dict[str, Any]:
    """Read a variant from the command line: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} isn't JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a JSON object")
    return value
