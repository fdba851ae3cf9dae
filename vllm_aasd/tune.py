"""Find the fastest verification whose effect on the answers to your prompts stays within bounds.

    python -m vllm_aasd.tune --model MODEL --prompts FILE [--settings JSON ...] [vLLM's arguments]

FILE holds one JSON object a line: ``prompt``, or ``messages`` as in the OpenAI API; optionally a ``reference`` that the
answer must contain, and a ``category``. One engine answers all prompts, greedily, under every setting in turn. It
doesn't draft from earlier answers: here every prompt comes again, and all rules would look alike.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_aasd import tuning
from vllm_aasd.config import Settings, with_overrides

OFF, STRICT = "no speculation", "strict"
DEFAULTS: tuple[dict[str, Any], ...] = (
    {"aasd_verification": "conditional"},
    {"aasd_verification": "conditional", "aasd_beta": 0.3},
    {"aasd_verification": "fly"},
    {"aasd_verification": "budget"},
)
_COLUMNS = {"speed": "speed", "rouge_l": "agreement (ROUGE-L)", "equal": "equal answers", "copied": "copied"}
_COLUMNS |= {"repeated": "repeated", "score": "task score"}


class Prompt(NamedTuple):
    """A prompt: its token ids, its category, and what scores an answer, given the plain one, if anything does."""

    token_ids: list[int]
    category: str
    score: Callable[[list[int], list[int]], float] | None


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exits with a message if the prompts or the arguments can't be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--settings", nargs="+", type=json.loads, default=DEFAULTS, metavar="JSON")
    for name, number in (("max-tokens", 128), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=number, help="default: %(default)s")
    for name, share in (("min-agreement", 0.9), ("max-copied", 0.02), ("max-repeated", 0.02)):
        parser.add_argument(f"--{name}", type=float, default=share, help="bound; default: %(default)s")
    ours, of_vllm = parser.parse_known_args(arguments)
    try:
        ways = candidates(ours.settings)
        lines = read(ours.prompts)
        # Here, so that --help and bad arguments don't wait for vLLM.
        from vllm_aasd.engine import trial

        engine = trial.Trial(ours.model, of_vllm)
        bounds = {"rouge_l": ours.min_agreement, "copied": ours.max_copied, "repeated": ours.max_repeated}
        prompts = [_prompt(engine.tokenizer, line) for line in lines]
        print(summary(compare(engine, ways, prompts, ours.max_tokens, ours.rounds, bounds)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def candidates(settings: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The request options to compare, by name: no speculation, strict, then each of `settings`.

    Raises:
        ValueError: a setting is unknown or out of range; the text names it.
    """
    found: dict[str, Mapping[str, Any]] = {OFF: {"aasd_enabled": False}, STRICT: {"aasd_verification": STRICT}}
    for one in settings:
        if not isinstance(one, dict):
            raise ValueError(f"--settings takes JSON objects, not {one!r}")
        with_overrides(Settings(allow_request_override="any"), one)
        found[", ".join(f"{key.removeprefix('aasd_')} {value}" for key, value in one.items()) or "default"] = one
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of prompts.

    Raises:
        ValueError: for a line that isn't one; the text names it.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if not isinstance(found[-1], dict) or not (found[-1].get("prompt") or found[-1].get("messages")):
            raise ValueError(f"{path}:{number}: neither 'prompt' nor 'messages'")
    return found


def compare(
    engine: Any,
    ways: Mapping[str, Mapping[str, Any]],
    prompts: Sequence[Prompt],
    max_tokens: int,
    rounds: int,
    bounds: Mapping[str, float],
    sampling: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Answer the prompts with every set of options, and measure speed and answers.

    Args:
        engine: see `vllm_aasd.engine.trial.Trial`.
        ways: request options by name, including `OFF` and `STRICT`.
        max_tokens: the longest answer.
        rounds: how often each prompt is answered with the same options.
        bounds: of what may be recommended, see `vllm_aasd.tuning.excess`.
        sampling: vLLM's sampling parameters, by name, if not greedy; these are never recommended.

    Returns:
        ``bounds``; ``recommended``, a name; ``runs``, by name: options, results, and which exceed the bounds.
    """
    sampling = sampling or {}
    token_ids, groups = [one.token_ids for one in prompts], [one.category for one in prompts]
    # Fills the prefix cache, and compiles what is compiled late.
    engine.answer(token_ids, max_tokens, ways[OFF], {})
    answers: dict[str, list[Any]] = {}
    seconds = {name: [0.0] * len(prompts) for name in ways}
    accepted = dict.fromkeys(ways, 0.0)
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found, count = engine.answer(token_ids, max_tokens, ways[name], sampling.get(name, {}))
            answers.setdefault(name, found)
            accepted[name] += count / rounds
            seconds[name] = [total + one / rounds for total, (_, one) in zip(seconds[name], found, strict=True)]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for name, given in answers.items():
        for prompt, (one, _), (off, _), time in zip(prompts, given, answers[OFF], seconds[name], strict=True):
            score = prompt.score(one, off) if prompt.score else None
            rows[name].append(tuning.row(prompt.token_ids, one, off, time, score))
    runs = {name: tuning.figures(rows[name], rows[OFF], rows[STRICT], accepted[name], groups) for name in ways}
    over = {name: tuning.excess(runs[name], runs[OFF], bounds) for name in ways}
    offered = [name for name in ways if name != OFF and name not in sampling and not over[name]]
    return {
        "bounds": dict(bounds),
        "recommended": tuning.fastest(runs, offered, STRICT),
        "runs": {name: {"options": dict(ways[name]), **runs[name], "exceeds": over[name]} for name in ways},
    }


def summary(result: Mapping[str, Any]) -> str:
    """The table in Markdown, and the recommended configuration."""
    lines = [f"| | tokens per step | {' | '.join(_COLUMNS.values())} | exceeds |", "| --- " * (len(_COLUMNS) + 3) + "|"]
    for name, run in result["runs"].items():
        mal = "-" if run["mal"] is None else f"{run['mal']:.2f}"
        lines.append(
            f"| {name} | {mal} | {' | '.join(_cell(run[key]) for key in _COLUMNS)} | {', '.join(run['exceeds'])} |"
        )
    chosen = result["recommended"]
    options = json.dumps({"method": "aasd", **result["runs"][chosen]["options"]})
    lines += ["", f"Fastest within the bounds: {chosen}", f"--speculative-config '{options}'"]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**found) if found and found["value"] is not None else "-"


def _prompt(tokenizer: Any, line: Mapping[str, Any]) -> Prompt:
    messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
    if tokenizer.chat_template is None:
        token_ids = tokenizer.encode(messages[-1]["content"])
    else:
        token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    reference = line.get("reference")
    contains = lambda answer, plain: float(str(reference).lower() in tokenizer.decode(answer).lower())
    return Prompt(token_ids, str(line.get("category", "all")), None if reference is None else contains)


if __name__ == "__main__":
    main()
