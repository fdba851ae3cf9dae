"""Predictions at prompt positions over two tensor ranks, which are threads here, against whole rows of logits."""

import logging
import threading
import types

import pytest
import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from aasd_testing.alignment_rows import read
from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.engine.v2 import prompt_logits
from vllm_aasd.engine.v2.prompt_logits import CHUNK, PromptLogits

VOCAB, PART, HIDDEN, TOP_K, RANKS = 50, 32, 8, 4, 2
"""The last rank's part of the vocabulary has 18 tokens and padding."""


class Group:
    """vLLM's tensor-parallel group, of threads."""

    world_size = RANKS

    def __init__(self):
        self._barrier = threading.Barrier(RANKS, timeout=60)
        self._shared = [None] * RANKS
        self.gathered = []

    def all_gather(self, tensor, dim):
        assert tensor.is_floating_point(), "all that vLLM's shared memory between CPU ranks can move"
        self._shared[rank()] = tensor
        self._barrier.wait()
        together = torch.cat(self._shared, dim)
        self._barrier.wait()
        self.gathered.append(tuple(tensor.shape))
        return together


def rank():
    return int(threading.current_thread().name)


class Head(VocabParallelEmbedding):
    """A rank's rows of the lm_head, and rows of padding that would win if they were looked at."""

    def __init__(self, weight, first):
        torch.nn.Module.__init__(self)
        part = weight[first : first + PART]
        self.rows = torch.cat([part, torch.full((PART - len(part), HIDDEN), 9.0)])
        self.num_added_embeddings, self.org_vocab_size, self.num_embeddings_per_partition = 0, VOCAB, PART
        self.shard_indices = types.SimpleNamespace(num_org_elements=len(part), org_vocab_start_index=first)


class Layer(LogitsProcessor):
    def __init__(self, group):
        torch.nn.Module.__init__(self)
        self._group = group

    def forward(self, lm_head, hidden_states, embedding_bias=None, skip_gather=False):
        logits = hidden_states @ lm_head.rows.T
        return logits if skip_gather else self._group.all_gather(logits, -1)[:, :VOCAB]


class Model(torch.nn.Module):
    """Scales hidden states before the logits layer, as some models do."""

    def __init__(self, head, group):
        super().__init__()
        self.layer, self.head = Layer(group), head

    def compute_logits(self, hidden_states):
        return self.layer(self.head, 0.5 * hidden_states)


class Adding(Model):
    """Has columns of its own, so that a rank's part of the vocabulary isn't what it returns."""

    def compute_logits(self, hidden_states):
        logits = super().compute_logits(hidden_states)
        return logits if logits.shape[1] == VOCAB else torch.cat([logits, logits[:, :1]], dim=1)


class TwoLayers(Model):
    def __init__(self, head, group):
        super().__init__(head, group)
        self.other = Layer(group)


@pytest.fixture
def store_on_all_ranks(monkeypatch):
    """Run `PromptLogits.store` on every rank; the stores, the shapes gathered, and what whole rows would store."""

    def run(model_class, num_tokens):
        random = torch.Generator().manual_seed(3)
        weight = torch.randn(VOCAB, HIDDEN, generator=random)
        hidden_states = torch.randn(num_tokens, HIDDEN, generator=random)
        ids = torch.arange(num_tokens, dtype=torch.int32)
        slots = torch.arange(num_tokens).flip(0)
        slots[1] = -1
        group = Group()
        monkeypatch.setattr(prompt_logits, "get_tp_group", lambda: group)
        stores = [AlignmentStore(num_tokens, 1, TOP_K, "cpu") for _ in range(RANKS + 1)]

        def serve():
            model = model_class(Head(weight, rank() * PART), group)
            PromptLogits(model, TOP_K).store(hidden_states, ids, slots, stores[rank()])

        threads = [threading.Thread(target=serve, name=str(number)) for number in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stores[-1].write(0.5 * hidden_states @ weight.T, ids, slots)
        return stores, set(group.gathered)

    return run


def assert_equal(stores, num_tokens):
    *ranks, wanted = stores
    at = torch.arange(num_tokens, dtype=torch.int32).flip(0), torch.arange(num_tokens)
    for store in ranks:
        for got, want in zip(read(store, *at), read(wanted, *at), strict=True):
            torch.testing.assert_close(got, want)
    assert read(wanted, *at)[2].sum() == num_tokens - 1


def test_only_partial_entries_are_gathered(store_on_all_ranks):
    num_tokens = CHUNK + 3
    stores, gathered = store_on_all_ranks(Model, num_tokens)
    assert_equal(stores, num_tokens)
    assert gathered == {(CHUNK, 1 + 2 * TOP_K), (3, 1 + 2 * TOP_K)}


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (Adding, "its compute_logits doesn't leave a part of the vocabulary as it is"),
        (TwoLayers, "it has 2 logits layers"),
    ],
)
def test_other_models_gather_whole_rows_and_say_so(store_on_all_ranks, caplog, model_class, reason):
    num_tokens = CHUNK + 3
    with caplog.at_level(logging.INFO, "vllm.aasd"):
        stores, gathered = store_on_all_ranks(model_class, num_tokens)
    assert_equal(stores, num_tokens)
    assert gathered == {(CHUNK, PART), (3, PART)}
    assert sum(reason in record.message for record in caplog.records) == RANKS, "once on each rank"
