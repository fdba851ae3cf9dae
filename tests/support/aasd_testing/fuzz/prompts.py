"""Random prompts, as token ids."""

import functools
import random
from typing import Any

from aasd_testing.fuzz.profiles import THINK_START
from aasd_testing.prompts import real_prompts

CANARIES = range(48000, 48064)
"""Token ids that only canary prompts hold: a draft with one, for another request, was made from someone else's text."""

# Ids below are control tokens and single bytes: vLLM returns half a character at a prompt's end with the answer.
_FIRST_PLAIN_ID = 300
_TEXTS = real_prompts(16)


class Prompts:
    """Makes prompts with the tokenizer of the checkpoint at a path."""

    def __init__(self, model: str) -> None:
        self._model = model

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._model)

    @functools.cached_property
    def _embeddings(self) -> Any:
        from safetensors import safe_open

        with safe_open(f"{self._model}/model.safetensors", "pt") as weights:
            return weights.get_tensor("model.embed_tokens.weight").float()

    def encode(self, text: str) -> list[int]:
        """A text's ids, without a sequence's first."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def embed(self, ids: list[int]) -> Any:
        """The model's own embeddings, ``[num_tokens, hidden_size]`` float32."""
        return self._embeddings[ids].clone()

    def any_shape(self, rng: random.Random, max_tokens: int) -> list[int]:
        """A prompt of any shape, of about `max_tokens` at most."""
        count = rng.randint(4, max_tokens)
        match rng.choices(("text", "chat", "repeated", "periodic", "noise"), (6, 6, 1, 2, 1))[0]:
            case "text":
                return self.text(rng, count)
            case "chat":
                message = [{"role": "user", "content": rng.choice(_TEXTS)[: 3 * count]}]
                return self._tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            case "repeated":
                return [_FIRST_PLAIN_ID + rng.randrange(16)] * count
            case "periodic":
                return self.periodic(rng, count, rng.randint(2, max(2, count // 2)))
        return self.noise(rng, count)

    def user_message(self, rng: random.Random, max_tokens: int) -> str:
        """A text for the chat endpoint."""
        return rng.choice(_TEXTS)[: 3 * rng.randint(4, max_tokens)]

    def text(self, rng: random.Random, count: int) -> list[int]:
        """The beginning of a text, repeated if it is too short."""
        return _resized(self.encode(rng.choice(_TEXTS)), count)

    def noise(self, rng: random.Random, count: int) -> list[int]:
        """Random tokens."""
        return [rng.randrange(_FIRST_PLAIN_ID, CANARIES.start) for _ in range(count)]

    def periodic(self, rng: random.Random, count: int, period: int) -> list[int]:
        """A few random tokens, over and over."""
        return _resized(self.noise(rng, period), count)

    def canary(self, rng: random.Random, count: int) -> list[int]:
        """One of `CANARIES` after each of the words that other answers hold, too."""
        canary = rng.choice(CANARIES)
        words = [token for text in (" the", ",", " of", " a") for token in self.encode(text)]
        return _resized([token for word in words for token in (word, canary)], count)

    def thinking(self) -> list[int]:
        """What makes an answer begin with thinking, at a prompt's end."""
        return self.encode(THINK_START)


def _resized(ids: list[int], count: int) -> list[int]:
    return (ids * (count // len(ids) + 1))[:count]
