"""A fake of the V1 model runner around our proposer and verifier; the target is that of `fake_v2`."""

from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import DraftTokenIds

from aasd_testing.constants import with_constants
from aasd_testing.fake_v2 import BLOCK, VOCAB, WIDTH, next_token, scheduled
from vllm_aasd.engine.unsupported import SCHEDULER
from vllm_aasd.engine.v1 import adapter as v1
from vllm_aasd.engine.v1 import sampler_patches
from vllm_aasd.engine.v1.proposer import AASDProposer

MAX_LEN = 256
PREFILL = 5
"""Prompt tokens that are read in one step, so that some positions aren't sampled from."""


class _State(NamedTuple):
    scheduler_output: SimpleNamespace
    spec_decode_metadata: SimpleNamespace
    hidden_states: torch.Tensor
    logits: torch.Tensor


class FakeRunner:
    """Serves requests greedily, all of the batch at once, by our proposer.

    Args:
        prompts: what is in the batch at first, by request id.
        num_ranks: what the proposer is told of others.
        max_num_reqs: the most requests of a batch; those of `prompts` by default.
        draft_model: a `StandInDraftModel`; None for none.
        **settings: the server's.

    Attributes:
        is_plain: whether the last step was sampled as without speculation.
        masks: whether each step's logits are spoilt in place after sampling, as a grammar's mask does.
    """

    def __init__(
        self,
        prompts: dict[str, list[int]],
        num_ranks: int = 1,
        max_num_reqs: int | None = None,
        draft_model: Any = None,
        **settings: Any,
    ) -> None:
        max_num_reqs = max_num_reqs or len(prompts)
        self.device = torch.device("cpu")
        self.lora_config = None
        self.use_async_scheduling = False
        self.tokens: dict[str, list[int]] = {}
        self.num_computed: dict[str, int] = {}
        self.drafts: dict[str, list[int]] = {}
        self.requests: dict[str, SimpleNamespace] = {}
        self.num_accepted = 0
        self.masks = False
        self.is_plain = False
        self.num_logits_calls = 0
        self._ended: set[str] = set()
        self._entered: list[str] = []
        blocks = np.arange(max_num_reqs * MAX_LEN // BLOCK, dtype=np.int32).reshape(max_num_reqs, -1)
        self._blocks = SimpleNamespace(
            block_table=SimpleNamespace(np=blocks), block_size=BLOCK, slot_mapping=SimpleNamespace(gpu=None)
        )
        self.input_batch = SimpleNamespace(req_ids=[], block_table=[self._blocks], generators={}, req_prompt_embeds={})
        for req_id, prompt in prompts.items():
            self.add(req_id, prompt)
        self.input_ids = SimpleNamespace(gpu=None)
        self.execute_model_state = None
        model = SimpleNamespace(
            model="fake", revision=None, dtype=torch.float32, get_vocab_size=lambda: VOCAB, max_model_len=MAX_LEN
        )
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(
                aasd_corpora_file="",
                aasd_draft_model=None,
                aasd=with_constants(settings, {"prior": "off", "alignment": True}),
                num_speculative_tokens=WIDTH,
            ),
            model_config=model,
            scheduler_config=SimpleNamespace(
                max_num_seqs=max_num_reqs, max_num_batched_tokens=64, scheduler_cls=SCHEDULER
            ),
            kv_transfer_config=None,
            device_config=SimpleNamespace(device=self.device),
            parallel_config=SimpleNamespace(tensor_parallel_size=num_ranks),
        )
        proposer = AASDProposer(config)
        proposer._draft_model = draft_model
        proposer.load_model(SimpleNamespace(compute_logits=self.compute_logits))
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
        with patch.object(v1, "MIN_SURVIVAL", settings.get("min_survival", v1.MIN_SURVIVAL)):
            self.proposer = proposer.bind(self, SimpleNamespace(num_blocks=blocks.size, kv_cache_groups=[group]))
        self.rejection_sample = sampler_patches.patch_rejection_sample(strict_greedy)
        self.forward = sampler_patches.patch_rejection_sampler_forward(self._reject)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From the fake's hidden states, the pair of last tokens, to what the target says."""
        self.num_logits_calls += 1
        return _logits(hidden_states)

    def add(self, req_id: str, prompt: list[int], **params: Any) -> None:
        """A request arrives; it takes the first row that is free."""
        self.tokens[req_id] = list(prompt)
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": MAX_LEN, **params})
        self.requests[req_id] = SimpleNamespace(sampling_params=params, num_prompt_tokens=len(prompt))
        self.resume(req_id)

    def resume(self, req_id: str) -> None:
        """A request that was preempted is read again from its beginning, in whatever blocks are free."""
        self.num_computed[req_id], self.drafts[req_id] = 0, []
        self.input_batch.req_ids.append(req_id)
        self._entered.append(req_id)

    def preempt(self, req_id: str) -> None:
        """A request of the batch gives up its row and its blocks; rows behind it move up, as vLLM's do."""
        row = self.input_batch.req_ids.index(req_id)
        blocks, last = self._blocks.block_table.np, len(self.input_batch.req_ids)
        blocks[row:last] = np.roll(blocks[row:last], -1, axis=0)
        self.input_batch.req_ids.remove(req_id)

    def end(self, req_id: str) -> list[int]:
        """A request has come to its end or is aborted; its tokens. Our proposer hears of it with the next step."""
        if req_id in self.input_batch.req_ids:
            self.preempt(req_id)
        self._ended.add(req_id)
        for held in (self.requests, self.num_computed, self.drafts):
            del held[req_id]
        return self.tokens.pop(req_id)

    def step(self) -> None:
        """One step of the engine, prompts in chunks."""
        batch = self.input_batch.req_ids
        entered = [
            SimpleNamespace(
                prompt_token_ids=self.tokens[req_id],
                mm_features=[],
                block_ids=(self._blocks.block_table.np[batch.index(req_id)].tolist(),),
                num_computed_tokens=0,
            )
            for req_id in self._entered
            if req_id in batch
        ]
        self.proposer.begin_step(scheduled(entered, self._ended))
        self._ended, self._entered = set(), []
        self.execute_model_state = None
        if not self.input_batch.req_ids:
            with self.proposer.sampling():
                return
        ids, pairs, slots, sampled_rows, counts = [], [], [], [], {}
        for row, req_id in enumerate(self.input_batch.req_ids):
            tokens, start = self.tokens[req_id], self.num_computed[req_id]
            known = [*tokens, *self.drafts[req_id]]
            positions = range(start, min(len(known), start + PREFILL) if start + 1 < len(tokens) else len(known))
            ids += [known[position] for position in positions]
            pairs += [(known[position - 1] if position else 0, known[position]) for position in positions]
            slots += [int(self._blocks.block_table.np[row, p // BLOCK]) * BLOCK + p % BLOCK for p in positions]
            self.num_computed[req_id] = positions.stop
            counts[req_id] = 0 if positions.stop < len(tokens) else len(self.drafts[req_id])
            sampled_rows += range(len(ids) - 1 - counts[req_id], len(ids))
        hidden_states = torch.tensor(pairs)
        self.input_ids.gpu = torch.tensor(ids, dtype=torch.int32)
        self._blocks.slot_mapping.gpu = torch.tensor(slots)
        logits = _logits(hidden_states[sampled_rows])
        self.execute_model_state = _State(
            scheduler_output=SimpleNamespace(
                total_num_scheduled_tokens=len(ids),
                scheduled_spec_decode_tokens={req_id: self.drafts[req_id] for req_id in counts if self.drafts[req_id]},
                has_structured_output_requests=self.masks,
            ),
            spec_decode_metadata=SimpleNamespace(
                logits_indices=torch.tensor(sampled_rows), num_draft_tokens=list(counts.values())
            ),
            hidden_states=hidden_states,
            logits=logits,
        )
        self.is_plain = False
        with self.proposer.sampling():
            output = self.forward(
                SimpleNamespace(sampler=self._sample_plainly),
                self.execute_model_state.spec_decode_metadata,
                None,
                logits,
                SimpleNamespace(logprob_token_ids=None, thinking_budget_state_holder=None, all_greedy=False),
            )
            sampled = self._rows(counts, output)
            if self.masks:
                logits.zero_()
            self._emit(sampled)
            batch = [self.tokens[req_id] for req_id in self.input_batch.req_ids]
            lengths = np.array([len(tokens) for tokens in batch], np.int32)
            contexts = np.zeros((len(lengths), MAX_LEN), np.int32)
            for row, tokens in enumerate(batch):
                contexts[row, : len(tokens)] = tokens
            drafts = self.proposer.propose(sampled, lengths, contexts)
        told = self.proposer.trimmed(DraftTokenIds(self.input_batch.req_ids, drafts))
        self.drafts |= zip(told.req_ids, told.draft_token_ids, strict=True)

    def _sample_plainly(
        self, logits: torch.Tensor, sampling_metadata: SimpleNamespace, predict_bonus_token: bool
    ) -> torch.Tensor:
        assert predict_bonus_token, "vLLM's thinking budgets would count rows as drafts'"
        self.is_plain = True
        return logits.argmax(-1, keepdim=True)

    def _reject(self, sampler: Any, metadata: SimpleNamespace, draft_probs: None, logits: torch.Tensor, _: Any) -> Any:
        counts = metadata.num_draft_tokens
        cu = torch.tensor(counts).cumsum(0)
        bonus_rows = cu + torch.arange(len(counts))
        is_draft = torch.ones(len(logits), dtype=torch.bool)
        is_draft[bonus_rows] = False
        req_ids = self.input_batch.req_ids
        drafts = [token for row, count in enumerate(counts) for token in self.drafts[req_ids[row]][:count]]
        return self.rejection_sample(
            torch.tensor(drafts, dtype=torch.int32),
            counts,
            max(counts),
            cu.int(),
            None,
            logits[is_draft],
            logits[bonus_rows].argmax(-1, keepdim=True),
            SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={}),
        )

    def _rows(self, counts: dict[str, int], output: torch.Tensor) -> list[list[int]]:
        rows = [[token for token in row if token >= 0] for row in output.tolist()]
        is_done = [self.num_computed[req_id] >= len(self.tokens[req_id]) for req_id in counts]
        return [row if done else [] for row, done in zip(rows, is_done, strict=True)]

    def _emit(self, sampled: list[list[int]]) -> None:
        for req_id, tokens in zip(self.input_batch.req_ids, sampled, strict=True):
            if tokens:
                self.num_accepted += len(tokens) - 1
                self.tokens[req_id] += tokens
                self.num_computed[req_id] = len(self.tokens[req_id]) - 1


def _logits(pairs: torch.Tensor) -> torch.Tensor:
    says = torch.tensor([next_token(*pair) for pair in pairs.tolist()], dtype=torch.int64)
    return 8.0 * torch.nn.functional.one_hot(says, VOCAB).float()


def strict_greedy(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata: Any,
) -> torch.Tensor:
    """vLLM's ``rejection_sample`` for greedy requests, in plain torch."""
    output = torch.full((len(num_draft_tokens), max_spec_len + 1), -1, dtype=torch.int32)
    first = 0
    for request, count in enumerate(num_draft_tokens):
        says = target_logits[first : first + count].argmax(-1).tolist()
        drafts = draft_token_ids[first : first + count].tolist()
        first += count
        agreed = next((i for i in range(count) if says[i] != drafts[i]), count)
        tokens = [*says[: agreed + 1], *([int(bonus_token_ids[request])] if agreed == count else [])]
        output[request, : len(tokens)] = torch.tensor(tokens)
    return output
