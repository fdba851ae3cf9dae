"""The settings of `aasd`: one typed, range-checked, documented list. The docs' table is generated from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_aasd.fields import PREFIX, allowed, checked, refuse_unknown, setting
from vllm_aasd.verification import rules

NUM_SPECULATIVE_TOKENS, NUM_SPECULATIVE_TOKENS_V1 = 8, 32
"""The default of `num_speculative_tokens`: in general, and on the V1 model runner without adapters.

The longest draft that the adaptive length may choose: answers that were given before emit 24 tokens a step with 32 and
15 with 16 (`benchmarks.drafter`), and others lose nothing, since long drafts are only chosen where they are worth it.
On V2 a step takes the time of the longest draft, and with adapters vLLM wants room for this many tokens of every
request in a batch.
"""

DRAFT_SCHEDULE = ((4, 8), (16, 4), (49, 2), (128, 1))
"""Pairs of a number of requests and the longest draft up to it at first; with more requests there are no drafts. Used
on V2 with asynchronous scheduling, where a step takes the time of the longest draft whatever is drafted. What is best
is learned from there, among these lengths and none (`vllm_aasd.drafting.batch_draft_length`).

By a projection of fixed lengths, none of them is slower than no speculation on any accelerator and model under any of
its assumptions, and up to 128 requests each is within 3% of the best length's speed in the mean. Until it is learned
that nothing is ever accepted, they cost at most a tenth (of 300 steps, `tests/drafting/test_batch_draft_length.py`).
"""

NUM_SPECULATIVE_TOKENS_UNSCHEDULED = 2
"""`num_speculative_tokens` there where vLLM leaves a schedule out, under data parallelism."""


_FIXED = "it is a constant now. Leave it out"
_GUARD = f"{_FIXED}, or set aasd_collapse_guard to false."
_BUDGET = f"{_FIXED}, and set aasd_budget_nats."
_TYPICAL = "set aasd_verification to 'conditional', with aasd_alpha and aasd_beta."
REMOVED = {
    "aasd_budget_cap": _BUDGET,
    "aasd_budget_floor": _BUDGET,
    "aasd_budget_kappa": _BUDGET,
    "aasd_budget_per_step": _BUDGET,
    "aasd_draft": "for n-grams of the request's own text, set method to 'ngram' (or 'ngram_gpu') instead of 'aasd'.",
    "aasd_floor": f"{_FIXED}, and set aasd_beta.",
    "aasd_fly_floor": f"{_FIXED}, and set aasd_fly_threshold.",
    "aasd_guard_cooldown": _GUARD,
    "aasd_guard_limit": _GUARD,
    "aasd_guard_memory": _GUARD,
    "aasd_min_survival": f"{_FIXED}, and set aasd_draft_length for shorter drafts.",
    "aasd_relax_logprobs": "requests for log-probabilities are always verified strictly. Leave it out.",
    "aasd_relax_structured": "structured output is always verified strictly. Leave it out.",
    "aasd_top_k": f"{_FIXED}.",
    "aasd_typical_delta": _TYPICAL,
    "aasd_typical_epsilon": _TYPICAL,
    "aasd_typical_floor": _TYPICAL,
}
"""Settings of earlier versions, with their prefix, and what to use instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The `aasd_*` keys of ``--speculative-config``, without their prefix."""

    enabled: bool = setting(
        True,
        "Enable speculation. A request can turn it off for itself with `false`; on a server with `false`, only "
        "requests that say `true` get it.",
        looser="none",
    )
    draft_length: int | str = setting(
        "adaptive",
        "The longest draft, within `num_speculative_tokens`. `adaptive` drafts as many tokens as are worth their share "
        "of the next step's time, over the whole batch. A number is the most that each request gets at any load.",
        choices=("adaptive",),
        within=(1, 128),
    )
    prior: bool = setting(
        True,
        "Draft from the model's prior too, if `python -m vllm_aasd.prior MODEL` has made one.",
    )
    memory: int | str = setting(
        64,
        "MiB of earlier answers to draft from, shared by requests that share the prefix cache (the same `cache_salt`). "
        "`off` for none; a request can say `off` for itself.",
        choices=("off",),
        within=(1, 65536),
        looser="none",
    )
    alignment: bool | str = setting(
        "auto",
        "Store the target's predictions, which runs lm_head over the prompt. `auto` does so if that costs at most 3% "
        "of a prompt's time, measured at start-up, and never on the V2 model runner. `false` stores none.",
        choices=("auto",),
    )
    verification: str = setting(
        "conditional",
        "How draft tokens are accepted. `strict` changes nothing in the output. The others also accept tokens that the "
        "target finds likely enough (`conditional`), at which it is undecided and agrees with what follows (`fly`), or "
        "whose loss a budget pays for (`budget`).",
        choices=rules.RULES,
        looser="other",
    )
    alpha: float = setting(
        0.1,
        "`conditional`: how far the acceptance bar falls per nat of entropy.",
        within=(0.0, 10.0),
        rule="conditional",
        looser="higher",
    )
    beta: float = setting(
        0.5,
        "`conditional`: the acceptance bar, a probability, where the target is certain.",
        within=(0.0, 2.0),
        rule="conditional",
        looser="lower",
    )
    fly_window: int = setting(
        6,
        "`fly`: draft tokens after a mismatch that the target must agree with; at most `num_speculative_tokens` - 1.",
        within=(1, 127),
        rule="fly",
        looser="lower",
    )
    fly_threshold: float = setting(
        0.3,
        "`fly`: entropy in nats, over the three likeliest tokens, from which the target counts as undecided.",
        within=(0.0, 1.1),
        rule="fly",
        looser="lower",
    )
    budget_nats: float = setting(
        2.0,
        "`budget`: log-likelihood in nats that a request may lose in all; 0 is strict.",
        within=(0.0, 10000.0),
        rule="budget",
        looser="higher",
    )
    relax_sampling: bool = setting(
        False,
        "Relax sampled requests (temperature > 0) too, which pulls their samples towards the draft. By default they "
        "are verified strictly and keep the target's distribution.",
        looser="higher",
    )
    collapse_guard: bool = setting(
        True,
        "Verify a request strictly for a while when its relaxed tokens come too close together, since that is how a "
        "model is led into copying.",
        looser="lower",
    )
    allow_request_override: str = setting(
        "stricter",
        "What a request may change for itself: `no` for nothing; `stricter` for `aasd_enabled`, and for verification "
        "that accepts no more than the server's own; `any` for every key that a request may set.",
        choices=("no", "stricter", "any"),
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Settings":
        """Read the settings from the `aasd_*` keys of a speculative config.

        Args:
            values: ``{"aasd_beta": 0.6, ...}``; keys without the prefix are an error of the caller.

        Raises:
            ValueError: for an unknown or removed key, a value of the wrong type or out of range; the text names the
                key, the value and what is allowed.
        """
        fields = {PREFIX + field.name: field for field in dataclasses.fields(cls)}
        refuse_unknown("setting", values, fields, REMOVED)
        if values.get("aasd_memory") in ("file", "process"):
            raise ValueError("aasd_memory takes a number of MiB now, or 'off'. Leave it out for the default.")
        return cls(**{fields[key].name: checked(fields[key], value) for key, value in values.items()})

    def policy(self) -> rules.Policy:
        """How a request with these settings is verified."""
        guards = {"relaxes_sampling": self.relax_sampling, "collapse_guard": self.collapse_guard}
        if self.verification == "conditional":
            return rules.conditional(self.alpha, self.beta, **guards)
        if self.verification == "fly":
            return rules.fly(self.fly_window, self.fly_threshold, **guards)
        if self.verification == "budget":
            return rules.budget(self.budget_nats, **guards)
        return rules.STRICT_POLICY

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
