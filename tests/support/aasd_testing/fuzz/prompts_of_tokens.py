"""Prompts by a short description, so that a case is small and can be read: texts, repetitions, periods, noise."""

import functools
import random
from typing import Any

from aasd_testing.prompts import real_prompts

NUM_TEXTS = 16

# Ids below are a tokenizer's control tokens, in the demo model's as in most.
_FIRST_PLAIN_ID = 100


def describe(rng: random.Random, max_tokens: int) -> dict[str, Any]:
    """A random prompt of at most about that many tokens.

    Args:
        rng: decides.
        max_tokens: at least 8.
    """
    tokens = rng.randint(4, max_tokens)
    shape = rng.choices(("text", "chat", "repeat", "period", "noise"), (6, 6, 1, 2, 1))[0]
    described = {"shape": shape, "seed": rng.randrange(NUM_TEXTS), "tokens": tokens}
    if shape == "period":
        described["period"] = rng.randint(2, max(2, tokens // 2))
    return described


class Prompts:
    """Token ids of described prompts.

    Args:
        model: path of the checkpoint whose tokenizer it is.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._texts = real_prompts(NUM_TEXTS)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._model)

    def text(self, described: dict[str, Any]) -> str:
        """The beginning of the text that a prompt is of, as a user's message."""
        return self._texts[described["seed"] % NUM_TEXTS][: 3 * described["tokens"]]

    def ids(self, described: dict[str, Any]) -> list[int]:
        """The prompt's token ids: exactly as many as it says, but for ``chat``, which its template makes longer."""
        count, seed = described["tokens"], described["seed"]
        match described["shape"]:
            case "text":
                return self._repeated(self.tokenizer.encode(self._texts[seed % NUM_TEXTS]), count)
            case "chat":
                message = [{"role": "user", "content": self.text(described)}]
                return self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            case "repeat":
                return [_FIRST_PLAIN_ID + seed] * count
            case "period":
                return self._repeated(self._noise(seed, described["period"]), count)
            case "noise":
                return self._noise(seed, count)
        raise ValueError(f"shape {described['shape']!r} is unknown")

    def _noise(self, seed: int, count: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(_FIRST_PLAIN_ID, self.tokenizer.vocab_size) for _ in range(count)]

    @staticmethod
    def _repeated(ids: list[int], count: int) -> list[int]:
        return (ids * (count // len(ids) + 1))[:count]
