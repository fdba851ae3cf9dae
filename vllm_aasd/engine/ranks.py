"""What the ranks of a group tell each other."""

from typing import TypeVar

import torch.distributed
from vllm.distributed.parallel_state import GroupCoordinator

T = TypeVar("T")


def gathered(value: T, ranks: GroupCoordinator) -> list[T]:
    """The value of every rank, in their order. Every rank calls this.

    Args:
        value: this rank's, which can be pickled.
        ranks: the group.
    """
    if ranks.world_size == 1:
        return [value]
    values = [value] * ranks.world_size
    torch.distributed.all_gather_object(values, value, group=ranks.cpu_group)
    return values
