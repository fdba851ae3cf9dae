"""The settings of `aasd`: one typed, range-checked, documented list; the README's table is drawn from it."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args

from vllm_aasd.kernels.mixture import MAX_TOP_K
from vllm_aasd.verification.conditional import ALPHA_RANGE, BETA_RANGE, FLOOR_RANGE

PREFIX = "aasd_"
"""What every key of ours begins with, beside vLLM's own keys in ``--speculative-config``."""

DEFAULT_NUM_SPECULATIVE_TOKENS = 8


def _setting(
    default: Any,
    doc: str,
    *,
    within: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
    rule: str | None = None,
    looser: str | None = None,
) -> Any:
    """A field of `Settings`.

    Args:
        default: its value where none is given.
        doc: what it does, for the README.
        within: lowest and highest number allowed.
        choices: words allowed.
        rule: the value of `verification` under which it takes effect; None for any.
        looser: which values, given by a request, let verification accept more than the server's: those that are
            "higher" or "lower", any "other", or "none". None where a request may not give it. See `vllm_aasd.overrides`.
    """
    metadata = {"doc": doc, "within": within, "choices": choices, "rule": rule, "looser": looser}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The `aasd_*` keys of ``--speculative-config``, without their prefix."""

    enabled: bool = _setting(
        True,
        "Whether requests are sped up at all. In a request, `false` switches speculation off for it; where the "
        "server has `false`, only requests that say `true` are sped up.",
        looser="none",
    )
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
        "How draft tokens are accepted: `strict` changes nothing in the output; `conditional` also accepts "
        "a token whose probability p under the target is at least max(floor, min(beta - alpha * H, max p)), "
        "H being the target's entropy in nats.",
        choices=("strict", "conditional"),
        looser="other",
    )
    alpha: float = _setting(
        0.1,
        "`conditional`: how much the bar falls per nat of entropy.",
        within=ALPHA_RANGE,
        rule="conditional",
        looser="higher",
    )
    beta: float = _setting(
        0.5,
        "`conditional`: the bar at no entropy.",
        within=BETA_RANGE,
        rule="conditional",
        looser="lower",
    )
    floor: float = _setting(
        0.3,
        "`conditional`: the bar never falls under this probability.",
        within=FLOOR_RANGE,
        rule="conditional",
        looser="lower",
    )
    relax_sampling: bool = _setting(
        False,
        "`conditional`: apply it to sampled requests (temperature > 0) too. It pulls their samples towards "
        "the draft; by default they are verified strictly and keep the target's distribution.",
        rule="conditional",
        looser="higher",
    )
    allow_request_override: str = _setting(
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


def refuse_unknown(kind: str, keys: Iterable[str], known: Collection[str]) -> None:
    """Raise the ValueError that names the first unknown key, what may have been meant, and what is known."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Unknown {kind} {key!r}.{hint} Known: {', '.join(sorted(known))}.")


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
    rows = ["| key | default | allowed | in a request | what it does |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(Settings):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        request = "yes" if field.metadata["looser"] else ""
        key = f"`{PREFIX}{field.name}`"
        rows.append(f"| {key} | `{default}` | {allowed(field)} | {request} | {field.metadata['doc']} |")
    return "\n".join(rows)


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    return get_args(field.type) or (field.type,)


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value of a field of `Settings`, as the type that it has.

    Raises:
        ValueError: it is of the wrong type or out of range; the text names the key, the value and what is allowed.
    """
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
