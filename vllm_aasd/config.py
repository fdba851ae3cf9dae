"""The settings of `aasd`: one typed, range-checked, documented list; the README's table is drawn from it."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

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
) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "within": within, "choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The `aasd_*` keys of ``--speculative-config``, without their prefix."""

    draft: str = _setting(
        "mixture",
        "Where drafts come from: `mixture` is AASD; `ngram` is vLLM's own prompt look-up, with its "
        "`prompt_lookup_min` and `prompt_lookup_max`, for comparison.",
        choices=("mixture", "ngram"),
    )
    min_survival: float = _setting(
        0.1,
        "A draft ends before the token that would make it less likely than this to be accepted as a whole. "
        "Higher drafts less: cheaper when many requests run at once.",
        within=(0.0, 1.0),
    )
    alignment: bool = _setting(
        True,
        "Store the target's predictions at prompt positions too. Costs one lm_head over the prompt; "
        "`false` stores them for generated tokens only, where they are free.",
    )
    top_k: int = _setting(
        4,
        "Predictions stored per context position; each takes 8 bytes per KV-cache slot.",
        within=(1, 8),
    )
    verification: str = _setting(
        "conditional",
        "How draft tokens are accepted: `strict` changes nothing in the output; `conditional` also accepts "
        "a token whose probability p under the target is at least max(floor, min(beta - alpha * H, max p)), "
        "H being the target's entropy in nats.",
        choices=("strict", "conditional"),
    )
    alpha: float = _setting(
        0.1, "`conditional`: how much the bar falls per nat of entropy.", within=ALPHA_RANGE
    )
    beta: float = _setting(0.5, "`conditional`: the bar at no entropy.", within=BETA_RANGE)
    floor: float = _setting(
        0.3, "`conditional`: the bar never falls under this probability.", within=FLOOR_RANGE
    )
    relax_sampling: bool = _setting(
        False,
        "`conditional`: apply it to sampled requests (temperature > 0) too. It pulls their samples towards "
        "the draft; by default they are verified strictly and keep the target's distribution.",
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
    if field.metadata["choices"]:
        return " or ".join(repr(choice) for choice in field.metadata["choices"])
    if field.type is bool:
        return "true or false"
    low, high = field.metadata["within"]
    kind = "an integer" if field.type is int else "a number"
    return f"{kind} from {low:g} to {high:g}"


def settings_table() -> str:
    """The settings as a Markdown table, as the README holds it."""
    rows = ["| key | default | allowed | what it does |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(Settings):
        default = str(field.default).lower() if field.type is bool else field.default
        rows.append(f"| `{PREFIX}{field.name}` | `{default}` | {allowed(field)} | {field.metadata['doc']} |")
    return "\n".join(rows)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    metadata = field.metadata
    # JSON writes 1.0 as 1.
    valid = type(value) in (int, float) if field.type is float else type(value) is field.type
    if valid and metadata["choices"]:
        valid = value in metadata["choices"]
    elif valid and field.type is not bool:
        low, high = metadata["within"]
        valid = low <= value <= high
    if not valid:
        raise ValueError(f"{PREFIX}{field.name}={value!r} is not allowed: it takes {allowed(field)}.")
    return field.type(value)
