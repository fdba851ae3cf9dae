"""Build the prior of a model through vLLM: what the model says in conversations of its own, and after each token.

The conversations are after Magpie (Xu et al., 2024, arXiv 2406.08464): a chat model that sees the beginning of the
user's turn writes a question as users do, and then answers it. A model without a chat template writes texts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.logprobs import Logprob
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_aasd.drafting.own_text import Text
from vllm_aasd.drafting.prior import NUM_SUCCESSORS
from vllm_aasd.engine.chat_turns import Turns, turns

QUESTION_TOKENS, ANSWER_TOKENS = 48, 96
"""The longest that are generated."""

# Long enough for a chat template around a question and its answer, and short to save KV cache.
_CONTEXT_LENGTH = 512
# A multiple of a batch, and small enough to report progress on.
_CONVERSATIONS_PER_CALL = 256
# What x86 needs for arithmetic in bfloat16; elsewhere PyTorch has it.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def engine_arguments(model: str, arguments: list[str]) -> EngineArgs:
    """Read vLLM's own arguments from a command line, with defaults that suit generating few tokens at a time.

    Args:
        model: path or name of the target model.
        arguments: such as ``["--tensor-parallel-size", "2"]``.

    Raises:
        SystemExit: an argument that vLLM doesn't know.
    """
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="python -m vllm_aasd.prior"))
    parser.set_defaults(
        max_model_len=_CONTEXT_LENGTH,
        max_num_seqs=256,
        max_logprobs=NUM_SUCCESSORS,
        speculative_config={"method": "aasd", "aasd_prior": 0},
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    if current_platform.is_cpu() and emulates_bfloat16():
        # Several times faster, with the same likeliest successors.
        parser.set_defaults(dtype="float32")
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))


def emulates_bfloat16(described: str | None = None) -> bool:
    """Whether PyTorch only emulates bfloat16 on this CPU, as on older x86: several times slower than float32.

    Args:
        described: the CPU as in ``/proc/cpuinfo``; by default, this file's content.
    """
    if described is None:
        path = Path("/proc/cpuinfo")
        described = path.read_text() if path.exists() else ""
    flags = next((line.split() for line in described.splitlines() if line.startswith("flags")), None)
    return flags is not None and not _BFLOAT16_FLAGS & set(flags)


def start(engine: EngineArgs) -> LLM:
    """Start the engine."""
    return LLM.from_engine_args(engine)


def ask_for_successors(llm: LLM) -> None:
    """Have the workers ask for the successors that the prior on disk lacks, and write it."""
    llm.collective_rpc("aasd_make_prior")


def conversations(llm: LLM, count: int, top_k: int) -> list[Text]:
    """Sample questions and answers at temperature 1, and keep what the target predicted in them; reports progress.

    Args:
        llm: of the target; texts are shorter if its context is.
        count: number of questions.
        top_k: likeliest predictions kept of each position.
    """
    tokenizer = llm.get_tokenizer()
    around = turns(tokenizer)
    texts: list[Text] = []
    for start in range(0, count, _CONVERSATIONS_PER_CALL):
        num = min(_CONVERSATIONS_PER_CALL, count - start)
        if around is None:
            texts += _continued(llm, [_beginning(tokenizer)] * num, ANSWER_TOKENS, top_k)
        else:
            texts += _asked_and_answered(llm, tokenizer, around, num, top_k)
        print(f"{start + num} of {count} conversations", flush=True)
    return texts


def _beginning(tokenizer: Any) -> list[int]:
    # Without a token that begins a text, the one that ends the text before it.
    return [next(of for of in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if of is not None)]


def _asked_and_answered(llm: LLM, tokenizer: Any, around: Turns, num: int, top_k: int) -> list[Text]:
    before = tokenizer.encode(around.before, add_special_tokens=False)
    after = tokenizer.encode(around.after + around.answering, add_special_tokens=False)
    questions = _continued(llm, [before] * num, QUESTION_TOKENS, top_k)
    prompts = []
    for question in questions:
        asked = question.token_ids.tolist()
        # The template ends the turn itself.
        prompts.append((asked[:-1] if asked[-1] == tokenizer.eos_token_id else asked) + after)
    return questions + _continued(llm, prompts, ANSWER_TOKENS, top_k)


def _continued(llm: LLM, prompts: Sequence[list[int]], max_tokens: int, top_k: int) -> list[Text]:
    max_model_len = llm.llm_engine.model_config.max_model_len
    prompts = [prompt[-(max_model_len - 1) :] for prompt in prompts]
    params = [
        SamplingParams(
            temperature=1.0, max_tokens=min(max_tokens, max_model_len - len(prompt)), logprobs=top_k, detokenize=False
        )
        for prompt in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [_text(prompt, output.outputs[0], top_k) for prompt, output in zip(prompts, outputs, strict=True)]


def _text(prompt: list[int], output: Any, top_k: int) -> Text:
    token_ids = np.array([*prompt, *output.token_ids], np.int32)
    table = np.full((len(token_ids), 1 + 2 * top_k), -1, np.int32)
    table[:, 1 + top_k :] = 0
    for position, predicted in enumerate(output.logprobs, len(prompt) - 1):
        ids, probs = likeliest(predicted, top_k)
        table[position, 0] = token_ids[position]
        table[position, 1 : 1 + len(ids)] = ids
        table[position, 1 + top_k : 1 + top_k + len(ids)] = probs.view(np.int32)
    return Text(token_ids, table)


def likeliest(predicted: Mapping[int, Logprob], top_k: int) -> tuple[list[int], np.ndarray]:
    """At most ``top_k`` of the likeliest tokens that vLLM reports at a position, and their probabilities in float32."""
    best = sorted(predicted.items(), key=lambda entry: -entry[1].logprob)[:top_k]
    return [token_id for token_id, _ in best], np.exp([entry.logprob for _, entry in best]).astype(np.float32)
