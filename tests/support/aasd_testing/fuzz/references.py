"""What the target says alone and without speculation: of a plain engine that has one request at a time."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from aasd_testing.engines import run_engine
from aasd_testing.fuzz.cases import Step
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.fuzz.oracle import Reference
from aasd_testing.fuzz.prompts_of_tokens import Prompts

# What doesn't change which tokens come.
_WITHOUT = ("logprobs", "prompt_logprobs")


def key(step: Step) -> str:
    """By which a request's reference is found: all that decides its answer."""
    sampling = {name: value for name, value in step["sampling"].items() if name not in _WITHOUT}
    return json.dumps([step["prompt"], sampling, step.get("adapter")], sort_keys=True)


def references(
    model: str, profile: str, steps: Sequence[Step], folder: pathlib.Path, adapters: Mapping[str, str] | None = None
) -> dict[str, Reference]:
    """Ask a plain engine every question once, each alone.

    Args:
        model: path of the checkpoint.
        profile: of the engine that is judged by them.
        steps: with questions; the same one may come many times.
        folder: where the engine's process leaves its answers.
        adapters: paths by name, for a profile that has them; all steps that name one name the same.
    """
    questions = {key(step): step for step in steps}
    if not questions:
        return {}
    limits, prompts = PROFILES[profile], Prompts(model)
    named = {step["adapter"] for step in steps if step.get("adapter")}
    assert len(named) <= 1, named
    rounds = [
        [
            {
                "prompt": prompts.ids(step["prompt"]),
                "sampling": {**step["sampling"], "logprobs": 5, "prompt_logprobs": None},
                "adapted": step.get("adapter") is not None,
            }
        ]
        for step in questions.values()
    ]
    options = {"dtype": "float32", "max_model_len": limits.max_model_len, "max_num_seqs": 1, "block_size": 32}
    options |= {name: value for name, value in limits.engine.items() if "lora" in name}
    result = run_engine(
        model,
        rounds,
        folder / "references.json",
        enable_prefix_caching=False,
        # Of what the tokens are chosen from: penalties and masks included.
        logprobs_mode="processed_logprobs",
        lora=(adapters or {})[named.pop()] if named else None,
        **options,
    )
    found = {}
    for name, (output,) in zip(questions, result["rounds"], strict=True):
        likely = [{int(token): value for token, value in at.items()} for at in output["logprobs"]]
        found[name] = Reference(output["token_ids"], output["text"], output["finish_reason"], likely)
    return found
