"""The prior, used only if all tensor-parallel ranks have the same; each reads it from a file of its own node.

On the V2 model runner every rank drafts and verifies for itself: with different priors, ranks would accept different
tokens and run the target on them. On V1 the scheduler takes the first rank's drafts, so another rank's prior has no
effect; but whether a prior is used shouldn't depend on which node is first. The memory exists on V1 only, where it
follows the first rank's drafts, and all ranks get the same settings.
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
    """The prior of the served model, if all ranks have it. Every rank that drafts calls this."""
    return agreed_prior(startup.load_prior(model), get_tp_group())


def agreed_prior(prior: Prior | None, ranks: GroupCoordinator) -> Prior | None:
    """The prior if every rank has the same; otherwise none, with a warning. Every rank calls this.

    Args:
        prior: what this rank has loaded; None for none.
        ranks: the tensor-parallel group.
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
