"""Build the prior of a model through vLLM: what the model says after each token, and in conversations of its own.

The conversations are after Magpie (Xu et al., 2024, arXiv 2406.08464): a chat model that sees the beginning of the
user's turn writes a question as users do, and then answers it. A model without a chat template writes texts.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.logprobs import Logprob
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_aasd.drafting.own_text import Text
from vllm_aasd.kernels.draft import Prior

QUESTION_TOKENS, ANSWER_TOKENS = 48, 96
"""The longest that are generated."""

# Long enough for a chat template around a question and its answer, and short to save KV cache.
_CONTEXT_LENGTH = 512
# Multiples of a batch, and small enough to report progress on.
_TOKENS_PER_CALL, _CONVERSATIONS_PER_CALL = 1024, 256
# What a template puts before every answer hardly changes what follows it.
_LONGEST_PREFIX = 64
_REPORT_SECONDS = 5.0
_MARK = "Why?"
# What x86 needs for arithmetic in bfloat16; elsewhere PyTorch has it.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def engine_arguments(model: str, arguments: list[str], top_k: int) -> EngineArgs:
    """Read vLLM's own arguments from a command line, with defaults that suit generating few tokens at a time.

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


def successors(llm: LLM, top_k: int) -> Prior:
    """Run the target once over its vocabulary, each token at the beginning of an answer; reports progress.

    Args:
        llm: started with `engine_arguments`.
        top_k: successors kept of each token, the likeliest at temperature 1.
    """
    began = reported = time.monotonic()
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
        now = time.monotonic()
        if now - reported >= _REPORT_SECONDS:
            reported, left = now, (now - began) * (vocab_size - token_ids.stop) / token_ids.stop
            print(f"{token_ids.stop} of {vocab_size} tokens, {left:.0f} s left", flush=True)
    return Prior(ids, probs)


def assistant_prefix(tokenizer: Any) -> list[int]:
    """What a chat template puts before the assistant's answer; without a template, what begins a text."""
    around = turns(tokenizer)
    if around is not None:
        return tokenizer.encode(around.answering, add_special_tokens=False)
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


class Turns(NamedTuple):
    """What a chat template puts around the user's question.

    Attributes:
        before: before the question.
        after: from the question to the beginning of the assistant's turn.
        answering: at the beginning of the assistant's turn.
    """

    before: str
    after: str
    answering: str


def turns(tokenizer: Any) -> Turns | None:
    """How the model's chat template writes one question; None without a usable template."""
    question = [{"role": "user", "content": _MARK}]
    try:
        asked = tokenizer.apply_chat_template(question, tokenize=False)
        answering = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    # transformers raises ValueError without a template; a template may raise anything.
    except Exception:
        return None
    before, mark, after = asked.rpartition(_MARK)
    if not mark or len(answering) <= len(asked) or not answering.startswith(asked):
        return None
    return Turns(before, after, answering[len(asked) :])


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
