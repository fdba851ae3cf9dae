"""The drafts of requests with structured output, made in the scheduler's process.

Only there is it known what a grammar forces next. So while a request's grammar is in force, its drafts come from a
drafter of the scheduler's own, which asks the grammar at every token; the worker's are dropped. Before that, while the
model reasons, the worker's are taken, and vLLM cuts them where the grammar begins.
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
from vllm_aasd.drafting import drafter as drafting
from vllm_aasd.drafting.draft_length import LEAST_GAIN, lengths_and_gain, reproducible_lengths
from vllm_aasd.drafting.drafter import MIN_SURVIVAL, NO_ALIGNMENT, Drafter
from vllm_aasd.drafting.forced import CONTEXT, NUM_SOURCES, GrammarSteering, Steered
from vllm_aasd.drafting.json_style import JSONReader, JSONStyle
from vllm_aasd.drafting.known_text import KnownTexts
from vllm_aasd.engine import shared_prior, startup
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.grammar.matchers import matcher_of
from vllm_aasd.engine.grammar.messages import CountedGrammarOutput, InformedDraftTokenIds
from vllm_aasd.engine.namespaces import prediction_of, shared_namespace
from vllm_aasd.engine.request_options import changes_with_drafts, longest_draft, settings_of

# Of the server's memory for earlier answers, the share of those with structured output, which only they draft from.
_MEMORY_SHARE = 4
# The survival, by token, that the drafts of other requests in the batch are taken to have: their worker knows it.
_OTHERS_SURVIVAL = 0.8


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
    """What is held for one request: its text as an array, and where in JSON it has come to."""

    def __init__(self, style: JSONStyle, namespace: int | None, first: int) -> None:
        self.namespace = namespace
        self.reader = JSONReader(JSONStyle(style))
        self.num_read = first
        self._token_ids = np.empty(max(256, 2 * first), np.int32)
        self._length = 0
        self.sent: _Sent | None = None

    def context(self, token_ids: Sequence[int]) -> np.ndarray:
        """All tokens, of which only the new ones are copied."""
        length = len(token_ids)
        if length > len(self._token_ids):
            self._token_ids = np.resize(self._token_ids, 2 * length)
        self._token_ids[self._length : length] = token_ids[self._length : length]
        self._length = length
        return self._token_ids[:length]


class GrammarDrafts:
    """Drafts for the requests of one engine whose grammar is in force.

    Args:
        vllm_config: with our speculative config.
        manager: of the grammars.
        faults: of the scheduler.
    """

    def __init__(self, vllm_config: VllmConfig, manager: StructuredOutputManager, faults: Faults) -> None:
        speculative_config = vllm_config.speculative_config
        self._settings = settings = speculative_config.aasd
        self._longest = longest = speculative_config.num_speculative_tokens
        self._manager = manager
        self._faults = faults
        self._vocabulary = TokenTexts(manager.tokenizer)
        self._steering = GrammarSteering(self._vocabulary)
        self._style = JSONStyle()
        prior = None if settings.prior == "off" else shared_prior.own_prior(vllm_config.model_config)
        num_bytes = startup.memory_bytes(settings) // _MEMORY_SHARE
        self._drafter = Drafter(
            vllm_config.model_config.get_vocab_size(),
            longest,
            MIN_SURVIVAL,
            prior,
            texts=KnownTexts(num_bytes, longest),
        )
        drafting.warm_up()
        self._requests: dict[str, _Request | None] = {}
        self._num_clears = self._num_faults_told = 0
        # As `vllm_aasd.counters.Counters.add_grammar` takes them.
        self._counts = np.zeros(NUM_GRAMMAR_COUNTS)

    def steered(self, drafts: DraftTokenIds, requests: Mapping[str, Request]) -> DraftTokenIds:
        """The workers' drafts, with ours for the requests whose grammar is in force.

        Args:
            drafts: the workers'.
            requests: the scheduler's, by id.
        """
        began = time.perf_counter()
        if isinstance(drafts, InformedDraftTokenIds) and drafts.num_clears != self._num_clears:
            self._num_clears = drafts.num_clears
            self.clear()
        drafted: dict[int, Steered] = {}
        for row, req_id in enumerate(drafts.req_ids):
            request = requests.get(req_id)
            if request is None or not request.use_structured_output or self._faults.is_off("grammar"):
                continue
            with self._faults.contained("grammar"):
                steered = self._draft(request)
                if steered is not None:
                    drafted[row] = steered
                continue
            self._requests[req_id] = None
            self._drafter.abandon(req_id)
        if drafted:
            with self._faults.contained("grammar"):
                drafts = self._cut(drafts, drafted, requests)
            self._counts[-1] += time.perf_counter() - began
        return drafts

    def _draft(self, request: Request) -> Steered | None:
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
        context = state.context(request.all_token_ids)
        for token_id in context[state.num_read :].tolist():
            state.reader.read(self._vocabulary.text_of(token_id))
        state.num_read = len(context)
        self._drafter.draft(req_id, context, NO_ALIGNMENT, 0)
        limit = longest_draft(request, request.num_tokens, self._longest)
        steered = self._steering.draft(
            matcher,
            state.reader,
            int(context[-1]),
            state.namespace,
            lambda begun: self._propose(req_id, begun, limit),
            limit,
            request.sampling_params.eos_token_id,
        )
        is_own = np.array(steered.sources, np.int8) == CONTEXT
        self._drafter.settle(req_id, np.array(steered.probs, np.float32), is_own)
        return steered

    def _admitted(self, request: Request) -> _Request | None:
        params = request.sampling_params
        settings = settings_of(params, self._settings)
        if (
            not (settings.enabled and settings.grammar)
            or changes_with_drafts(params)
            or request.prompt_embeds is not None
        ):
            return None
        namespace = shared_namespace(params, settings)
        self._drafter.admit(request.request_id, namespace, prediction_of(params))
        return _Request(self._style, namespace, request.num_prompt_tokens)

    def _propose(self, req_id: str, begun: list[int], limit: int) -> tuple[list[int], list[float]]:
        token_ids, survival = self._drafter.draft_after(req_id, begun, limit)
        survival = survival.tolist()
        probs = [now / before for now, before in zip(survival, [1.0, *survival], strict=False)]
        return token_ids.tolist(), probs

    def _cut(
        self, drafts: DraftTokenIds, drafted: Mapping[int, Steered], requests: Mapping[str, Request]
    ) -> DraftTokenIds:
        """The drafts of a step, ours ending where more tokens aren't worth the time."""
        survival = np.zeros((len(drafts.req_ids), self._longest))
        for row, token_ids in enumerate(drafts.draft_token_ids):
            probs = drafted[row].probs if row in drafted else [_OTHERS_SURVIVAL] * len(token_ids)
            survival[row, : len(probs)] = np.cumprod(probs)
        lengths = self._lengths(survival, drafts)
        token_ids = list(drafts.draft_token_ids)
        for row, steered in drafted.items():
            params = requests[drafts.req_ids[row]].sampling_params
            length = lengths[row]
            if params.seed is not None and params.temperature > 0:
                length = reproducible_lengths(survival[row : row + 1])[0]
            state = self._requests[drafts.req_ids[row]]
            assert state is not None
            state.sent = _Sent(steered, length)
            token_ids[row] = steered.token_ids[:length]
        return DraftTokenIds(drafts.req_ids, token_ids)

    def _lengths(self, survival: np.ndarray, drafts: DraftTokenIds) -> np.ndarray:
        if not isinstance(drafts, InformedDraftTokenIds) or drafts.step_times is None:
            return np.count_nonzero(survival, axis=1)
        lengths, gain = lengths_and_gain(survival, drafts.step_times, drafts.overhead)
        return lengths if gain >= LEAST_GAIN else np.zeros_like(lengths)

    def learn(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Learn what became of the drafts of a step, before vLLM adds its tokens to the requests."""
        for req_id, token_ids in scheduled.scheduled_spec_decode_tokens.items():
            state = self._requests.get(req_id)
            row = output.req_id_to_index.get(req_id)
            if state is None or state.sent is None or row is None or not output.sampled_token_ids:
                continue
            with self._faults.contained("grammar"):
                self._learn(req_id, state.sent, len(token_ids), output.sampled_token_ids[row])
            state.sent = None

    def _learn(self, req_id: str, sent: _Sent, num_scheduled: int, emitted: Sequence[int]) -> None:
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
            if sources[num_accepted] != CONTEXT:
                # The drafter isn't to blame.
                sources = sources[:num_accepted]
        self._drafter.verified(req_id, len(sources), num_accepted)

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
        self._drafter.forget(req_ids)

    def clear(self) -> None:
        """Forget what earlier requests answered."""
        self._drafter.clear_memory()
