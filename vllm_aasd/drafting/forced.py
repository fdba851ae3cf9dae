"""Drafts beside a grammar: what it forbids is cut off, and what it forces is drafted.

A grammar forces *text*; a draft needs the tokens in which the target writes it. So forced text is tokenized together
with what stands before, and ends before a token that might become another one with what comes after.

Where the grammar leaves only white space free, as between the signs of JSON, the target's habits decide
(`vllm_aasd.drafting.json_style`), and the text after it is forced again. Whatever is drafted, the target decides under
its own grammar.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vllm_aasd.drafting.json_style import JSONReader

NUM_SOURCES = 4
FORCED, STYLE, END, CONTEXT = range(NUM_SOURCES)
"""Where a draft token comes from: the grammar; the grammar, if the white space is as expected; a value of JSON that
ends where the text does that it is copied from; the drafter."""

_CHARS_PER_TOKEN = 8
# Characters of forced text that identify it later.
_REST = 24
_MOST_ENCODED = 4096
# What may come, of which a grammar is asked for each: signs of JSON or the beginning of words, and within strings.
_SIGNS = '"{[,:}]-01.etfnaA'
_WORDS = 'aA0"- '
# Where a value ends that is copied from a text.
_BOUNDARIES = frozenset(" .,;:!?)'\n")
_MOST_PROBES = 4

# A draft ends after a token at which it is less likely than this to be accepted.
_MIN_SURVIVAL = 0.05
# From this probability on, the drafter's token is right more often than the grammar's where the two differ.
_SURE = 0.9
# How often a token of these sources is accepted, at first, and how fast that is learned.
_FIRST_RATES = (0.98, 0.9, 0.6)
_RATE = 0.02


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


class Vocabulary(Protocol):
    """The target's tokens."""

    def text_of(self, token_id: int) -> str:
        """The text of a token within other text."""

    def encode(self, text: str) -> list[int]:
        """Text as the target writes it."""


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


Part = tuple[str, int]
"""Some text, and its source."""


class Drafted(NamedTuple):
    """What the drafter, which knows nothing of grammars, goes on with.

    Attributes:
        token_ids: its draft.
        probs: of each token, the probability that it is accepted if those before it are.
    """

    token_ids: list[int]
    probs: list[float]


