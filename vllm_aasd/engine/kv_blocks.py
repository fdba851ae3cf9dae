"""KV blocks that change hands: what their former owners' contexts predicted must not be drafted from.

vLLM clears no block when it gives it to another request, so the alignment store's entries lie there until they are
overwritten, and an entry's own token says nothing of its context. Which blocks a step gives to whom is in the scheduler's
output: the blocks of a prefix-cache hit hold the same context, under the same `cache_salt`, and keep their entries; all
others lose them before the step reads or writes any. The copy that vLLM makes of a partly shared block is such a block.
"""

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.engine.failsafe import Faults


def new_blocks(scheduled: SchedulerOutput, group: int, block_size: int, loads_kv: bool) -> list[int]:
    """The blocks that a step gives to requests other than as a prefix-cache hit.

    Args:
        scheduled: the step.
        group: a KV cache group, by its index.
        block_size: tokens of its blocks.
        loads_kv: whether a KV connector may have filled computed blocks, too, which then aren't told from hits: none of a
            request that enters are taken for one.
    """

    def after_hits(block_ids: tuple[list[int], ...], num_computed_tokens: int) -> list[int]:
        return block_ids[group][0 if loads_kv else num_computed_tokens // block_size :]

    found = []
    for request in scheduled.scheduled_new_reqs:
        found += after_hits(request.block_ids, request.num_computed_tokens)
    cached = scheduled.scheduled_cached_reqs
    for req_id, block_ids, num_computed_tokens in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if block_ids is not None:
            is_resumed = req_id in cached.resumed_req_ids
            found += after_hits(block_ids, num_computed_tokens) if is_resumed else block_ids[group]
    return found


def disown(store: AlignmentStore, scheduled: SchedulerOutput, group: int, loads_kv: bool, faults: Faults) -> None:
    """Forget what former owners left in the blocks that a step gives to requests; to be called before it begins.

    Args:
        store: laid out as the group is.
        scheduled, group, loads_kv: as for `new_blocks`.
        faults: of the worker.
    """
    with faults.contained("store", shared=True):
        store.invalidate(new_blocks(scheduled, group, store.table.shape[1], loads_kv))
        return
    # Whose entries these are isn't known, so nobody's are kept.
    store.clear()
