"""vLLM's grammars, as drafts ask them: copies, so that the request's own is never touched."""

import functools
import logging
from typing import Any

from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_aasd.drafting.steered_draft import Matcher

logger = logging.getLogger("vllm.aasd")


class XgrammarMatcher:
    """A `Matcher` of xgrammar.

    Args:
        grammar: the request's.
    """

    def __init__(self, grammar: XgrammarGrammar) -> None:
        matcher = grammar.matcher.fork()
        # Through xgrammar's checks, a question to the grammar would take twice as long.
        self.accept = matcher.accept_token
        self.accept_text = matcher.accept_string
        self.forced_text = matcher.find_jump_forward_string
        self.is_complete = matcher.is_completed
        self.is_ended = matcher.is_terminated
        self._matcher = matcher

    def rollback(self, num_steps: int) -> None:
        """Undo the last steps."""
        if num_steps:
            self._matcher.rollback(num_steps)


class GuidanceMatcher:
    """A `Matcher` of llguidance.

    Args:
        grammar: the request's.
    """

    def __init__(self, grammar: GuidanceGrammar) -> None:
        self._matcher: Any = grammar.ll_matcher.deep_copy()
        self._tokenizer: Any = grammar.ll_tokenizer
        self._steps: list[int] = []

    def accept(self, token_id: int) -> bool:
        """Advance by a token."""
        return self._consume([token_id])

    def accept_text(self, text: str) -> bool:
        """Advance by text, however it is tokenized."""
        return self._consume(self._tokenizer.tokenize_str(text))

    def _consume(self, token_ids: list[int]) -> bool:
        # It refuses to stop, and is in error after what it doesn't allow.
        if self._matcher.is_stopped() or self._matcher.validate_tokens(token_ids) < len(token_ids):
            return False
        self._matcher.consume_tokens(token_ids)
        self._steps.append(len(token_ids))
        return True

    def rollback(self, num_steps: int) -> None:
        """Undo the last steps."""
        first = len(self._steps) - num_steps
        self._matcher.rollback(sum(self._steps[first:]))
        del self._steps[first:]

    def forced_text(self) -> str:
        """The text that has to come."""
        return self._matcher.compute_ff_bytes().decode(errors="ignore")

    def is_complete(self) -> bool:
        """Whether it may end here."""
        return self._matcher.is_accepting()

    def is_ended(self) -> bool:
        """Whether a token has ended it."""
        return self._matcher.is_stopped()


def matcher_of(grammar: StructuredOutputGrammar) -> Matcher | None:
    """A copy of a request's grammar, in its present state; None if its backend can't say what it forces."""
    if isinstance(grammar, XgrammarGrammar):
        return XgrammarMatcher(grammar)
    if isinstance(grammar, GuidanceGrammar):
        return GuidanceMatcher(grammar)
    _say_once(type(grammar).__name__)
    return None


@functools.cache
def _say_once(name: str) -> None:
    logger.info("aasd: %s can't say what it forces, so drafts under such grammars are only cut by them", name)
