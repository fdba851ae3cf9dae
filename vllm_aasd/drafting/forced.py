"""Drafts beside a grammar: what it forbids is cut off, and what it forces is drafted.

A grammar forces *text*; a draft needs the tokens in which the target writes it. So forced text is tokenized together
with what stands before, and ends before a token that might become another one with what comes after.

Where the grammar leaves only white space free, as between the signs of JSON, the target's habits decide
(`vllm_aasd.drafting.json_style`), and the text after it is forced again. Whatever is drafted, the target decides under
its own grammar.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

from vllm_aasd.drafting.json_style import JSONReader
from vllm_aasd.drafting.steered_draft import CONTEXT, END, FORCED, STYLE, Drafted, Matcher, Steered, SteeredDraft

_CHARS_PER_TOKEN = 8
# Characters of forced text that identify it later.
_REST = 24
_MOST_ENCODED = 4096
# What a grammar is asked about, one by one: signs of JSON or the beginning of words, and what may come in strings.
_SIGNS = '"{[,:}]-01.etfnaA'
_WORDS = 'aA0"- '
# Where a value ends that is copied from a text.
_BOUNDARIES = frozenset(" .,;:!?)'\n")
_MOST_PROBES = 4

# From this probability on, the drafter's token is right more often than the grammar's where the two differ.
_SURE = 0.9
# How often a token of these sources is accepted, at first, and how fast that is learned.
_FIRST_RATES = (0.98, 0.9, 0.6)
_RATE = 0.02


class Vocabulary(Protocol):
    """The target's tokens."""

    def text_of(self, token_id: int) -> str:
        """The text of a token within other text."""

    def encode(self, text: str) -> list[int]:
        """Text as the target writes it."""


Part = tuple[str, int]
"""Some text, and its source."""


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
        drafting = SteeredDraft(matcher, reader.ahead(), last, namespace, limit)
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
        return drafting.steered()

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

    def _follow(self, drafting: SteeredDraft, drafted: Drafted) -> None:
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

    def _venture(self, drafting: SteeredDraft, drafted: Drafted, end_token_id: int | None) -> bool:
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

    def _force(self, drafting: SteeredDraft, end_token_id: int | None, first: Part = ("", FORCED)) -> bool:
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

    def _forced_parts(self, drafting: SteeredDraft, first: Part) -> tuple[list[Part], tuple[str, ...], bool]:
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
