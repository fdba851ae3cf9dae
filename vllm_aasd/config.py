"""The settings of `aasd`: one typed, range-checked, documented list; the README's table is drawn from it."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_args

from vllm_aasd.kernels.mixture import MAX_TOP_K
from vllm_aasd.verification.policy import (
    FLOOR_RANGE,
    GUARD_COOLDOWN_RANGE,
    GUARD_LIMIT_RANGE,
    GUARD_MEMORY_RANGE,
)
from vllm_aasd.verification.registry import POLICIES

PREFIX = "aasd_"
"""What every key of ours begins with, beside vLLM's own keys in ``--speculative-config``."""

DEFAULT_NUM_SPECULATIVE_TOKENS = 8


def _setting(
    default: Any,
    doc: str,
    *,
    within: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "within": within, "choices": choices})


def parameter_key(policy: str, parameter: str) -> str:
    """The field of `Settings` that holds a parameter of a verification policy."""
    return parameter if policy == "conditional" else f"{policy}_{parameter}"


def _parameter(policy: str, parameter: str, default: Any, doc: str) -> Any:
    within = FLOOR_RANGE if parameter == "floor" else POLICIES[policy].ranges[parameter]
    return _setting(default, f"`{policy}`: {doc}", within=within)


_FLOOR = "the bar never falls under this probability."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The `aasd_*` keys of ``--speculative-config``, without their prefix."""

    draft: str = _setting(
        "mixture",
        "Where drafts come from: `mixture` is AASD; `ngram` is vLLM's own prompt look-up, with its "
        "`prompt_lookup_min` and `prompt_lookup_max`, for comparison.",
        choices=("mixture", "ngram"),
    )
    draft_length: int | str = _setting(
        "adaptive",
        "How many tokens are drafted, within `num_speculative_tokens`: `adaptive` drafts a token while it is "
        "worth its share of the next step's time, over the whole batch; a number is the most that each request "
        "gets, whatever the load.",
        choices=("adaptive",),
        within=(1, 128),
    )
    min_survival: float = _setting(
        0.02,
        "A draft ends before the token that would make it less likely than this to be accepted as a whole.",
        within=(0.0, 1.0),
    )
    prior: bool = _setting(
        True,
        "Draft from the model's prior too, where `python -m vllm_aasd.prior MODEL` has made one.",
    )
    memory: str = _setting(
        "off",
        "What other requests taught about short runs of tokens: `off`; `process` remembers it, at most 10 MiB, "
        "while the server runs; `file` also keeps it in the cache folder. Tenants share it: see README.",
        choices=("off", "process", "file"),
    )
    alignment: bool | str = _setting(
        "auto",
        "Store the target's predictions at prompt positions too, which takes one lm_head over the prompt; "
        "`auto` does where that was measured, at start-up, to cost at most 3 % of the prompt's time. At "
        "generated tokens they are free, and always stored.",
        choices=("auto",),
    )
    top_k: int = _setting(
        4,
        "Predictions stored per context position; each takes 8 bytes per KV-cache slot.",
        within=(1, MAX_TOP_K),
    )
    verification: str = _setting(
        "conditional",
        "How draft tokens are accepted: `strict` changes nothing in the output; the others also accept tokens that "
        "the target finds likely enough (`conditional`, `typical`), or at which it is undecided and agrees with what "
        "follows (`fly`), or whose loss a budget pays for (`budget`).",
        choices=tuple(POLICIES),
    )
    alpha: float = _parameter("conditional", "alpha", 0.1, "how much the bar falls per nat of entropy.")
    beta: float = _parameter("conditional", "beta", 0.5, "the bar at no entropy.")
    floor: float = _parameter("conditional", "floor", 0.3, _FLOOR)
    typical_epsilon: float = _parameter("typical", "epsilon", 0.09, "the bar at no entropy.")
    typical_delta: float = _parameter(
        "typical", "delta", 0.3, "the bar as a share of exp(-H), where that is less than epsilon."
    )
    typical_floor: float = _parameter("typical", "floor", 0.01, _FLOOR)
    fly_window: int = _parameter(
        "fly",
        "window",
        6,
        "how many draft tokens after a mismatch the target must agree with; `num_speculative_tokens` - 1 if that is "
        "less.",
    )
    fly_threshold: float = _parameter(
        "fly", "threshold", 0.3, "nats of entropy, over the three likeliest tokens, from which it is undecided."
    )
    fly_floor: float = _parameter("fly", "floor", 0.01, _FLOOR)
    budget_cap: float = _parameter("budget", "cap", 0.25, "the most nats of regret of an accepted token.")
    budget_per_step: int = _parameter("budget", "per_step", 2, "the most relaxed tokens of a request in a step.")
    budget_nats: float = _parameter(
        "budget", "nats", 2.0, "nats that a request may lose in all, of regret or KL divergence; 0 is strict."
    )
    budget_kappa: float = _parameter(
        "budget", "kappa", 0.02, "in sampled requests, the most nats of KL divergence at a position."
    )
    budget_floor: float = _parameter("budget", "floor", 0.01, _FLOOR)
    relax_sampling: bool = _setting(
        False,
        "Relax sampled requests (temperature > 0) too. It pulls their samples towards the draft; by default they are "
        "verified strictly and keep the target's distribution.",
    )
    relax_structured: bool = _setting(
        False,
        "Relax requests with structured output too; by default what a grammar constrains is verified strictly.",
    )
    relax_logprobs: bool = _setting(
        False,
        "Relax requests that ask for log-probabilities of their output too; by default they are verified strictly.",
    )
    collapse_guard: bool = _setting(
        True,
        "Verify a request strictly for a while when its relaxed tokens come too close to each other, which is how a "
        "model is led into copying.",
    )
    guard_limit: float = _setting(
        1.4,
        "Collapse guard: the most relaxed tokens within its memory.",
        within=GUARD_LIMIT_RANGE,
    )
    guard_memory: float = _setting(
        64.0,
        "Collapse guard: tokens after which a relaxed token counts for 1/e.",
        within=GUARD_MEMORY_RANGE,
    )
    guard_cooldown: float = _setting(
        32.0,
        "Collapse guard: tokens for which a request is strict.",
        within=GUARD_COOLDOWN_RANGE,
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Settings":
        """Read the settings from the `aasd_*` keys of a speculative config.

        Args:
            values: ``{"aasd_top_k": 2, ...}``; keys without the prefix are an error of the caller.

        Raises:
            ValueError: for an unknown key, a value of the wrong type or out of range; the text names the
                key, the value and what is allowed.
        """
        fields = {PREFIX + field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"Unknown setting {key!r}.{hint} Known: {', '.join(sorted(fields))}.")
        return cls(**{fields[key].name: _checked(fields[key], value) for key, value in values.items()})

    def describe(self) -> str:
        """The settings in force, as `aasd_name=value` words."""
        return " ".join(f"{PREFIX}{name}={value}" for name, value in dataclasses.asdict(self).items())


def allowed(field: dataclasses.Field) -> str:
    """What a field of `Settings` accepts, in words."""
    kinds = _kinds(field)
    words = [repr(choice) for choice in field.metadata["choices"]]
    if bool in kinds:
        words += ["true", "false"]
    elif field.metadata["within"]:
        low, high = field.metadata["within"]
        words.append(f"{'an integer' if int in kinds else 'a number'} from {low:g} to {high:g}")
    return " or ".join(words)


def settings_table() -> str:
    """The settings as a Markdown table, as the README holds it."""
    rows = ["| key | default | allowed | what it does |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(Settings):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        rows.append(f"| `{PREFIX}{field.name}` | `{default}` | {allowed(field)} | {field.metadata['doc']} |")
    return "\n".join(rows)


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return get_args(field.type) or (field.type,)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    kinds = _kinds(field)
    if type(value) is str and value in field.metadata["choices"]:
        return value
    if type(value) is bool and bool in kinds:
        return value
    # JSON writes 1.0 as 1.
    if type(value) in (int, float) if float in kinds else type(value) is int and int in kinds:
        low, high = field.metadata["within"]
        if low <= value <= high:
            return float(value) if float in kinds else value
    raise ValueError(f"{PREFIX}{field.name}={value!r} is not allowed: it takes {allowed(field)}.")
