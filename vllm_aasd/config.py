"""The settings of `aasd`: one typed, range-checked, documented list; the README's table is drawn from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_aasd.fields import PREFIX, allowed, checked, refuse_unknown, setting
from vllm_aasd.kernels.common.mixture import MAX_TOP_K
from vllm_aasd.verification.policy import (
    FLOOR_RANGE,
    GUARD_COOLDOWN_RANGE,
    GUARD_LIMIT_RANGE,
    GUARD_MEMORY_RANGE,
)
from vllm_aasd.verification.registry import POLICIES

NUM_SPECULATIVE_TOKENS, NUM_SPECULATIVE_TOKENS_V1 = 8, 16
"""`num_speculative_tokens` where nobody sets it, in general, and for the mixture on the V1 model runner without adapters.

The longest draft that the adaptive length may choose: 16 let answers that copy emit 4 % more tokens a step than 8 do
(`benchmarks.drafter_quality`), and cost nothing where they aren't worth it. On V2 steps are as wide as the longest draft,
and with adapters vLLM wants room for so many tokens of every request in a batch.
"""

DRAFT_SCHEDULE = ((4, 8), (16, 4), (49, 2), (128, 1))
"""Up to how many requests at once the longest draft is how long at first, and none beyond, where a step takes the time of the
longest draft whatever is drafted: on the V2 model runner with asynchronous scheduling. What is best is learnt from there, among
these lengths and none (`vllm_aasd.drafting.widths`).

