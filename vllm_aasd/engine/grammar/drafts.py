"""The drafts of requests with structured output, made in the scheduler's process.

Only there is it known what a grammar forces next. So while a request's grammar is in force, the worker's draft is
followed as far as it goes, and what the grammar forces is put in its place or after it. Before that, while the model
reasons, the worker's is taken, and vLLM cuts it where the grammar begins.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_aasd.counters import NUM_GRAMMAR_COUNTS
from vllm_aasd.drafting.draft_length import LEAST_GAIN, lengths_and_gain, reproducible_lengths
from vllm_aasd.drafting.forced import GrammarSteering
from vllm_aasd.drafting.json_style import JSONReader, JSONStyle
from vllm_aasd.drafting.steered_draft import NUM_SOURCES, Drafted, Steered
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.grammar.matchers import matcher_of
from vllm_aasd.engine.grammar.messages import CountedGrammarOutput, InformedDraftTokenIds
from vllm_aasd.engine.namespaces import shared_namespace
from vllm_aasd.engine.request_options import changes_with_drafts, longest_draft, settings_of


class TokenTexts:
    """The target's tokens: a `Vocabulary`.

    Args:
        tokenizer: the target's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Alone, some tokenizers' tokens lose the space that they begin with.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._num_before = len(tokenizer.decode(self._before))
        self._texts: dict[int, str] = {}
        # Without what vLLM and transformers add, which takes four times as long.
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._first, self._num_first = "", 0
        if self.text_of(self.encode('"')[0]) != '"':
            # It puts a space before a text.
            self._num_first, self._first = len(self.encode("\n")), "\n"

    def text_of(self, token_id: int) -> str:
        """The text of a token within other text."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._tokenizer.decode([*self._before, token_id])[self._num_before :]
            self._texts[token_id] = text
        return text

    def encode(self, text: str) -> list[int]:
        """Text as the target writes it."""
        text = self._first + text
        if self._fast is not None:
            return self._fast.encode(text, add_special_tokens=False).ids[self._num_first :]
        return self._tokenizer.encode(text, add_special_tokens=False)[self._num_first :]


class _Sent(NamedTuple):
    """A draft that was handed to vLLM."""

    steered: Steered
    length: int


class _Request:
    """What is held for one request: where in JSON its text has come to, and its draft."""

    def __init__(self, style: JSONStyle, namespace: int | None, num_read: int) -> None:
        self.reader = JSONReader(JSONStyle(style))
        self.namespace = namespace
        self.num_read = num_read
        self.sent: _Sent | None = None


class GrammarDrafts:
    """Drafts for the requests of one engine whose grammar is in force.

    Args:
        vllm_config: with our speculative config.
        manager: of the grammars.
        faults: of the scheduler.
    """

    def __init__(self, vllm_config: VllmConfig, manager: StructuredOutputManager, faults: Faults) -> None:
        speculative_config = vllm_config.speculative_config
        self._settings = speculative_config.aasd
        self._longest = speculative_config.num_speculative_tokens
        self._manager = manager
        self._faults = faults
        self._vocabulary = TokenTexts(manager.tokenizer)
        self._steering = GrammarSteering(self._vocabulary)
        self._style = JSONStyle()
        self._requests: dict[str, _Request | None] = {}
        self._num_faults_told = 0
        # As `vllm_aasd.counters.Counters.add_grammar` takes them.
        self._counts = np.zeros(NUM_GRAMMAR_COUNTS)

    def steered(self, drafts: DraftTokenIds, requests: Mapping[str, Request]) -> DraftTokenIds:
        """The workers' drafts, with ours for the requests whose grammar is in force.

        Args:
            drafts: the workers'.
            requests: the scheduler's, by id.
        """
        if not isinstance(drafts, InformedDraftTokenIds):
            return drafts
        began = time.perf_counter()
        drafted: dict[int, Steered] = {}
        for row, req_id in enumerate(drafts.req_ids):
            request = requests.get(req_id)
            if request is None or not request.use_structured_output or self._faults.is_off("grammar"):
                continue
            with self._faults.contained("grammar"):
                steered = self._draft(request, drafts.whole[row], drafts.survival[row])
                if steered is not None:
                    drafted[row] = steered
                continue
            self._requests[req_id] = None
        token_ids = drafts.draft_token_ids
        if drafted:
            with self._faults.contained("grammar"):
                token_ids = self._cut(drafts, drafted, requests)
            self._counts[-1] += time.perf_counter() - began
        return DraftTokenIds(drafts.req_ids, token_ids)

    def _draft(self, request: Request, token_ids: list[int], survival: np.ndarray) -> Steered | None:
        """A request's draft; None if its grammar isn't in force, or can't say what it forces."""
        req_id = request.request_id
        if req_id not in self._requests:
            self._requests[req_id] = self._admitted(request)
        state = self._requests[req_id]
        if state is None or request.is_finished() or request.is_prefill_chunk:
            return None
        state.sent = None
        if self._manager._get_constraint_bounds(request, ()).grammar_start != 0:
            # Reasoning is no JSON.
            state.num_read = request.num_tokens
            return None
        matcher = matcher_of(request.structured_output_request.grammar)
        if matcher is None:
            return None
        context = request.all_token_ids
        for token_id in context[state.num_read :]:
            state.reader.read(self._vocabulary.text_of(token_id))
        state.num_read = len(context)
        expected = survival[: len(token_ids)].tolist()
        return self._steering.draft(
            matcher,
            state.reader,
            context[-1],
            state.namespace,
            Drafted(
                token_ids, [now / max(before, 1e-9) for now, before in zip(expected, [1.0, *expected], strict=False)]
            ),
            longest_draft(request, request.num_tokens, self._longest),
            request.sampling_params.eos_token_id,
        )

    def _admitted(self, request: Request) -> _Request | None:
        params = request.sampling_params
        settings = settings_of(params, self._settings)
        if (
            not (settings.enabled and settings.grammar)
            or changes_with_drafts(params)
            or request.prompt_embeds is not None
        ):
            return None
        return _Request(self._style, shared_namespace(params, settings), request.num_prompt_tokens)

    def _cut(
        self, drafts: InformedDraftTokenIds, drafted: Mapping[int, Steered], requests: Mapping[str, Request]
    ) -> list[list[int]]:
        """The drafts of a step, ours ending where more tokens aren't worth the time."""
        token_ids = list(drafts.draft_token_ids)
        survival = np.zeros((len(token_ids), self._longest))
        for row, others in enumerate(token_ids):
            expected = np.cumprod(drafted[row].probs) if row in drafted else drafts.survival[row][: len(others)]
            survival[row, : len(expected)] = expected
        lengths = np.count_nonzero(survival, axis=1)
        if drafts.step_times is not None:
            worth, gain = lengths_and_gain(survival, drafts.step_times, drafts.overhead)
            lengths = worth if gain >= LEAST_GAIN else np.zeros_like(lengths)
        for row, steered in drafted.items():
            params = requests[drafts.req_ids[row]].sampling_params
            length = lengths[row]
            if params.seed is not None and params.temperature > 0:
                length = reproducible_lengths(survival[row : row + 1])[0]
            state = self._requests[drafts.req_ids[row]]
            assert state is not None
            state.sent = _Sent(steered, length)
            token_ids[row] = steered.token_ids[:length]
        return token_ids

    def learn(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Learn what became of the drafts of a step, before vLLM adds its tokens to the requests."""
        for req_id, token_ids in scheduled.scheduled_spec_decode_tokens.items():
            state = self._requests.get(req_id)
            row = output.req_id_to_index.get(req_id)
            if state is None or state.sent is None or row is None or not output.sampled_token_ids:
                continue
            with self._faults.contained("grammar"):
                self._learn(state.sent, len(token_ids), output.sampled_token_ids[row])
            state.sent = None

    def _learn(self, sent: _Sent, num_scheduled: int, emitted: Sequence[int]) -> None:
        sources, num_accepted = sent.steered.sources[: min(sent.length, num_scheduled)], len(emitted) - 1
        if not 0 <= num_accepted <= len(sources):
            return
        self._steering.verified(sent.steered, len(sources), emitted)
        for position, source in enumerate(sources):
            self._counts[source] += 1
            if position < num_accepted:
                self._counts[NUM_SOURCES + source] += 1
        if num_accepted < len(sources):
            self._counts[2 * NUM_SOURCES + sources[num_accepted]] += 1

    def counted(self, masks: GrammarOutput) -> CountedGrammarOutput:
        """The masks of a step, with what was counted since the last."""
        counts, self._counts = self._counts, np.zeros_like(self._counts)
        num_faults = self._faults.counts["grammar"] - self._num_faults_told
        self._num_faults_told += num_faults
        fields = {field.name: getattr(masks, field.name) for field in dataclasses.fields(masks)}
        return CountedGrammarOutput(**fields, counts=counts, num_faults=num_faults)

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is held for requests that have ended; unknown ones are ignored."""
        for req_id in req_ids:
            self._requests.pop(req_id, None)
