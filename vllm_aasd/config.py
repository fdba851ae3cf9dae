"""The settings of `aasd`: one typed, range-checked, documented list; the README's table is drawn from it."""

import dataclasses
import difflib
from collections.abc import Mapping
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