class GrammarSteering:
    """Drafts under grammars, and learns how often that is right.

    Args:
        vocabulary: of the target.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._rates = list(_FIRST_RATES)
        self._encoded: dict[tuple[int, str, tuple[str, ...]], list[int]] = {}
        # By namespace, the token before and the text, the next token where the target wrote another than expected.
        self._written: dict[tuple[int | None, int, str], int] = {}

    def draft(
        self,
        matcher: Matcher,
        reader: JSONReader,
        last: int,
        namespace: int | None,
        drafted: Drafted,
        limit: int,
        end_token_id: int | None,
    ) -> Steered:
        """Draft a request's continuation.

        Args:
            matcher: its grammar, which ends as it began.
            reader: of its text.
            last: the last token of its context.
            namespace: of the requests that it shares with how the target has written forced text; None for none.
            drafted: tokens are taken from it up to where the grammar forbids or, unless it is sure, forces another.
            limit: the most tokens, >= 0.
            end_token_id: the token that ends it; None if that isn't to be drafted.
        """
        drafting = _Drafting(matcher, reader.ahead(), last, namespace, limit)
        try:
            while drafting.room > 0:
                before = len(drafting.token_ids)
                self._follow(drafting, drafted)
                if drafting.room == 0 or self._force(drafting, end_token_id):
                    break
                if len(drafting.token_ids) > before:
                    continue
                if self._venture(drafting, drafted, end_token_id) or len(drafting.token_ids) == before:
                    break
        finally:
            matcher.rollback(len(drafting.token_ids))
        return Steered(
            drafting.token_ids, drafting.sources, drafting.probs, [*drafting.rests, drafting.rest], last, namespace
        )

    def verified(self, draft: Steered, length: int, token_ids: Sequence[int]) -> None:
        """Learn what became of a draft.

        Args:
            draft: as `draft` has returned it.
            length: how many of its tokens were verified.
            token_ids: what the target has emitted: accepted tokens, and one more.
        """
        num_accepted = len(token_ids) - 1
        for position, source in enumerate(draft.sources[: min(length, num_accepted + 1)]):
            if source != CONTEXT:
                self._rates[source] += _RATE * ((position < num_accepted) - self._rates[source])
        is_other = num_accepted < length or length == len(draft.token_ids)
        rest = draft.rests[num_accepted] if is_other else ""
        if rest and draft.namespace is not None:
            key = draft.namespace, token_ids[-2] if num_accepted else draft.last, rest
            text = self._vocabulary.text_of(token_ids[-1])
            if len(self._written) >= _MOST_ENCODED:
                self._written.clear()
            if text and rest.startswith(text):
                self._written[key] = token_ids[-1]
            else:
                self._written.pop(key, None)

    def _follow(self, drafting: "_Drafting", drafted: Drafted) -> None:
        """Go on with the tokens that the drafter is sure of."""
        matcher, at = drafting.matcher, drafting.num_followed(drafted)
        while drafting.room > 0 and at < len(drafted.token_ids) and drafted.probs[at] >= _SURE:
            token_id, source, prob = drafted.token_ids[at], CONTEXT, drafted.probs[at]
            text = self._vocabulary.text_of(token_id)
            if text and matcher.forced_text().startswith(text):
                source, prob = FORCED, max(prob, self._rates[FORCED])
            if not drafting.take(token_id, text, source, prob):
                return
            at += 1

    def _venture(self, drafting: "_Drafting", drafted: Drafted, end_token_id: int | None) -> bool:
        """Go on with a token that the drafter isn't sure of, or, where that ends a value, with the value's end.

        Returns:
            Whether all ends with that.
        """
        reader, at = drafting.reader, drafting.num_followed(drafted)
        if at == len(drafted.token_ids):
            return True
        token_id = drafted.token_ids[at]
        text = self._vocabulary.text_of(token_id)
        is_end = reader.in_string and reader.string_length and text and not set(text) - _BOUNDARIES
        if not is_end and drafting.take(token_id, text, CONTEXT, drafted.probs[at]):
            return False
        ending = _ending(drafting.matcher, reader)
        return not ending or self._force(drafting, end_token_id, (ending, END))

    def _force(self, drafting: "_Drafting", end_token_id: int | None, first: Part = ("", FORCED)) -> bool:
        """Draft what is forced, after a part that isn't; returns whether all ends with that."""
        parts, following, is_end = self._forced_parts(drafting, first)
        text = "".join(part for part, _ in parts)
        sources = [source for part, source in parts for _ in part]
        token_ids, at = self._tokens(drafting.last, text, following), 0
        while at < len(text):
            rest = text[at : at + _REST]
            token_id = self._written.get((drafting.namespace, drafting.last, rest))
            if token_id is None or token_ids[:1] == [token_id]:
                if not token_ids:
                    drafting.rest = rest
                    return False
                token_id = token_ids.pop(0)
            else:
                token_ids = self._tokens(token_id, text[at + len(self._vocabulary.text_of(token_id)) :], following)
            written = self._vocabulary.text_of(token_id)
            source = max(sources[at : at + len(written)], default=FORCED)
            if drafting.room == 0 or not drafting.take(token_id, written, source, self._rates[source], rest):
                return False
            at += len(written)
        if not is_end:
            return False
        if end_token_id is not None and drafting.room > 0:
            drafting.take(end_token_id, "", FORCED, self._rates[FORCED])
        return True

    def _forced_parts(self, drafting: "_Drafting", first: Part) -> tuple[list[Part], tuple[str, ...], bool]:
        """The text that is forced, in parts with their sources; what may come after; and whether nothing may."""
        matcher, ahead = drafting.matcher, drafting.reader.ahead()
        text, source = first
        parts: list[Part] = []
        left = drafting.room * _CHARS_PER_TOKEN
        signs: list[str] = []
        while left > 0:
            if not text:
                text, source = matcher.forced_text(), FORCED
            if not text and not parts and (ahead.in_string or not ahead.depth) and not matcher.is_complete():
                # Nothing is forced, whatever may come.
                return [], (), False
            if not text:
                allowed = (sign for sign in (_WORDS if ahead.in_string else _SIGNS) if _allows(matcher, sign))
                signs = list(itertools.islice(allowed, _MOST_PROBES))
                text, source = _styled(signs, ahead), STYLE
            if not text or not matcher.accept_text(text):
                break
            ahead.read(text)
            parts.append((text, source))
            left -= len(text)
            text = ""
        following = _following(signs, ahead) if parts else ()
        is_end = left > 0 and not signs and matcher.is_complete()
        matcher.rollback(len(parts))
        return parts, following, is_end

    def _tokens(self, last: int, text: str, following: tuple[str, ...]) -> list[int]:
        """The tokens of forced text after a token, as far as they don't depend on what follows."""
        key = (last, text, following)
        found = self._encoded.get(key)
        if found is None:
            if len(self._encoded) >= _MOST_ENCODED:
                self._encoded.clear()
            found = self._encoded[key] = self._encode(last, text, following)
        return found.copy()

    def _encode(self, last: int, text: str, following: tuple[str, ...]) -> list[int]:
        if not text:
            return []
        before = self._vocabulary.text_of(last) + text
        token_ids = self._vocabulary.encode(before)
        if token_ids[:1] != [last]:
            # The target would have written another token, so it doesn't expect this text, and goes on in bits.
            return []
        num_kept = len(token_ids)
        for sign in following:
            other = self._vocabulary.encode(before + sign)
            same = (at for at, (one, two) in enumerate(zip(token_ids, other, strict=False)) if one != two)
            num_kept = min(num_kept, next(same, len(other)))
        return token_ids[1:num_kept]


class _Drafting:
    """A draft under way: the matcher and the reader stand at its end."""

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


def _allows(matcher: Matcher, text: str) -> bool:
    is_allowed = matcher.accept_text(text)
    if is_allowed:
        matcher.rollback(1)
    return is_allowed


def _styled(signs: list[str], reader: JSONReader) -> str:
    """The only sign of JSON that may come, after white space as expected; empty if there is a choice."""
    if len(signs) != 1 or signs[0].isalnum() or reader.in_string or not reader.depth:
        return ""
    gap = reader.gap_before(signs[0])
    return "" if gap is None else gap + signs[0]


def _ending(matcher: Matcher, reader: JSONReader) -> str:
    """The text that ends a string or a number of JSON that has begun; empty if there is a choice."""
    if reader.in_string:
        return '"' if reader.string_length and _allows(matcher, '"') else ""
    signs = [sign for sign in ",}]" if _allows(matcher, sign)] if reader.last.isdigit() else []
    return ((reader.gap_before(signs[0]) or "") + signs[0]) if len(signs) == 1 else ""


def _following(signs: list[str], reader: JSONReader) -> tuple[str, ...]:
    """Some of the texts that are likely to come, from the signs that may."""
    if reader.in_string:
        return tuple(signs)
    found: list[str] = []
    for sign in signs:
        gap = reader.gap_before(sign)
        found += [gap + sign] if gap is not None else [sign, " " + sign, "\n"]
    return tuple(dict.fromkeys(found))