By the projection of fixed lengths (`benchmarks.projection`): none of them is slower than no speculation on any accelerator
and model under any of its assumptions, and up to 128 requests each is within 3 % of the best length's speed in the mean. And
until it is learnt that nothing is ever accepted, they cost at most a tenth (of 300 steps, `tests/test_widths.py`): together
that leaves little choice of the 49.
"""

NUM_SPECULATIVE_TOKENS_UNSCHEDULED = 2
"""`num_speculative_tokens` there where vLLM leaves a schedule out, under data parallelism."""


def parameter_key(policy: str, parameter: str) -> str:
    """The field of `Settings` that holds a parameter of a verification policy."""
    return parameter if policy == "conditional" else f"{policy}_{parameter}"


def _parameter(policy: str, parameter: str, default: Any, looser: str, doc: str) -> Any:
    within = FLOOR_RANGE if parameter == "floor" else POLICIES[policy].ranges[parameter]
    return setting(default, f"`{policy}`: {doc}", within=within, rule=policy, looser=looser)


_FLOOR = "the bar never falls under this probability."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The `aasd_*` keys of ``--speculative-config``, without their prefix."""

    enabled: bool = setting(
        True,
        "Whether requests are sped up at all. In a request, `false` switches speculation off for it; where the "
        "server has `false`, only requests that say `true` are sped up.",
        looser="none",
    )
    draft: str = setting(
        "mixture",
        "Where drafts come from: `mixture` is AASD; `ngram` is vLLM's own prompt look-up, with its "
        "`prompt_lookup_min` and `prompt_lookup_max`, for comparison.",
        choices=("mixture", "ngram"),
    )
    draft_length: int | str = setting(
        "adaptive",
        "How many tokens are drafted, within `num_speculative_tokens`: `adaptive` drafts a token while it is "
        "worth its share of the next step's time, over the whole batch (on the V2 model runner one number for "
        "all requests, see the limits); a number is the most that each request gets, whatever the load.",
        choices=("adaptive",),
        within=(1, 128),
    )
    min_survival: float = setting(
        0.02,
        "A draft ends before the token that would make it less likely than this to be accepted as a whole; but not "
        "where more tokens were measured to make a step faster, as some CPU kernels do (V1 model runner).",
        within=(0.0, 1.0),
    )
    prior: bool = setting(
        True,
        "Draft from the model's prior too, where `python -m vllm_aasd.prior MODEL` has made one.",
    )
    memory: str = setting(
        "off",
        "What other requests taught about short runs of tokens: `off`; `process` remembers it, at most 10 MiB, "
        "while the server runs; `file` also keeps it in the cache folder. Tenants share it: see README.",
        choices=("off", "process", "file"),
    )
    alignment: bool | str = setting(
        "auto",
        "Store the target's predictions at prompt positions too, which takes one lm_head over the prompt; `false` "
        "stores those at generated tokens, which are free. `auto` stores both where that was measured, at start-up, to "
        "cost at most 3% of the prompt's time; elsewhere none on the V1 model runner, unless `aasd_memory` learns from "
        "them, for at generated tokens alone they gain nothing.",
        choices=("auto",),
    )
    top_k: int = setting(
        4,
        "Predictions stored per context position; each takes 8 bytes per KV-cache slot.",
        within=(1, MAX_TOP_K),
    )
    verification: str = setting(
        "conditional",
        "How draft tokens are accepted: `strict` changes nothing in the output; the others also accept tokens that "
        "the target finds likely enough (`conditional`, `typical`), or at which it is undecided and agrees with what "
        "follows (`fly`), or whose loss a budget pays for (`budget`).",
        choices=tuple(POLICIES),
        looser="other",
    )
    alpha: float = _parameter("conditional", "alpha", 0.1, "higher", "how much the bar falls per nat of entropy.")
    beta: float = _parameter("conditional", "beta", 0.5, "lower", "the bar at no entropy.")
    floor: float = _parameter("conditional", "floor", 0.3, "lower", _FLOOR)
    typical_epsilon: float = _parameter("typical", "epsilon", 0.09, "lower", "the bar at no entropy.")
    typical_delta: float = _parameter(
        "typical", "delta", 0.3, "lower", "the bar as a share of exp(-H), where that is less than epsilon."
    )
    typical_floor: float = _parameter("typical", "floor", 0.01, "lower", _FLOOR)
    fly_window: int = _parameter(
        "fly",
        "window",
        6,
        "lower",
        "how many draft tokens after a mismatch the target must agree with; `num_speculative_tokens` - 1 if that is "
        "less.",
    )
    fly_threshold: float = _parameter(
        "fly",
        "threshold",
        0.3,
        "lower",
        "nats of entropy, over the three likeliest tokens, from which it is undecided.",
    )
    fly_floor: float = _parameter("fly", "floor", 0.01, "lower", _FLOOR)
    budget_cap: float = _parameter("budget", "cap", 0.25, "higher", "the most nats of regret of an accepted token.")
    budget_per_step: int = _parameter(
        "budget", "per_step", 2, "higher", "the most relaxed tokens of a request in a step."
    )
    budget_nats: float = _parameter(
        "budget", "nats", 2.0, "higher", "nats that a request may lose in all, of regret or KL divergence; 0 is strict."
    )
    budget_kappa: float = _parameter(
        "budget", "kappa", 0.02, "higher", "in sampled requests, the most nats of KL divergence at a position."
    )
    budget_floor: float = _parameter("budget", "floor", 0.01, "lower", _FLOOR)
    relax_sampling: bool = setting(
        False,
        "Relax sampled requests (temperature > 0) too. It pulls their samples towards the draft; by default they are "
        "verified strictly and keep the target's distribution.",
        looser="higher",
    )
    relax_structured: bool = setting(
        False,
        "Relax requests with structured output too; by default what a grammar constrains is verified strictly.",
        looser="higher",
    )
    relax_logprobs: bool = setting(
        False,
        "Relax requests that ask for log-probabilities of their output too; by default they are verified strictly.",
        looser="higher",
    )
    collapse_guard: bool = setting(
        True,
        "Verify a request strictly for a while when its relaxed tokens come too close to each other, which is how a "
        "model is led into copying.",
        looser="lower",
    )
    guard_limit: float = setting(
        1.4,
        "Collapse guard: the most relaxed tokens within its memory.",
        within=GUARD_LIMIT_RANGE,
        looser="higher",
    )
    guard_memory: float = setting(
        64.0,
        "Collapse guard: tokens after which a relaxed token counts for 1/e.",
        within=GUARD_MEMORY_RANGE,
        looser="lower",
    )
    guard_cooldown: float = setting(
        32.0,
        "Collapse guard: tokens for which a request is strict.",
        within=GUARD_COOLDOWN_RANGE,
        looser="lower",
    )
    allow_request_override: str = setting(
        "stricter",
        "What a request may change for itself, of the keys marked here: `no` for nothing; `stricter` for "
        "`aasd_enabled`, and verification that accepts no more than the server's own; `any` for all of them.",
        choices=("no", "stricter", "any"),
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
        refuse_unknown("setting", values, fields)
        return cls(**{fields[key].name: checked(fields[key], value) for key, value in values.items()})

    def describe(self) -> str:
        """The settings in force, as `aasd_name=value` words."""
        return " ".join(f"{PREFIX}{name}={value}" for name, value in dataclasses.asdict(self).items())


def settings_table() -> str:
    """The settings as a Markdown table, as the README holds it."""
    rows = ["| key | default | allowed | in a request | what it does |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(Settings):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        request = "yes" if field.metadata["looser"] else ""
        key = f"`{PREFIX}{field.name}`"
        rows.append(f"| {key} | `{default}` | {allowed(field)} | {request} | {field.metadata['doc']} |")
    return "\n".join(rows)
