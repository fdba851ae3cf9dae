"""A fake of the V2 model runner's device state, to drive our speculator and verifier in any order of calls.

The target is a rule: what follows a token is fixed by the two last tokens. Slots, KV blocks and steps are the
runner's; its forward pass, sampler and bookkeeping are written out here in plain torch.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import DraftTokenIds

from aasd_testing.constants import with_constants
from vllm_aasd.engine.unsupported import SCHEDULER
from vllm_aasd.engine.v2 import prompt_logits
from vllm_aasd.engine.v2 import rejection_sampler as v2_verifier
from vllm_aasd.engine.v2 import speculator as v2

VOCAB, BLOCK, MAX_LEN, WIDTH = 32, 4, 64, 4
PROMPTS = [[1, 2, 4, 1, 2], [3, 3, 5, 6, 0, 2, 1, 3, 3], [6, 5], [0, 1, 1, 2, 3, 5], [4, 4, 4, 4, 4, 4, 4]]
MAX_TOKENS = 24


def scheduled(new_requests: Iterable[Any] = (), finished: Iterable[str] = ()) -> SchedulerOutput:
    """A step of vLLM's scheduler, of which only this is told."""
    output = SchedulerOutput.make_empty()
    return dataclasses.replace(output, scheduled_new_reqs=list(new_requests), finished_req_ids=set(finished))


def next_token(before: Any, last: Any) -> Any:
    """What the target says: a walk that keeps coming back, so that drafts are often right."""
    return (2 * before + last + 1) % 3


class _Head(LogitsProcessor):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        says = next_token(pairs[:, 0], pairs[:, 1])
        return 8.0 * (says[:, None] == torch.arange(VOCAB)).float()


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _Head()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head(hidden_states)


