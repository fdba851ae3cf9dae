"""Verifier time: microseconds that one step's verification takes, by batch size and vocabulary.

    python -m benchmarks.verifier_time

The target's logits are made up: peaked rows, every draft token the row's argmax (all are read), or every
draft token a near rival of it (the case in which `conditional` has to compute the entropy). Measured:
`verify` under every rule as it is shipped, and vLLM's own rejection sampler of this platform, in turn on the same batches.
Each batch is taken from a ring of several, together larger than the CPU's caches, so that logits come from
memory as in a real step. Before anything is timed, `verify` is compared with its plain twin, and under
`strict` with vLLM's sampler.
"""

import sys
import types

import numpy as np
import torch

from benchmarks import results
from benchmarks.kernels import policy_tensors
from benchmarks.timing import microseconds
from vllm_aasd.kernels import verify as verify_op
from vllm_aasd.kernels.verify import reference as verify_reference

NUM_DRAFT_TOKENS = 8
RING_BYTES = 256 * 2**20

RULES = ("strict", "conditional", "typical", "fly", "budget")
CASES = ("argmax", "rival")


def main() -> None:
    """Measure, write the result, print its table."""
    parser = results.arguments(__doc__, out="verifier_time.json")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[49152, 151936], help="default %(default)s")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="default %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="timed per figure (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(results.read(arguments.show)))
        return
    stock = stock_sampler()
    rows = []
    for vocab_size in arguments.vocab_sizes:
        for batch_size in arguments.batch_sizes:
            for case in CASES:
                ring = made_up_batches(batch_size, vocab_size, case)
                check(ring[0], stock)
                rows.append(
                    {"vocab_size": vocab_size, "batch_size": batch_size, "drafts": case}
                    | time_in_turn(ring, stock, arguments.steps)
                )
    conditions = results.metadata(num_draft_tokens=NUM_DRAFT_TOKENS, dtype="float32", threads=torch.get_num_threads())
    result = {"metadata": conditions, "rows": rows}
    results.write(arguments.out, result)
    print(tables(result))


class Batch:
    """One step's input: logits, drafts, and the rest that both samplers want.

    Args:
        logits: ``[batch_size * NUM_DRAFT_TOKENS, vocab_size]`` float32.
        draft_token_ids: ``[batch_size * NUM_DRAFT_TOKENS]`` int32.
    """

    def __init__(self, logits: torch.Tensor, draft_token_ids: torch.Tensor) -> None:
        self.logits = logits
        self.draft_token_ids = draft_token_ids
        self.batch_size = len(draft_token_ids) // NUM_DRAFT_TOKENS
        ends = torch.arange(1, self.batch_size + 1, dtype=torch.int32) * NUM_DRAFT_TOKENS
        self.cu_num_draft_tokens = ends
        self.bonus_token_ids = torch.zeros((self.batch_size, 1), dtype=torch.int32)
        self.is_greedy = torch.ones(self.batch_size, dtype=torch.bool)
        self.stop_token_ids = torch.full((self.batch_size, 1), 2, dtype=torch.int32)
        self._policies = {rule: policy_tensors(rule, self.batch_size) for rule in RULES}

    def arguments(self, rule: str) -> tuple:
        """What `verify` takes, the requests being new: it writes down in their state what it relaxed, which would bar
        the next call from relaxing as much. Putting that back takes about a microsecond of what is timed.
        """
        self._policies[rule].state.zero_()
        return (
            self.draft_token_ids,
            self.cu_num_draft_tokens,
            NUM_DRAFT_TOKENS,
            self.logits,
            self.bonus_token_ids,
            self.is_greedy,
            None,
            self._policies[rule],
            self.stop_token_ids,
        )


def made_up_batches(batch_size: int, vocab_size: int, case: str) -> list[Batch]:
    """Batches that no cache holds together; in each row two tokens share nearly all of the probability."""
    rng = torch.Generator().manual_seed(0)
    num_rows = batch_size * NUM_DRAFT_TOKENS
    ring = []
    for _ in range(max(2, RING_BYTES // (num_rows * vocab_size * 4))):
        logits = torch.randn((num_rows, vocab_size), generator=rng)
        top, rival = torch.randint(3, vocab_size, (2, num_rows), generator=rng)
        rows = torch.arange(num_rows)
        logits[rows, rival] = 19.9
        # Where both fall on one token it is the argmax either way.
        logits[rows, top] = 20.0
        ring.append(Batch(logits, (top if case == "argmax" else rival).int()))
    return ring


def stock_sampler() -> types.ModuleType:
    """vLLM's rejection sampler, with the kernels of this platform in place as a worker has them."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    current_platform.register_triton_kernel_overrides()
    return rejection_sampler


def run_stock(stock: types.ModuleType, batch: Batch) -> torch.Tensor:
    """The batch through vLLM's own function."""
    return stock.rejection_sample(
        batch.draft_token_ids,
        [NUM_DRAFT_TOKENS] * batch.batch_size,
        NUM_DRAFT_TOKENS,
        batch.cu_num_draft_tokens,
        None,
        batch.logits,
        batch.bonus_token_ids,
        types.SimpleNamespace(all_greedy=True, all_random=False, temperature=None, generators={}),
    )


def check(batch: Batch, stock: types.ModuleType) -> None:
    """Compare what is timed with the twin, and strict with vLLM.

    Raises:
        SystemExit: if they emit different tokens; nothing is timed then.
    """
    for rule in RULES:
        got = verify_op.verify(*batch.arguments(rule)).output_token_ids
        want = verify_reference.verify(*batch.arguments(rule)).output_token_ids
        if not torch.equal(got, want):
            sys.exit(f"verify and its twin differ under {rule}")
        if rule == "strict" and not torch.equal(got, run_stock(stock, batch)):
            sys.exit("strict verification and vLLM's differ")


def time_in_turn(ring: list[Batch], stock: types.ModuleType, num_steps: int) -> dict[str, dict[str, float]]:
    """Each sampler over the same batches in four rounds, in turn, so that a drift of the machine hits all."""
    kinds = {rule: [(lambda b=b, r=rule: verify_op.verify(*b.arguments(r))) for b in ring] for rule in RULES}
    kinds["vllm"] = [(lambda b=b: run_stock(stock, b)) for b in ring]
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(4):
        for kind, calls in kinds.items():
            repeated = [calls[i % len(calls)] for i in range(num_steps // 4 + 3)]
            rounds[kind].append(microseconds(repeated))
    return {
        kind: {
            "median": float(np.median([one["median"] for one in of])),
            "p95": float(np.median([one["p95"] for one in of])),
            "medians": [one["median"] for one in of],
        }
        for kind, of in rounds.items()
    }


def tables(result: dict) -> str:
    """The result as text."""
    rows = [
        [f"{row['vocab_size']}", f"{row['batch_size']}", row["drafts"]]
        + [f"{row[kind]['median']:.0f} (p95 {row[kind]['p95']:.0f})" for kind in (*RULES, "vllm")]
        for row in result["rows"]
    ]
    header = ["vocabulary", "requests", "drafts", *(f"{rule}, us" for rule in RULES), "vLLM's own, us"]
    return "\n".join((results.heading(result), "", results.table(header, rows)))


if __name__ == "__main__":
    main()
