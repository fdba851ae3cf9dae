"""Hard inputs for the other ops: logits rows, drafts of a step, contexts with predictions, texts of requests."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_aasd.gpu_check.verify_inputs import INF, NAN
from vllm_aasd.kernels import count
from vllm_aasd.kernels.draft import MixtureWeights
from vllm_aasd.kernels.draft.batch import MAX_EXCLUDED, DraftBatch, draft_workspace
from vllm_aasd.kernels.text import NUM_CELLS, PAGE_SIZE, new_index
from vllm_aasd.kernels.text.batch import (
    ANSWERS_COLUMN,
    MAX_PIECES,
    NUM_SOURCES,
    PREDICTION_COLUMN,
    TICKET,
    TextTensors,
    new_texts,
)
from vllm_aasd.kernels.text.reference import append
from vllm_aasd.kernels.verify import VerifyOutput

COUNT_WIDTH = 4
POISON_ID, POISON_COUNT = -77, -99
# Like those that are shipped, whose module needs numba.
WEIGHTS = MixtureWeights(
    theta=np.array([2, 1.5, 1, 1, 1, 1], np.float32),
    alignment=np.array([0.7, 0.5, 0.4, 0.3, 0.25, 0.25], np.float32),
    no_alignment_discount=np.float32(1.5),
)


def random_rows(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Logits of every odd kind, slices of wider rows."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, vocab_size + 9, generator=g) * 3).to(dtype)[:, 4 : 4 + vocab_size]
    for row in range(num_rows):
        kind = row % 9
        if kind == 1:
            logits[row, torch.randperm(vocab_size, generator=g)[: vocab_size // 2]] = -INF
        elif kind == 2:
            hot = int(torch.randint(0, vocab_size, (), generator=g))
            logits[row] = -INF
            logits[row, hot] = -5.0
        elif kind == 3:
            logits[row, vocab_size // 2] = NAN
        elif kind == 4:
            logits[row] = -INF
        elif kind == 5:
            logits[row] = torch.randint(0, 3, (vocab_size,), generator=g).to(dtype)
        elif kind == 6:
            logits[row] = logits[row].sort().values
    return logits


def rows_to_align(
    num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of every odd kind, with tokens and slots; two rows are padding."""
    logits = random_rows(num_rows, vocab_size, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(2 * num_rows, generator=g)[:num_rows]
    slots[[0, num_rows - 2]] = -1
    return logits, torch.randint(0, vocab_size, (num_rows,), generator=g).int(), slots


def count_step(seed: int, num_reqs: int, first_draft: int, id_dtype: torch.dtype = torch.int32) -> tuple[Any, ...]:
    """A step of random drafts, some without any, some followed by fillers, with promises by slot."""
    g = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    columns = integers(0, COUNT_WIDTH + 1, num_reqs)
    real = (columns - integers(0, 3, num_reqs)).clamp(min=0)
    accepted = torch.stack([integers(0, int(n) + 1, 1)[0] for n in real]) if num_reqs else columns
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), (columns + first_draft).cumsum(0)])
    ids = torch.full((int(cu[-1]),), 7, dtype=id_dtype)
    relaxed = torch.rand(len(ids), generator=g) < 0.5
    for start, first, width in zip(cu.tolist(), real.tolist(), columns.tolist(), strict=False):
        ids[start + first_draft + first : start + first_draft + width] = -1
    survival = torch.rand(num_reqs + 3, COUNT_WIDTH, generator=g)
    # Bounds of the tenths, and tokens of which nothing was promised.
    survival[survival < 0.1] = 0.5
    survival[survival > 0.95] = 1.0
    survival[(survival > 0.6) & (survival < 0.7)] = count.UNPROMISED
    slots = torch.randperm(num_reqs + 3, generator=g)[:num_reqs]
    regret = torch.where(relaxed, torch.rand(len(ids), generator=g), 0.0)
    events = torch.rand(2, num_reqs, generator=g) < 0.3
    output = VerifyOutput(None, (accepted + 1).to(torch.int32), relaxed, regret, *events)
    return ids, cu.to(id_dtype), first_draft, slots, survival, output


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a runner holds for some requests: more slots than rows, in another order."""

    all_token_ids: torch.Tensor
    total_len: torch.Tensor
    idx_mapping: torch.Tensor
    table: torch.Tensor
    block_tables: torch.Tensor
    block_size: int
    theta: torch.Tensor
    alignment: torch.Tensor
    no_alignment_discount: torch.Tensor
    prior_ids: torch.Tensor
    prior_probs: torch.Tensor
    vocab_size: int
    max_matches: int
    min_survival: float
    texts: TextTensors
    max_len: torch.Tensor
    num_sampled: torch.Tensor
    excluded: torch.Tensor
    num_spec_tokens: int

    def row(self, row: int) -> "Batch":
        """The batch that consists of one row."""
        rows = {"idx_mapping": self.idx_mapping[row : row + 1], "num_sampled": self.num_sampled[row : row + 1]}
        return dataclasses.replace(self, **rows)

    def limit(self, *limits: int) -> None:
        """Let no row draft more than these."""
        self.max_len[self.idx_mapping] = self.total_len[self.idx_mapping] + 1 + torch.tensor(limits, dtype=torch.int32)

    def workspace(self) -> torch.Tensor:
        """A workspace full of nonsense."""
        top_k = (self.table.shape[1] - 1) // 2
        sizes = self.all_token_ids.shape[1], len(self.theta), self.max_matches, top_k, self.prior_ids.shape[1]
        workspace = draft_workspace(len(self.idx_mapping) + 1, *sizes, "cpu")
        workspace[:, 1:] = 2**31 - 1
        return workspace

    def arguments(self, workspace: torch.Tensor | None = None, lookups: torch.Tensor | None = None) -> DraftBatch:
        """The op's arguments, with poisoned outputs; what is looked up is added to `lookups`."""
        num_slots, width = len(self.total_len), self.num_spec_tokens
        inputs: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}
        return DraftBatch(
            **inputs,
            longest=width,
            workspace=self.workspace() if workspace is None else workspace,
            draft_token_ids=torch.full((len(self.idx_mapping), width), POISON_ID, dtype=torch.int64),
            num_drafts=torch.full((num_slots,), POISON_COUNT, dtype=torch.int32),
            survival=torch.full((num_slots, width), torch.nan),
            lookups=torch.zeros(3, dtype=torch.int64) if lookups is None else lookups,
        )

    def drafts(
        self,
        op: Callable[[DraftBatch], None],
        workspace: torch.Tensor | None = None,
        lookups: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The op's outputs by row: token ids, their numbers, survival; no other slot's may be written."""
        arguments = self.arguments(workspace, lookups)
        op(arguments)
        slots, num_drafts, survival = self.idx_mapping.long(), arguments.num_drafts, arguments.survival
        others = torch.ones(len(num_drafts), dtype=torch.bool).index_fill(0, slots[slots >= 0], False)
        assert (num_drafts[others] == POISON_COUNT).all() and survival[others].isnan().all()
        is_row = slots >= 0
        drafted = num_drafts[slots] * is_row, torch.where(is_row[:, None], survival[slots], 0.0)
        return arguments.draft_token_ids, *drafted


def batch_of(
    contexts: Sequence[Any],
    vocab_size: int,
    num_spec_tokens: int = 8,
    top_k: int = 0,
    prior_top_k: int = 0,
    max_matches: int = 4,
    min_survival: float = 0.0,
    stale_share: float = 0.2,
    block_size: int = 4,
    seed: int = 0,
    weights: MixtureWeights = WEIGHTS,
) -> Batch:
    """A batch for these contexts, with random predictions and prior; the slots between hold other contexts."""
    rng = np.random.default_rng(seed)
    num_reqs = len(contexts)
    max_num_reqs, max_model_len = num_reqs + 3, -(-(max(map(len, contexts)) + 5) // 16) * 16
    all_token_ids = rng.integers(0, vocab_size, (max_num_reqs, max_model_len)).astype(np.int32)
    total_len = np.full(max_num_reqs, max_model_len, np.int32)
    idx_mapping = rng.permutation(max_num_reqs)[:num_reqs]
    for slot, context in zip(idx_mapping, contexts, strict=True):
        all_token_ids[slot, : len(context)] = context
        total_len[slot] = len(context)
    max_blocks = -(-max_model_len // block_size)
    block_tables = rng.permutation(max_num_reqs * max_blocks).reshape(max_num_reqs, max_blocks)
    table = np.full((max_num_reqs * max_blocks * block_size if top_k else 0, 1 + 2 * top_k), -1, np.int32)
    if top_k:
        positions = np.arange(max_model_len)
        slots = block_tables[:, positions // block_size] * block_size + positions % block_size
        table[slots, 0] = all_token_ids + (rng.random(all_token_ids.shape) < stale_share)
        table[:, 1 : 1 + top_k] = rng.integers(-1, vocab_size + 1, (len(table), top_k))
        probs = rng.dirichlet(np.ones(top_k + 1), len(table))[:, :top_k].astype(np.float32)
        table[:, 1 + top_k :] = probs.view(np.int32)
    prior_ids = rng.integers(-1, vocab_size, (vocab_size if prior_top_k else 0, prior_top_k)).astype(np.int32)
    return Batch(
        torch.from_numpy(all_token_ids),
        torch.from_numpy(total_len),
        torch.from_numpy(idx_mapping),
        torch.from_numpy(table),
        torch.from_numpy(block_tables.astype(np.int32)),
        block_size,
        torch.from_numpy(weights.theta),
        torch.from_numpy(weights.alignment),
        torch.tensor([weights.no_alignment_discount]),
        torch.from_numpy(prior_ids),
        torch.from_numpy(rng.random(prior_ids.shape, np.float32) / max(prior_top_k, 1)),
        vocab_size,
        max_matches,
        min_survival,
        texts_of(max_num_reqs, num_spec_tokens, 0),
        torch.full((max_num_reqs,), 1 << 20, dtype=torch.int32),
        torch.ones(num_reqs, dtype=torch.int32),
        torch.full((MAX_EXCLUDED,), -1, dtype=torch.int32),
        num_spec_tokens,
    )


def random_contexts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    """Contexts of these lengths, of evenly drawn tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


def texts_of(
    max_num_reqs: int, max_draft_tokens: int, num_pages: int, corpora: Sequence[Sequence[int]] = ()
) -> TextTensors:
    """Text of this many pages, and corpora, whose namespaces are their numbers; nothing is known of any slot."""
    index = new_index(sum(-(-len(tokens) // PAGE_SIZE) for tokens in corpora))
    for namespace, tokens in enumerate(corpora):
        append(index, namespace, -1, 0, np.array(tokens, np.int32), 0, len(tokens))
    prior = np.full((NUM_CELLS, 2), (0.5, 8), np.float32)
    return new_texts(max_num_reqs, max_draft_tokens, num_pages, index, prior, "cpu")


class TextStep(NamedTuple):
    """What a step changes, and its arguments of `learn_and_append` and `append_predictions`."""

    slots: torch.Tensor
    total_len: torch.Tensor
    idx_mapping: torch.Tensor
    num_sampled: torch.Tensor
    piece_ids: torch.Tensor
    pieces: torch.Tensor


def text_episode(seed: int, num_reqs: int, num_steps: int, num_pages: int = 19) -> tuple[DraftBatch, list[TextStep]]:
    """Steps of requests that share text, come with predictions, and are followed by others; what they draft from."""
    rng = np.random.default_rng(seed)
    motifs = rng.integers(0, 90, (4, 80))
    contexts = [np.concatenate(motifs[rng.integers(0, 4, 6)])[: 300 + num_steps * 9] for _ in range(num_reqs)]
    base = batch_of(contexts, 100, num_spec_tokens=4, prior_top_k=2, max_matches=8, min_survival=0.05, seed=seed)
    max_num_reqs = len(base.total_len)
    base = dataclasses.replace(base, texts=texts_of(max_num_reqs, 4, num_pages, motifs[:3].tolist()))
    total_len = torch.zeros_like(base.total_len)
    slots = torch.full((max_num_reqs, NUM_SOURCES + 1), -1, dtype=torch.int64)
    steps, mapping = [], base.idx_mapping
    for number in range(num_steps):
        piece_ids, pieces = torch.zeros((MAX_PIECES, 64), dtype=torch.int32), torch.full((MAX_PIECES, 3), -1)
        for row, slot in enumerate(mapping.tolist()):
            if number == 0 or rng.random() < 0.1:
                # Another request takes the slot.
                ticket = 1 + number * max_num_reqs + slot
                slots[slot, :ANSWERS_COLUMN] = torch.from_numpy(rng.permutation([-1, -1, 0, 1, 2])[:ANSWERS_COLUMN])
                slots[slot, ANSWERS_COLUMN] = int(rng.choice([-1, 0, 7]))
                slots[slot, PREDICTION_COLUMN], slots[slot, TICKET] = -1 - ticket, ticket
                total_len[slot] = int(rng.integers(1, 60))
                if row < MAX_PIECES:
                    piece_ids[row, :40] = base.all_token_ids[slot, 20:60]
                    pieces[row] = torch.tensor([slot, 0, 40])
            total_len[slot] = min(int(total_len[slot]) + int(rng.integers(1, 6)), base.all_token_ids.shape[1])
        order = torch.from_numpy(rng.permutation(len(mapping)))
        num_sampled = torch.from_numpy((rng.random(len(mapping)) < 0.9).astype(np.int32))
        steps.append(TextStep(slots.clone(), total_len.clone(), mapping[order], num_sampled, piece_ids, pieces))
    return base.arguments(), steps
