"""Which KV blocks a step gives to requests anew, by what vLLM's scheduler tells of it."""

import dataclasses

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_aasd.engine.kv_blocks import new_blocks

BLOCK = 4


def entering(num_computed_tokens, *block_ids):
    """A request of 14 tokens that enters, with its blocks of each KV cache group."""
    return NewRequestData("new", list(range(14)), [], SamplingParams(), None, block_ids, num_computed_tokens, None)


def step(new=(), cached=()):
    """A step of vLLM's scheduler; `cached` as (request id, new blocks, computed tokens), those of "r..." resumed."""
    req_ids, block_ids, computed = zip(*cached, strict=True) if cached else ((), (), ())
    resumed = {req_id for req_id in req_ids if req_id.startswith("r")}
    told = CachedRequestData(list(req_ids), resumed, [], {}, list(block_ids), list(computed), [1] * len(req_ids))
    return dataclasses.replace(SchedulerOutput.make_empty(), scheduled_new_reqs=list(new), scheduled_cached_reqs=told)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (step(), []),
        (step(new=[entering(0, [7, 3, 9, 5])]), [7, 3, 9, 5]),
        # A prefix-cache hit is shared; that the rest of the prompt follows in later steps changes nothing.
        (step(new=[entering(8, [7, 3, 9, 5])]), [9, 5]),
        # Of a block that is shared in part the request has a copy, and with it what others' contexts predict.
        (step(new=[entering(6, [7, 3, 9, 5])]), [3, 9, 5]),
        # A running request gets blocks behind those that it has, however many tokens these hold.
        (step(cached=[("a", ([8],), 8), ("b", None, 5), ("c", ([2, 4],), 40)]), [8, 2, 4]),
        # A resumed one on the V1 runner is told all of its blocks.
        (step(cached=[("r", ([7, 3, 9],), 8), ("b", ([2],), 9)]), [9, 2]),
        (step(new=[entering(4, [7, 3])], cached=[("a", ([8],), 8)]), [3, 8]),
    ],
)
def test_all_but_hits_are_new(told, expected):
    assert new_blocks(told, 0, BLOCK, loads_kv=False) == expected


def test_only_blocks_of_the_group_count():
    told = step(new=[entering(8, [1, 2, 3], [4, 5, 6])], cached=[("a", ([7], [8]), 8)])
    assert new_blocks(told, 1, BLOCK, loads_kv=False) == [6, 8]


def test_what_a_connector_may_have_loaded_is_no_hit():
    """Such blocks count as computed, and nobody has run them here."""
    told = step(new=[entering(8, [7, 3, 9])], cached=[("r", ([1, 2],), 4), ("a", ([8],), 8)])
    assert new_blocks(told, 0, BLOCK, loads_kv=True) == [7, 3, 9, 1, 2, 8]
