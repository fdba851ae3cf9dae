"""What the doctor finds: the installed vLLM, this platform, and whether the runner that vLLM will choose fits."""

import importlib.metadata
from typing import NamedTuple

from vllm import envs
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_aasd import __version__
from vllm_aasd.engine import patching, required_api, unsupported
from vllm_aasd.engine.configuration import chooses_v2, runner_refusal
from vllm_aasd.kernels.common.cache_folder import cache_folder, code_folder


class Diagnosis(NamedTuple):
    """The doctor's words, and whether aasd works with the runner that vLLM would choose."""

    lines: list[str]
    works: bool


def diagnose() -> Diagnosis:
    """Check everything; nothing is raised or served, and no more than an empty cache folder is made."""
    chosen = "V2" if chooses_v2() else "V1"
    lines = [
        f"vllm-aasd {__version__}, vLLM {patching.vllm_version()}, platform {current_platform.device_type}, "
        f"Triton {'yes' if HAS_TRITON else 'no'}, VLLM_USE_V2_MODEL_RUNNER {envs.VLLM_USE_V2_MODEL_RUNNER}"
    ]
    reasons = []
    try:
        patching.check_version()
    except patching.UnsupportedVLLMError as error:
        reasons.append(str(error))
    if not any(point.name == "aasd" for point in importlib.metadata.entry_points(group="vllm.general_plugins")):
        reasons.append("vLLM can't find the plugin: the entry point isn't installed (pip install vllm-aasd)")
    elif envs.VLLM_PLUGINS is not None and "aasd" not in envs.VLLM_PLUGINS:
        reasons.append(f"VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS)} doesn't let vLLM load the plugin: add 'aasd'")
    refusal = runner_refusal(chosen)
    if refusal is not None:
        reasons.append(refusal)
    for runner, needed in required_api.RUNNERS.items():
        needed = required_api.FRONT_END + required_api.BOTH + needed
        found = required_api.problems(needed)
        lines.append(
            f"{runner} model runner: {len(needed) - len(found)} of {len(needed)} places in vLLM as we know them"
        )
        lines += [f"  - {problem}" for problem in found]
        if found and runner == chosen:
            reasons.append(f"vLLM's {runner} model runner isn't as we know it")
    lines += _folders()
    if reasons:
        return Diagnosis([*lines, *(f"aasd can't work: {reason}" for reason in reasons)], works=False)
    lines.append(f"aasd will run on vLLM's {chosen} model runner. Refused there:")
    lines += [
        f"  - {refusal.name} other than {' or '.join(repr(value) for value in refusal.allowed)}: {refusal.reason}"
        for refusal in unsupported.BY_RUNNER[chosen]
    ]
    return Diagnosis(lines, works=True)


def _folders() -> list[str]:
    """Where priors and compiled code are kept, or that they aren't."""
    priors = cache_folder()
    code, not_in = code_folder()
    lines = [
        f"priors are looked for in {priors}"
        if priors
        else "no folder for priors: set AASD_CACHE_ROOT to an absolute path",
        f"compiled code of the CPU kernels is kept in {code}"
        if code
        else "compiled code of the CPU kernels is kept nowhere: every start compiles it; set AASD_CACHE_ROOT",
    ]
    return lines + [f"  - not: {reason}" for reason in not_in]
