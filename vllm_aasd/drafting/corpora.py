"""Texts that are given by name, in one index to draft from.

Text is added at the end of the index, and nothing takes its place. When some of it is dropped, the rest is entered
again, so that no trace of it stays: neither its tokens, nor the places that it took of others' n-grams.
"""

from collections.abc import Iterable

import numpy as np

from vllm_aasd.kernels.text import MAX_CORPORA, PAGE_SIZE, index_bytes, new_index
from vllm_aasd.kernels.text.cpu import append


class Corpora:
    """An index of texts. A text is ``[n]`` int32, documents with a -1 after each.

    Args:
        texts: by name.
        spare_pages: room for what is added later.

    Attributes:
        index: a `TextIndex`, written in place.
    """

    def __init__(self, texts: dict[str, np.ndarray] | None = None, spare_pages: int = 0) -> None:
        texts = texts or {}
        self._texts: dict[str, tuple[int, np.ndarray]] = {}
        self._num_namespaces = 0
        self.index = new_index(sum(map(num_pages, texts.values())) + spare_pages)
        for name, text in texts.items():
            self.add(name, text)

    @property
    def names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._texts)

    def namespaces(self, names: Iterable[str]) -> list[int]:
        """The namespaces of those of some names that are there, `MAX_CORPORA` at most."""
        return [self._texts[name][0] for name in names if name in self._texts][:MAX_CORPORA]

    def add(self, name: str, text: np.ndarray) -> None:
        """Add a text, in the place of the one that has its name.

        Raises:
            ValueError: there is no room; then nothing has changed.
        """
        kept = [of for other, (_, of) in self._texts.items() if other != name]
        room = len(self.index.pages) - sum(map(num_pages, kept))
        if num_pages(text) > room:
            raise ValueError(
                f"corpus {name!r} takes {index_bytes(num_pages(text)) / 2**20:.1f} MiB, and there is room for "
                f"{index_bytes(room) / 2**20:.1f}"
            )
        if name in self._texts:
            self.drop(name)
        # Never one that was used before: who was given that of a dropped text doesn't see this one.
        self._num_namespaces += 1
        self._texts[name] = self._num_namespaces, text
        self._enter(*self._texts[name])

    def drop(self, name: str) -> None:
        """Drop a text.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self._texts:
            raise ValueError(f"there is no corpus {name!r}; there are {', '.join(map(repr, self._texts)) or 'none'}")
        del self._texts[name]
        for array in (self.index.tokens, self.index.pages, self.index.heads):
            array.fill(-1)
        self.index.begun[0] = 0
        for of in self._texts.values():
            self._enter(*of)

    def _enter(self, namespace: int, text: np.ndarray) -> None:
        for begin, end in _documents(text):
            append(self.index, namespace, -1, 0, text[begin:end], 0, end - begin)


def num_pages(text: np.ndarray) -> int:
    """How many pages a text takes."""
    return sum(-(-(end - begin) // PAGE_SIZE) for begin, end in _documents(text))


def _documents(text: np.ndarray) -> list[tuple[int, int]]:
    """Where each begins and ends."""
    ends = np.flatnonzero(text < 0).tolist()
    begins = [0, *(end + 1 for end in ends)]
    return list(zip(begins, ends, strict=False))
