"""Ask the target model, through vLLM, what it would say after each token of its vocabulary."""

from collections.abc import Callable
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_aasd.engine.conversations import likeliest, turns
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.host import emulates_bfloat16
from vllm_aasd.kernels.draft import Prior

# Long enough for a chat template around a question and its answer, short for the KV cache's sake.
_CONTEXT_LENGTH = 512
# A multiple of what is in a batch at once, and small enough to report on.
_TOKENS_PER_CALL = 1024
# What a template says before every answer hardly changes what follows it.
_LONGEST_PREFIX = 64


def engine_arguments(model: str, arguments: list[str], top_k: int) -> EngineArgs:
    """Read vLLM's own arguments from a command line; where it gives none, ours fit one token at a time.

    Args:
        model: path or name of the target model.
        arguments: such as ``["--tensor-parallel-size", "2"]``.
        top_k: successors that will be asked for.

    Raises:
        SystemExit: an argument that vLLM doesn't know.
    """
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="python -m vllm_aasd.prior"))
    parser.set_defaults(
        max_model_len=_CONTEXT_LENGTH,
        max_num_seqs=256,
        max_logprobs=top_k,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    if current_platform.is_cpu() and emulates_bfloat16():
        # The likeliest successors are the same, and come several times sooner.
        parser.set_defaults(dtype="float32")
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))


def key_of(engine: EngineArgs) -> str | None:
    """The `model_key` of the model that the arguments name."""
    return model_key(engine.model, engine.revision)


def vocab_size(engine: EngineArgs) -> int:
    """The vocabulary of the model that the arguments name."""
    return engine.create_model_config().get_vocab_size()


def start(engine: EngineArgs) -> LLM:
    """Start the engine."""
    return LLM.from_engine_args(engine)


def successors(llm: LLM, top_k: int, progress: Callable[[int, int], None]) -> Prior:
    """Run the target once over its vocabulary, each token where an answer of the assistant begins.

    Args:
        llm: started with `engine_arguments`.
        top_k: successors kept of each token, the likeliest at temperature 1.
        progress: is told how many tokens of how many are done.
    """
    model_config = llm.llm_engine.model_config
    prefix = assistant_prefix(llm.get_tokenizer())[-(min(model_config.max_model_len, _LONGEST_PREFIX) - 2) :]
    vocab_size = model_config.get_vocab_size()
    ids = np.full((vocab_size, top_k), -1, np.int32)
    probs = np.zeros((vocab_size, top_k), np.float32)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=top_k, detokenize=False)
    for start in range(0, vocab_size, _TOKENS_PER_CALL):
        token_ids = range(start, min(start + _TOKENS_PER_CALL, vocab_size))
        prompts = [{"prompt_token_ids": [*prefix, token_id]} for token_id in token_ids]
        for token_id, output in zip(token_ids, llm.generate(prompts, params, use_tqdm=False), strict=True):
            found_ids, found_probs = likeliest(output.outputs[0].logprobs[0], top_k)
            ids[token_id, : len(found_ids)] = found_ids
            probs[token_id, : len(found_ids)] = found_probs
        progress(token_ids.stop, vocab_size)
    return Prior(ids, probs)


def assistant_prefix(tokenizer: Any) -> list[int]:
    """What a chat template puts before an answer of the assistant; without a template, what begins a text."""
    around = turns(tokenizer)
    if around is not None:
        return tokenizer.encode(around.answering, add_special_tokens=False)
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
