"""What tensor-parallel ranks read from files of their own node, and must all hold alike.

On the V2 model runner every rank drafts for itself and verifies its own drafts: ranks that draft by different priors
would accept different tokens, and run the target on them. On V1 drafts go through the scheduler, which takes the first
rank's, so that a differing prior, memory or step-time curve of another rank has no effect; but whether the prior is in use
should not depend on which node happens to be first. The memory is V1's alone, where it follows the first rank; the
settings come to all ranks from one place.
"""

import hashlib
import logging

import torch.distributed
from vllm.config import ModelConfig
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_aasd.engine import startup
from vllm_aasd.kernels.draft import Prior

logger = logging.getLogger("vllm.aasd")


def load_prior(model: ModelConfig) -> Prior | None:
    """The prior of the served model, if all ranks have it; to be called on every rank that drafts."""
    return agreed_prior(startup.load_prior(model), get_tp_group())


def agreed_prior(prior: Prior | None, ranks: GroupCoordinator) -> Prior | None:
    """The prior if every rank holds the same, else none, and a warning; to be called on every rank.

    Args:
        prior: what this rank has loaded; None for none.
        ranks: those that run each step together, of tensor parallelism.
    """
    if ranks.world_size == 1:
        return prior
    prints: list[str | None] = [None] * ranks.world_size
    torch.distributed.all_gather_object(prints, _fingerprint(prior), group=ranks.cpu_group)
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
