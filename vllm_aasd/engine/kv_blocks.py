"""KV blocks that change owners: drafts must not use predictions from a former owner's context.

vLLM doesn't clear a block that it gives to another request, so the alignment store's entries stay until they are
overwritten, and an entry's token doesn't identify its context. The scheduler's output says which blocks a step gives
to which request: the blocks of a prefix-cache hit hold the same context, with the same `cache_salt`, and keep their
entries; all others are cleared before the step reads or writes any. The copy that vLLM makes of a partly shared block
is one of those.
"""

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_aasd.alignment import AlignmentStore
from vllm_aasd.engine.failsafe import Faults


def new_blocks(scheduled: SchedulerOutput, group: int, block_size: int, loads_kv: bool) -> list[int]:
    """The blocks that a step gives to requests, other than prefix-cache hits.

    Args:
        scheduled: the step.
        group: a KV cache group, by its index.
        block_size: tokens of its blocks.
        loads_kv: whether a KV connector may fill blocks. They look like prefix-cache hits, so then no block of a new
            request counts as one.
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
    """Clear the entries of former owners in the blocks that a step gives to requests. Must be called before the step.

    Args:
        store: with the group's layout.
        scheduled, group, loads_kv: as for `new_blocks`.
        faults: of the worker.
    """
    with faults.contained("store", shared=True):
        store.invalidate(new_blocks(scheduled, group, store.table.shape[1], loads_kv))
        return
    # The owners of the entries are unknown, so none are kept.
    store.clear()
