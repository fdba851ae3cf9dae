"""Prompts and long values by a short description, so that a case is small and can be read."""

import functools
import random
from typing import Any

from aasd_testing.fuzz.limits import THINK_START
from aasd_testing.prompts import real_prompts

NUM_TEXTS = 16

# Ids below are control tokens and single bytes: of half a character at a prompt's end, vLLM tells in the answer.
_FIRST_PLAIN_ID = 300

CANARIES = range(48000, 48064)
"""Token ids of ``canary`` prompts: a draft with one, for a request without, was made from another's text."""


def describe(rng: random.Random, max_tokens: int) -> dict[str, Any]:
    """A random prompt of at most about that many tokens, at least 8."""
    tokens = rng.randint(4, max_tokens)
    shape = rng.choices(("text", "chat", "repeat", "period", "noise"), (6, 6, 1, 2, 1))[0]
    described = {"shape": shape, "seed": rng.randrange(NUM_TEXTS), "tokens": tokens}
    if shape == "period":
        described["period"] = rng.randint(2, max(2, tokens // 2))
    return described


def expanded(value: Any) -> Any:
    """A value as it is sent: its ranges of ids, its lists of words and its long strings written out."""
    match value:
        case {"from": first, "to": end}:
            return list(range(first, end))
        case {"words": count}:
            return [f" {number}th" for number in range(count)]
        case {"repeat": character, "times": count}:
            return character * count
        case dict():
            return {name: expanded(inner) for name, inner in value.items()}
    return value


def options_of(step: dict[str, Any]) -> dict[str, Any]:
    """What a request has in ``vllm_xargs``."""
    options = expanded(step["xargs"])
    return options | {"aasd_" + "k" * step["long_key"]: "v" * 100} if "long_key" in step else options


class Prompts:
    """Token ids of described prompts, by the tokenizer of the checkpoint at a path."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._texts = real_prompts(NUM_TEXTS)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._model)

    @functools.cached_property
    def _embeddings(self) -> Any:
        from safetensors import safe_open

        with safe_open(f"{self._model}/model.safetensors", "pt") as weights:
            return weights.get_tensor("model.embed_tokens.weight").float()

    def encode(self, text: str) -> list[int]:
        """A text's ids, without a sequence's first."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, described: dict[str, Any]) -> str:
        """The beginning of the text that a prompt is of, as a user's message."""
        return self._texts[described["seed"] % NUM_TEXTS][: 3 * described["tokens"]]

    def embeddings(self, described: dict[str, Any]) -> Any:
        """``[num_tokens, hidden_size]`` float32, with which the model says what it says to the ids."""
        return self._embeddings[self.ids(described)].clone()

    def ids(self, described: dict[str, Any]) -> list[int]:
        """As many as it says, but for ``chat``, which its template makes longer, and one more to begin to think."""
        return self._ids(described) + (self.encode(THINK_START) if described.get("think") else [])

    def _ids(self, described: dict[str, Any]) -> list[int]:
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
            case "canary":
                # Each follows a word that other answers hold, too.
                words = [word for text in (" the", ",", " of", " a") for word in self.encode(text)]
                return self._repeated([token for word in words for token in (word, CANARIES[seed])], count)
            case "noise":
                return self._noise(seed, count)
        raise ValueError(f"shape {described['shape']!r} is unknown")

    def _noise(self, seed: int, count: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(_FIRST_PLAIN_ID, CANARIES.start) for _ in range(count)]

    @staticmethod
    def _repeated(ids: list[int], count: int) -> list[int]:
        return (ids * (count // len(ids) + 1))[:count]
