"""Which ways of answering are compared."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm_aasd.config import Settings
from vllm_aasd.fields import PREFIX
from vllm_aasd.overrides import with_overrides

OFF = "no speculation"
STRICT = "strict"
SAMPLED = "no speculation, sampled"

_VERIFICATION = f"{PREFIX}verification"
_ANY = Settings(allow_request_override="any")


class Candidate(NamedTuple):
    """One way of answering.

    Attributes:
        name: of its row.
        options: what each request brings in ``extra_args``.
        sampling: vLLM's sampling parameters; empty for greedy.
        is_offered: whether it may be what is recommended.
    """

    name: str
    options: Mapping[str, Any]
    sampling: Mapping[str, float] = {}
    is_offered: bool = False


def candidates(options: Sequence[Mapping[str, Any]], temperature: float, top_p: float) -> list[Candidate]:
    """What is compared, in order: the two that everything is held against, plain sampling, then each set of options.

    Args:
        options: what requests bring; each must be one that a server could be given.
        temperature, top_p: of plain truncated sampling without speculation, a yardstick for damage: what a change
            that users accept every day does to the same figures. 0 for none.

    Raises:
        ValueError: an option is unknown, out of range, or not of its rule; the text names it.
    """
    plain = [Candidate(OFF, {f"{PREFIX}enabled": False}), Candidate(STRICT, {_VERIFICATION: STRICT}, is_offered=True)]
    if temperature:
        sampling = {"temperature": temperature, "top_p": top_p}
        plain.append(Candidate(f"{SAMPLED} at {temperature:g}, top-p {top_p:g}", {f"{PREFIX}enabled": False}, sampling))
    for one in options:
        with_overrides(_ANY, one)
    return plain + [Candidate(name(one), one, is_offered=True) for one in options]


def name(options: Mapping[str, Any]) -> str:
    """The rule, and what departs from the default settings."""
    rule = options.get(_VERIFICATION, _ANY.verification)
    others = (f"{key.removeprefix(PREFIX)} {value}" for key, value in options.items() if key != _VERIFICATION)
    return ", ".join((rule, *others))


def parsed(text: str) -> dict[str, Any]:
    """Options from the command line.

    Raises:
        ValueError: they are no JSON object.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} isn't JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{text!r} isn't a JSON object")
    return options


DEFAULTS: tuple[dict[str, Any], ...] = (
    {_VERIFICATION: "conditional"},
    {_VERIFICATION: "conditional", f"{PREFIX}floor": 0.1},
    {_VERIFICATION: "conditional", f"{PREFIX}beta": 0.3, f"{PREFIX}floor": 0.05},
    {_VERIFICATION: "conditional", f"{PREFIX}beta": 0.1, f"{PREFIX}floor": 1e-4},
    {_VERIFICATION: "typical"},
    {_VERIFICATION: "fly"},
    {_VERIFICATION: "budget"},
    {_VERIFICATION: "budget", f"{PREFIX}budget_cap": 1.0, f"{PREFIX}budget_nats": 8.0},
)
"""What is compared where nothing was asked for: each rule at its defaults, and looser ones."""