class FakeRunner:
    """Serves requests; `fillers` schedules every draft column, as asynchronous scheduling does, and
    `allocated_len` is the model's length before vLLM lowered it to `MAX_LEN`.

    Attributes:
        width: draft tokens asked for in the next steps; None for all.
        watch: a context that our part of a step runs in.
    """

    def __init__(
        self,
        max_num_reqs: int = 3,
        fillers: bool = True,
        num_ranks: int = 1,
        allocated_len: int = MAX_LEN,
        **settings: Any,
    ) -> None:
        self.fillers = fillers
        self.width: int | None = None
        self.watch: Callable = contextlib.nullcontext
        self.tokens = torch.zeros(max_num_reqs, allocated_len, dtype=torch.int32)
        self.total_len = torch.zeros(max_num_reqs, dtype=torch.int32)
        self.max_seq_len = np.zeros(max_num_reqs, np.int32)
        self.drafts = torch.zeros(max_num_reqs, WIDTH, dtype=torch.int64)
        self.prefill_len = np.zeros(max_num_reqs, np.int32)
        self.num_computed = np.zeros(max_num_reqs, np.int32)
        self.blocks = torch.arange(max_num_reqs * MAX_LEN // BLOCK, dtype=torch.int32).view(max_num_reqs, -1)
        self.num_scheduled = self.num_added = 0
        self.model = _Model()
        self.entered: list[SimpleNamespace] = []
        self.temperature = np.zeros(max_num_reqs, np.float32)
        self.sampler = SimpleNamespace(
            logits_processors=[],
            sampling_states=SimpleNamespace(temperature=SimpleNamespace(np=self.temperature)),
        )
        self.block_tables = SimpleNamespace(block_sizes=[BLOCK], block_tables=[SimpleNamespace(gpu=self.blocks)])
        self.execute_model_state = None
        self.counts = [0] * max_num_reqs
        self.req_ids = {slot: f"whoever is in {slot}" for slot in range(max_num_reqs)}
        self.accepted: list[int] = []
        req_states = SimpleNamespace(
            max_num_reqs=max_num_reqs,
            max_model_len=MAX_LEN,
            max_seq_len=self.max_seq_len,
            index_to_req_id=self.req_ids,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            total_len=SimpleNamespace(gpu=self.total_len),
        )
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(
                aasd_corpora_file="",
                aasd=with_constants(settings, {"prior": "off", "memory": 1}),
                num_speculative_tokens=WIDTH,
            ),
            model_config=SimpleNamespace(
                get_vocab_size=lambda: VOCAB,
                get_hidden_size=lambda: 2,
                dtype=torch.bfloat16,
                max_model_len=MAX_LEN,
            ),
            scheduler_config=SimpleNamespace(async_scheduling=fillers, scheduler_cls=SCHEDULER),
            lora_config=None,
            kv_transfer_config=None,
            parallel_config=SimpleNamespace(tensor_parallel_size=num_ranks),
        )
        self.speculator = v2.AASDSpeculator(config, torch.device("cpu"), req_states)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
        self.group = SimpleNamespace(world_size=1)
        with patch.object(prompt_logits, "get_tp_group", lambda: self.group):
            self.speculator.attach(self)
        with patch.object(v2, "MIN_SURVIVAL", settings.get("min_survival", v2.MIN_SURVIVAL)):
            self.speculator.bind(self, SimpleNamespace(num_blocks=self.blocks.numel(), kv_cache_groups=[group]))
        self.rejection_sample = v2_verifier.patch_rejection_sample(vllms_own)

    def get_model(self) -> torch.nn.Module:
        """As the runner's."""
        return self.model

    def add(self, slot: int, prompt: list[int], max_tokens: int, params: Any, req_id: str | None = None) -> None:
        """A request enters a slot, whoever was there before; without an id it is one that was never seen."""
        self.num_added += 1
        self.req_ids[slot] = req_id or f"request {self.num_added}"
        self.max_seq_len[slot] = len(prompt) + max_tokens
        self.prefill_len[slot], self.num_computed[slot] = len(prompt), 0
        self.tokens[slot, : len(prompt)] = torch.tensor(prompt)
        self.total_len[slot] = len(prompt)
        self.temperature[slot] = params.temperature
        self.drafts[slot] = 0
        self.counts[slot] = 0
        blocks = self.blocks[slot].tolist()
        told = SimpleNamespace(prompt_token_ids=prompt, mm_features=[], block_ids=(blocks,), num_computed_tokens=0)
        self.entered.append(told)
        for processor in self.sampler.logits_processors:
            processor.add_request(slot, params)

    def step(self, slots: list[int], chunk: int = MAX_LEN) -> dict[int, list[int]]:
        """One step of the runner; what each request of it emitted. Prompts are read `chunk` tokens at a time."""
        self.speculator.begin_step(scheduled(self.entered))
        self.entered = []
        for processor in self.sampler.logits_processors:
            processor.apply_staged_writes()
        ids, positions, starts, sampled_rows, local, expanded, cu, prefilling = [], [], [0], [], [], [], [0], []
        for slot in slots:
            total, computed = int(self.total_len[slot]), int(self.num_computed[slot])
            is_prefill = computed < self.prefill_len[slot]
            prefilling.append(is_prefill)
            if is_prefill:
                row_ids = self.tokens[slot, computed : computed + chunk].tolist()[: total - computed]
                num_logits = 1
            else:
                row_ids = [int(self.tokens[slot, total - 1]), *self.drafts[slot, : self.counts[slot]].tolist()]
                num_logits = len(row_ids)
            ids += row_ids
            positions += range(computed, computed + len(row_ids))
            starts.append(len(ids))
            sampled_rows += range(len(ids) - num_logits, len(ids))
            local += range(num_logits)
            expanded += [slot] * num_logits
            cu.append(len(sampled_rows))
        self.num_scheduled += len(ids)
        assert all(0 <= token < VOCAB for token in ids), "the model can't be fed anything else"
        batch = SimpleNamespace(
            num_reqs=len(slots),
            idx_mapping=torch.tensor(slots),
            idx_mapping_np=np.array(slots),
            input_ids=torch.tensor(ids, dtype=torch.int32),
            logits_indices=torch.tensor(sampled_rows),
            query_start_loc_np=np.array(starts),
            is_prefilling_np=np.array(prefilling),
        )
        rows_of = np.repeat(slots, np.diff(starts))
        kv_slots = self.blocks[rows_of, np.array(positions) // BLOCK].long() * BLOCK + torch.tensor(positions) % BLOCK
        hidden_states = self._pairs(rows_of, positions, ids)
        state = SimpleNamespace(input_batch=batch, slot_mappings_by_layer={"layer": kv_slots})
        self.execute_model_state = state
        with self.speculator.sampling():
            self.execute_model_state = None
            logits = self.model.compute_logits(hidden_states[sampled_rows])
            arguments = (
                logits,
                None,
                batch.input_ids[sampled_rows],
                torch.tensor(cu, dtype=torch.int32),
                torch.tensor(positions)[sampled_rows],
                batch.idx_mapping,
                torch.tensor(expanded),
                torch.tensor(local, dtype=torch.int32),
                torch.from_numpy(self.temperature),
                torch.zeros(len(self.temperature), dtype=torch.int64),
                WIDTH,
                None,
            )
            with self.watch():
                sampled, num_sampled = self.rejection_sample(*arguments, use_fp64=False)
            emitted = {}
            for row, slot in enumerate(slots):
                self.num_computed[slot] += starts[row + 1] - starts[row]
                if self.num_computed[slot] < self.prefill_len[slot]:
                    num_sampled[row] = 0
                    continue
                total, count = int(self.total_len[slot]), int(num_sampled[row])
                emitted[slot] = sampled[row, :count].tolist()
                self.accepted.append(count - 1)
                self.tokens[slot, total : total + count] = sampled[row, :count]
                self.total_len[slot] += count
                self.num_computed[slot] = total + count - 1
            given = batch, None, state.slot_mappings_by_layer, hidden_states, None, num_sampled, *[None] * 5
            with self.watch():
                drafts = self.speculator.propose(*given, num_speculative_tokens=self.width)
        width = WIDTH if self.width is None else self.width
        drafts[:, width:] = -1
        self.drafts[batch.idx_mapping] = drafts
        told = self.speculator.trimmed(DraftTokenIds([str(slot) for slot in slots], [[-1] * width for _ in slots]))
        for slot, ids in zip(slots, told.draft_token_ids, strict=True):
            # vLLM schedules nothing beyond what the request may emit, nor for an unfinished prompt.
            left = int(self.max_seq_len[slot] - self.total_len[slot]) - 1
            self.counts[slot] = max(0, min(len(ids), left)) if slot in emitted else 0
        return emitted

    def _pairs(self, rows_of: np.ndarray, positions: list[int], ids: list[int]) -> torch.Tensor:
        """The model's last hidden states: at each position, the token there and the one before it."""
        pairs = []
        for row, (slot, position) in enumerate(zip(rows_of, positions, strict=True)):
            is_first = row == 0 or rows_of[row - 1] != slot
            before = int(self.tokens[slot, position - 1]) if is_first and position else ids[row - 1]
            pairs.append((0 if position == 0 else before, ids[row]))
        return torch.tensor(pairs)


def target_alone(prompt: list[int], max_tokens: int = MAX_TOKENS) -> list[int]:
    """What the target says after a prompt, without speculation."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens[-2] if len(tokens) > 1 else 0, tokens[-1]))
    return tokens[len(prompt) :]


def serve(
    runner: FakeRunner, prompts: list[list[int]], chunk: int = MAX_LEN, abort_after: int | None = None
) -> list[list[int]]:
    """All prompts through as few slots as there are, each freed slot taken at once by the next request."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    waiting, running, done = list(enumerate(prompts)), {}, {}
    steps = 0
    while waiting or running:
        for slot in range(len(runner.counts)):
            if slot not in running and waiting:
                running[slot], prompt = waiting.pop(0)
                done[running[slot]] = []
                runner.add(slot, prompt, MAX_TOKENS, params)
        # The batch's order isn't the slots'.
        for slot, tokens in runner.step(sorted(running, reverse=True), chunk).items():
            done[running[slot]] += tokens
        steps += 1
        for slot, number in list(running.items()):
            if len(done[number]) >= MAX_TOKENS or (number == 0 and steps == abort_after):
                del running[slot]
    return [done[number] for number in range(len(prompts))]


def vllms_own(
    target_logits: Any,
    draft_logits: Any,
    draft_sampled: Any,
    cu_num_logits: Any,
    pos: Any,
    idx_mapping: Any,
    expanded_idx_mapping: Any,
    expanded_local_pos: Any,
    temperature: Any,
    seed: Any,
    num_speculative_steps: int,
    synthetic_conditional_rates: Any = None,
    use_fp64: bool = False,
) -> Any:
    """In the place of vLLM's own rejection sampler, which isn't asked."""
    raise AssertionError("vLLM's own sampler isn't asked")
