"""Loads the prior that a server drafts from, and checks that all tensor-parallel ranks have the same one.

Each rank reads the file of its own node. On the V2 model runner every rank drafts and verifies for itself, so ranks
with different priors would accept different tokens. On V1 the scheduler takes the first rank's drafts, but it shouldn't
depend on the order of the nodes whether a prior is used.
"""

import hashlib
import logging

import numpy as np
from vllm.config import ModelConfig
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting.tensor_file import TensorFileError
from vllm_aasd.engine.model_key import model_key
from vllm_aasd.engine.ranks import gathered
from vllm_aasd.kernels.draft import Prior

logger = logging.getLogger("vllm.aasd")


def load_prior(model: ModelConfig) -> Prior | None:
    """The prior of the served model if all ranks have the same, empty if none has one. Every rank calls this."""
    return agreed_prior(own_prior(model), get_tp_group())


def own_prior(model: ModelConfig) -> Prior | None:
    """The prior of the served model that this rank finds, empty if there is none; None if it can't be used.

    Says in the log which it is.
    """
    key = model_key(model.model, model.revision)
    path = prior_file.cache_path(key) if key else None
    try:
        if key is None or path is None:
            raise FileNotFoundError
        prior = prior_file.load(path, key, model.get_vocab_size())
    except FileNotFoundError:
        logger.info("aasd: no prior for %s yet", model.model)
        return prior_file.empty(model.get_vocab_size())
    except TensorFileError as error:
        logger.warning("aasd: serving without a prior: %s", error)
        return None
    num_known = np.count_nonzero(prior.ids[:, 0] >= 0)
    logger.info("aasd: prior with what follows %d of %d tokens, from %s", num_known, len(prior.ids), path)
    return prior


def keep_prior(model: ModelConfig, prior: Prior) -> None:
    """Write the prior of the served model where its next start finds it; a failure is logged."""
    key = model_key(model.model, model.revision)
    path = prior_file.cache_path(key) if key else None
    try:
        if key is None or path is None:
            raise FileNotFoundError("there is no folder for it")
        prior_file.save(path, prior, key)
    except OSError as error:
        logger.warning("aasd: the prior isn't kept, and the next start makes it again: %s", error)


def agreed_prior(prior: Prior | None, ranks: GroupCoordinator) -> Prior | None:
    """The prior if every rank has the same; otherwise none, with a warning. Every rank calls this.

    Args:
        prior: what this rank has loaded; None for none.
        ranks: the tensor-parallel group.
    """
    if ranks.world_size == 1:
        return prior
    prints = gathered(_fingerprint(prior), ranks)
    if len(set(prints)) == 1:
        return prior
    if ranks.rank_in_group == 0:
        logger.warning(
            "aasd: serving without a prior: %d of %d tensor-parallel ranks have one, of %d kinds; put the same file on "
            "every node",
            len(prints) - prints.count(None),
            len(prints),
            len(set(prints) - {None}),
        )
    return None


def _fingerprint(prior: Prior | None) -> str | None:
    if prior is None:
        return None
    digest = hashlib.sha256(repr([array.shape for array in prior]).encode())
    for array in prior:
        digest.update(array.tobytes())
    return digest.hexdigest()
