"""Have the target generate conversations, through vLLM, from nothing but the beginning of a question.

After Magpie (Xu et al., 2024, arXiv 2406.08464): a chat model that sees where the user's turn begins writes a question
as users ask them, and then answers it. A model without a chat template writes texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm import LLM, SamplingParams
from vllm.logprobs import Logprob

from vllm_aasd.drafting.own_text import Text

QUESTION_TOKENS, ANSWER_TOKENS = 48, 96
"""The longest that are generated."""

# As many as fit in a batch, and few enough to report progress and to stop after.
_AT_ONCE = 256
_MARK = "Why?"


class Turns(NamedTuple):
    """What a chat template puts around a question of the user.

    Attributes:
        before: up to the question.
        after: between the question and the place where the assistant's turn begins.
        answering: what begins an answer of the assistant.
    """

    before: str
    after: str
    answering: str


def turns(tokenizer: Any) -> Turns | None:
    """How the model's chat template writes one question; None where there is none of use."""
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


def conversations(llm: LLM, count: int, top_k: int) -> Iterator[tuple[int, list[Text]]]:
    """Sample questions and answers at temperature 1, and keep what the target predicted in them; a batch at a time.

    Args:
        llm: of the target; where it takes shorter texts, they are shorter.
        count: how many questions.
        top_k: predictions kept of each position, the likeliest.

    Yields:
        How many questions there are now, and the texts that are new.
    """
    tokenizer = llm.get_tokenizer()
    around = turns(tokenizer)
    for start in range(0, count, _AT_ONCE):
        num = min(_AT_ONCE, count - start)
        if around is None:
            texts = _continued(llm, [_beginning(tokenizer)] * num, ANSWER_TOKENS, top_k)
        else:
            texts = _asked_and_answered(llm, tokenizer, around, num, top_k)
        yield start + num, texts


def _beginning(tokenizer: Any) -> list[int]:
    # Without a token that begins a text, the one that ends the text before.
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
