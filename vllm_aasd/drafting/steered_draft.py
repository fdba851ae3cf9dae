"""A draft under a grammar: its tokens, where each comes from, and the grammar that has come as far."""

from typing import NamedTuple, Protocol

from vllm_aasd.drafting.json_style import JSONReader

NUM_SOURCES = 4
FORCED, STYLE, END, CONTEXT = range(NUM_SOURCES)
"""Where a draft token comes from: the grammar; the grammar, if the white space is as expected; a value of JSON that
ends where the text does that it is copied from; the drafter."""

# A draft ends after a token at which it is less likely than this to be accepted.
_MIN_SURVIVAL = 0.05


class Matcher(Protocol):
    """A grammar after some text: advanced by what is drafted, which undoes that in the end."""

    def accept(self, token_id: int) -> bool:
        """Advance by a token; False, and nothing changes, if it isn't allowed."""

    def accept_text(self, text: str) -> bool:
        """Advance by text, as one step; False, and nothing changes, if it isn't allowed."""

    def rollback(self, num_steps: int) -> None:
        """Undo the last steps."""

    def forced_text(self) -> str:
        """The text that has to come; empty if there is a choice."""

    def is_complete(self) -> bool:
        """Whether it may end here."""

    def is_ended(self) -> bool:
        """Whether a token has ended it; then nothing else may be asked."""


class Drafted(NamedTuple):
    """What the drafter, which knows nothing of grammars, goes on with.

    Attributes:
        token_ids: its draft.
        probs: of each token, the probability that it is accepted if those before it are.
    """

    token_ids: list[int]
    probs: list[float]


class Steered(NamedTuple):
    """A draft that a grammar allows.

    Attributes:
        token_ids: the draft.
        sources: of each token: `FORCED`, `STYLE`, `END` or `CONTEXT`.
        probs: of each token, the probability that it is accepted if those before it are.
        rests: at each token, the beginning of the forced text that it begins, empty for others; and of that after them.
        last: the token before.
        namespace: of the request.
    """

    token_ids: list[int]
    sources: list[int]
    probs: list[float]
    rests: list[str]
    last: int
    namespace: int | None


class SteeredDraft:
    """A draft under way: the matcher and the reader stand at its end.

    Args:
        matcher, reader: advanced by each token.
        last: the token before.
        namespace: of the request.
        limit: the most tokens.
    """

    def __init__(self, matcher: Matcher, reader: JSONReader, last: int, namespace: int | None, limit: int) -> None:
        self.matcher, self.reader, self.namespace = matcher, reader, namespace
        self._before, self._limit = last, limit
        self._survival = 1.0
        self.token_ids: list[int] = []
        self.sources: list[int] = []
        self.probs: list[float] = []
        self.rests: list[str] = []
        # Of the forced text after it, in whatever tokens.
        self.rest = ""

    @property
    def room(self) -> int:
        """How many tokens may still be drafted."""
        is_over = self._survival < _MIN_SURVIVAL or self.matcher.is_ended()
        return 0 if is_over else self._limit - len(self.token_ids)

    @property
    def last(self) -> int:
        """The last token of the text."""
        return self.token_ids[-1] if self.token_ids else self._before

    def num_followed(self, drafted: Drafted) -> int:
        """How many of the drafter's tokens it begins with; all, to go on with none, where it doesn't follow it."""
        count = len(self.token_ids)
        return count if self.token_ids == drafted.token_ids[:count] else len(drafted.token_ids)

    def take(self, token_id: int, text: str, source: int, prob: float, rest: str = "") -> bool:
        """Append a token, and its text, if the grammar allows it; returns whether it does."""
        if not self.matcher.accept(token_id):
            return False
        self.reader.read(text)
        self.token_ids.append(token_id)
        self.sources.append(source)
        self.probs.append(prob)
        self.rests.append(rest)
        self._survival *= prob
        self.rest = ""
        return True

    def steered(self) -> Steered:
        """What has become of it."""
        rests = [*self.rests, self.rest]
        return Steered(self.token_ids, self.sources, self.probs, rests, self._before, self.namespace)
