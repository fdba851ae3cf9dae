"""Judges a whole case: each of its requests, with the references at hand."""

from collections.abc import Mapping, Sequence

from aasd_testing.fuzz.cases import Case
from aasd_testing.fuzz.limits import PROFILES
from aasd_testing.fuzz.observed import Observation
from aasd_testing.fuzz.oracle import Finding, Reference, judge
from aasd_testing.fuzz.prompts_of_tokens import Prompts
from aasd_testing.fuzz.references import key


def judge_case(
    case: Case, seen: Sequence[Observation | None], references: Mapping[str, Reference], prompts: Prompts
) -> list[Finding]:
    """Everything about a case's requests that isn't as it must be.

    Args:
        case: as it was run.
        seen: what became of each request, None for events; None for a request is a finding.
        references: of all compared requests, by `references.key`.
        prompts: of the model.
    """
    found: list[Finding] = []
    for index, (step, observation) in enumerate(zip(case["steps"], seen, strict=True)):
        if step["do"] != "ask":
            continue
        if observation is None:
            found.append(Finding("lost", index, f"{step['kind']}: never sent"))
            continue
        found += judge(
            index,
            step,
            observation,
            references[key(step)] if step["compared"] else None,
            len(prompts.ids(step["prompt"])),
            PROFILES[case["profile"]].max_model_len,
            lambda word: prompts.tokenizer.encode(word, add_special_tokens=False),
        )
    return found
