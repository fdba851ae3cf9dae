"""Counting time: microseconds that a step's figures take on the V1 model runner, by batch size.

    python -m benchmarks.counting_time

Drafts of 8 tokens each, half of them accepted, promised by a real drafter. Measured: all that `V1Counting` is told of
in a step. Before anything is timed, its totals are compared with those of the plain twin.
"""

import sys

import numpy as np
import torch

from benchmarks import results
from benchmarks.timing import microseconds
from vllm_aasd.counters import Counters
from vllm_aasd.drafting.drafter import NO_ALIGNMENT, Drafter
from vllm_aasd.engine.failsafe import Faults
from vllm_aasd.engine.v1.counting import V1Counting
from vllm_aasd.kernels.count import reference as count_reference
from vllm_aasd.kernels.verify import VerifyOutput

NUM_DRAFT_TOKENS = 8


def main() -> None:
    """Measure, write the result, print its table."""
    parser = results.arguments(__doc__, out="counting_time.json")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=3000, help="timed per figure (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    rows = [{"batch_size": size} | time_counting(size, arguments.steps) for size in arguments.batch_sizes]
    conditions = results.metadata(num_draft_tokens=NUM_DRAFT_TOKENS, threads=torch.get_num_threads())
    result = {"metadata": conditions, "rows": rows}
    results.write(arguments.out, result)
    print(tables(result))


def time_counting(batch_size: int, num_steps: int) -> dict[str, float]:
    """Times of `num_steps` steps of so many requests.

    Raises:
        SystemExit: if what is timed counts otherwise than its twin.
    """
    context = np.tile(np.arange(1, 9, dtype=np.int32), 8)
    drafter = Drafter(vocab_size=64, max_draft_tokens=NUM_DRAFT_TOKENS, min_survival=0.0)
    req_ids = [str(number) for number in range(batch_size)]
    drafts = [drafter.draft(req_id, context, NO_ALIGNMENT, NUM_DRAFT_TOKENS)[0].tolist() for req_id in req_ids]
    draft_token_ids = torch.tensor(drafts, dtype=torch.int32).flatten()
    cu_num_draft_tokens = (NUM_DRAFT_TOKENS * torch.arange(1, batch_size + 1)).int()
    num_rows = len(draft_token_ids)
    step = VerifyOutput(
        torch.empty((batch_size, NUM_DRAFT_TOKENS + 1), dtype=torch.int32),
        torch.full((batch_size,), NUM_DRAFT_TOKENS // 2, dtype=torch.int32),
        torch.zeros(num_rows, dtype=torch.bool),
        torch.zeros(num_rows),
    )
    counters, faults = Counters("cpu"), Faults()
    counting = V1Counting(counters, faults, batch_size, NUM_DRAFT_TOKENS)
    counting.drafter = drafter

    def call() -> None:
        counting.verified(req_ids, draft_token_ids, cu_num_draft_tokens, step, 1e-3)
        counting.drafted(1e-3)

    call()
    totals, nobody = torch.zeros_like(counters.totals), torch.empty(0, dtype=torch.bool)
    count_reference.count_drafts(
        totals,
        draft_token_ids,
        torch.cat([torch.zeros(1, dtype=torch.int32), cu_num_draft_tokens]),
        0,
        step.num_accepted + 1,
        torch.arange(batch_size),
        torch.from_numpy(np.stack([drafter.promised(req_id) for req_id in req_ids])),
        step.relaxed,
        step.regret,
        nobody,
        nobody,
    )
    if any(faults.counts.values()) or not torch.allclose(totals, counters.totals):
        sys.exit(
            f"at {batch_size} requests the counters hold {counters.totals.tolist()}, and the twin {totals.tolist()}"
        )
    return microseconds([call] * num_steps)


def tables(result: dict) -> str:
    """The result as text."""
    rows = [[f"{row['batch_size']}", f"{row['median']:.1f} (p95 {row['p95']:.1f})"] for row in result["rows"]]
    return "\n".join((results.heading(result), "", results.table(["requests", "counting, us a step"], rows)))


if __name__ == "__main__":
    main()
