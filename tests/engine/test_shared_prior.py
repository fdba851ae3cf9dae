"""Tensor-parallel ranks, here threads, that have read different files: all go on alike."""

import logging
import threading
import types

import numpy as np
import pytest
import torch

from vllm_aasd.engine import shared_prior
from vllm_aasd.kernels.draft import Prior

ONE = Prior(
    np.array([[1, 2], [0, -1]], np.int32),
    np.array([[0.5, 0.25], [0.5, 0]], np.float32),
)
SAME = Prior(*(array.copy() for array in ONE))
OTHER_IDS = ONE._replace(ids=np.array([[1, 2], [1, -1]], np.int32))
OTHER_PROBS = ONE._replace(probs=np.array([[0.5, 0.25], [0.25, 0]], np.float32))
OTHER_SHAPE = ONE._replace(ids=ONE.ids.reshape(4, 1), probs=ONE.probs.reshape(4, 1))


@pytest.fixture
def on_all_ranks(monkeypatch):
    """Ask every rank, of which each has loaded something, what it goes on with."""

    def ask(priors):
        ours, barrier, answers = [None] * len(priors), threading.Barrier(len(priors), timeout=10), [None] * len(priors)

        def all_gather_object(gathered, mine, group):
            ours[group] = mine
            barrier.wait()
            gathered[:] = ours

        monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)

        def serve(rank):
            # What stands for the group of processes is the rank, as the fake collective needs it.
            ranks = types.SimpleNamespace(world_size=len(priors), rank_in_group=rank, cpu_group=rank)
            answers[rank] = shared_prior.agreed_prior(priors[rank], ranks)

        threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(len(priors))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    return ask


@pytest.mark.parametrize("prior", [ONE, None], ids=["a prior", "none"])
def test_a_single_rank_asks_nobody(prior):
    ranks = types.SimpleNamespace(world_size=1)
    assert shared_prior.agreed_prior(prior, ranks) is prior


@pytest.mark.parametrize("priors", [(ONE, SAME, ONE), (None, None)], ids=["the same", "none"])
def test_ranks_that_agree_go_on_as_they_were(on_all_ranks, caplog, priors):
    answers = on_all_ranks(priors)
    assert all(answer is prior for answer, prior in zip(answers, priors, strict=True))
    assert not caplog.records


@pytest.mark.parametrize(
    ("priors", "held", "kinds"),
    [
        ((None, ONE, SAME), 2, 1),
        ((ONE, SAME, None), 2, 1),
        ((ONE, OTHER_IDS), 2, 2),
        ((OTHER_PROBS, ONE), 2, 2),
        ((ONE, OTHER_SHAPE), 2, 2),
    ],
    ids=["not the first", "not the last", "other tokens", "other probabilities", "other shape"],
)
def test_ranks_that_differ_go_on_without_and_one_says_so(on_all_ranks, caplog, priors, held, kinds):
    with caplog.at_level(logging.INFO, "vllm.aasd"):
        assert on_all_ranks(priors) == [None] * len(priors)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{held} of {len(priors)} tensor-parallel ranks have one, of {kinds} kinds" in caplog.text


class Model:
    revision = None

    def __init__(self, model):
        self.model = model

    def get_vocab_size(self):
        return 7


def test_a_model_without_a_prior_gets_an_empty_one_that_is_kept_once_it_was_made(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    model = Model(str(tmp_path / "model"))
    with caplog.at_level("INFO", "vllm.aasd"):
        made = shared_prior.own_prior(model)
    assert made.ids.shape == (7, 7) and (made.ids == -1).all() and "no prior for" in caplog.text
    made.ids[3] = 5
    shared_prior.keep_prior(model, made)
    np.testing.assert_array_equal(shared_prior.own_prior(model).ids, made.ids)
    monkeypatch.setenv("AASD_CACHE_ROOT", "/proc/nothing")
    shared_prior.keep_prior(model, made)
    assert "the prior isn't kept" in caplog.text


def test_a_damaged_prior_is_ignored_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AASD_CACHE_ROOT", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    key = shared_prior.model_key(str(tmp_path / "model"))
    (tmp_path / f"prior-{key}.safetensors").write_bytes(b"nonsense")
    with caplog.at_level("INFO", "vllm.aasd"):
        assert shared_prior.own_prior(Model(str(tmp_path / "model"))) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "serving without a prior" in caplog.text and "can't be read" in caplog.text
