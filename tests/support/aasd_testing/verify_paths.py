"""The implementations of the verify ops, called alike: with the arguments of the seeded op."""

import itertools
from types import SimpleNamespace

import torch

from vllm_aasd.gpu_check.verify_inputs import copied
from vllm_aasd.kernels.verify import VerifyBatch, cpu, reference
from vllm_aasd.kernels.verify.random_reference import row_uniform
from vllm_aasd.kernels.verify.seeded import SeededBatch

V1, V2 = ("cpu", "reference"), ("triton", "seeded reference")


def as_v1(arguments, **given):
    """The V1 op's batch for a batch of the seeded op, with its uniforms; and the rows that the V1 op has.

    Bonus tokens are the argmax of their rows. A random number decides each recovered token.
    """
    starts, ends = arguments["cu_num_logits"][:-1].long(), arguments["cu_num_logits"][1:].long()
    assert (starts < ends).all(), "on V1 each request has a bonus token"
    rows = [row for start, end in zip(starts, ends, strict=True) for row in range(start, end - 1)]
    slots, slot_of = arguments["idx_mapping"].long(), arguments["expanded_idx_mapping"]
    uniform = [row_uniform(int(arguments["seed"][slot_of[row]]), int(arguments["pos"][row])) for row in rows]
    policies = arguments["policies"]
    is_filler = arguments["expanded_local_pos"] > arguments["num_drafts"][slot_of]
    drafts = arguments["draft_sampled"].masked_fill(is_filler, -1)
    by_request = {name: getattr(policies, name)[slots] for name in ("rule", "parameters", "state_rows")}
    batch = VerifyBatch(
        draft_token_ids=drafts[[row + 1 for row in rows]].int(),
        cu_num_draft_tokens=(ends - starts - 1).cumsum(0).int(),
        max_spec_len=arguments["num_speculative_steps"],
        target_logits=arguments["target_logits"][rows],
        bonus_token_ids=arguments["target_logits"][ends - 1].float().argmax(-1),
        is_greedy=arguments["temperature"][slots] == 0,
        policies=policies._replace(**by_request),
        stop_token_ids=arguments["stop_token_ids"][slots],
        uniform_probs=torch.tensor(uniform, dtype=torch.float64),
        recovered_probs=torch.rand(len(slots), dtype=torch.float64, generator=torch.Generator().manual_seed(len(rows))),
    )
    return batch._replace(**given), rows


def run(path, arguments, interpreter=None, **given):
    """Verify a batch of the seeded op.

    Args:
        path: one of `V1` or `V2`.
        arguments: of the seeded op; the state is updated.
        interpreter: for "triton".
        **given: replaces fields of the V1 op's batch.

    Returns: the op's `sampled` and `num_sampled`; `relaxed` and `regret` by the rows of the seeded op; `exhausted` and
        `guarded`; and `state` by request.
    """
    policies = arguments["policies"]
    if path == "triton":
        output, state, _ = interpreter.call("aasd_testing.interpreter:verify_and_state", arguments)
        policies.state.copy_(state)
    elif path == "seeded reference":
        output = reference.verify_seeded(SeededBatch(**arguments))
    else:
        batch, rows = as_v1(arguments, **given)
        output = {"cpu": cpu, "reference": reference}[path].verify(batch)
        relaxed, regret = torch.zeros(2, len(arguments["target_logits"]))
        relaxed[rows], regret[rows] = output.relaxed.float(), output.regret
        output = output._replace(relaxed=relaxed.bool(), regret=regret)
    rows_of_state = policies.state_rows[arguments["idx_mapping"].long()].long()
    return SimpleNamespace(**output._asdict(), state=policies.state[rows_of_state])


def tokens(result):
    """The emitted tokens of each request, after having looked at what stands behind them."""
    rows = [row[:n] for row, n in zip(result.sampled.tolist(), result.num_sampled.tolist(), strict=True)]
    assert all((row[n:] == -1).all() for row, n in zip(result.sampled, result.num_sampled.tolist(), strict=True))
    return rows


def relaxed_rows(result, arguments):
    """By request, the rows in it whose draft token was accepted by relaxation."""
    bounds = itertools.pairwise(arguments["cu_num_logits"].tolist())
    return [result.relaxed[start:end].nonzero()[:, 0].tolist() for start, end in bounds]


def with_own_state(arguments):
    """The same arguments with copies of what is updated."""
    return {**arguments, "policies": copied(arguments["policies"]), "totals": arguments["totals"].clone()}
