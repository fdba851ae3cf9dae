"""Kernels: what the Triton kernels cost in registers and spills, on GPUs that needn't be here.

    python -m benchmarks.kernels

Nothing is timed. The figures are read from the machine code of the launches that the ops really make
(`benchmarks.launches`), compiled ahead of time. Tests use the same jobs, and also count the bytes that they move.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import report, results
from vllm_aasd.kernels.verify.policies import MAX_STOP_TOKEN_IDS

VOCAB_SIZE = 151936
NUM_SPECULATIVE_STEPS = 8
TOP_K = 4
NUM_SLOTS = 1024
NUM_PAGES = 64
MAX_SPECULATIVE_STEPS = 16

# Compiled launches, as (requests, dtype): one request takes narrow blocks, a batch takes wide ones.
BATCHES = ((1, torch.bfloat16), (64, torch.float32))


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to do, by an op."""

    name: str
    make: Callable[["Inputs"], Callable[[], Any]]
    """From inputs to the call that does it, on CPU tensors."""
    reads_logits: bool = True


class Inputs:
    """One step's input: each request has its drafts and a bonus row, and a slot of the same number.

    Args:
        num_reqs: requests.
        num_drafts: of each.
        vocab_size: columns of the logits.
        dtype: of the logits.
        row_stride: of the logits; None for ``vocab_size``. vLLM's are slices of rows of a padded vocabulary.
    """

    def __init__(
        self,
        num_reqs: int,
        num_drafts: int,
        vocab_size: int,
        dtype: torch.dtype,
        row_stride: int | None = None,
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        per_request = num_drafts + 1
        self.num_reqs, self.num_drafts, self.vocab_size = num_reqs, num_drafts, vocab_size
        self.num_rows = num_reqs * per_request
        self.logits = torch.randn(self.num_rows, row_stride or vocab_size, generator=rng).to(dtype)[:, :vocab_size]
        self.argmax = self.logits.float().argmax(-1)
        self.token_ids = torch.zeros(self.num_rows, dtype=torch.int32)
        # Each draft is the argmax, so all are accepted but the last of each request.
        self.draft_sampled = self.argmax.roll(1).int()
        self.draft_sampled[per_request - 1 :: per_request] = 0
        self.cu_num_logits = torch.arange(0, self.num_rows + 1, per_request, dtype=torch.int32)
        self.pos = torch.arange(self.num_rows)
        self.idx_mapping = torch.arange(num_reqs)
        self.expanded_idx_mapping = self.idx_mapping.repeat_interleave(per_request)
        self.expanded_local_pos = (torch.arange(self.num_rows) % per_request).int()
        self.seed = torch.arange(num_reqs)
        self.slot_mapping = torch.arange(self.num_rows)
        self.stop_token_ids = torch.full((num_reqs, MAX_STOP_TOKEN_IDS), -1, dtype=torch.int32)
        self.stop_token_ids[:, 0] = 2

    def table(self, top_k: int) -> torch.Tensor:
        """An empty alignment table."""
        return torch.zeros(max(NUM_SLOTS, self.num_rows), 1 + 2 * top_k, dtype=torch.int32)


def verify(temperature: float, rule: str) -> Callable[[Inputs], Callable]:
    """`verify_seeded` for requests of one kind, by the policy of a name as it is shipped."""

    def make(inputs: Inputs) -> Callable[[], Any]:
        from vllm_aasd.kernels import count
        from vllm_aasd.kernels.verify import triton as verify_seeded_triton
        from vllm_aasd.kernels.verify.seeded import SeededBatch

        one = torch.ones(inputs.num_reqs)
        policies = policy_tensors(rule, inputs.num_reqs)
        batch = SeededBatch(
            inputs.logits,
            inputs.draft_sampled,
            torch.full((inputs.num_reqs,), inputs.num_drafts, dtype=torch.int32),
            inputs.cu_num_logits,
            inputs.pos,
            inputs.idx_mapping,
            inputs.expanded_idx_mapping,
            inputs.expanded_local_pos,
            one * temperature,
            inputs.seed,
            inputs.num_drafts,
            policies,
            inputs.stop_token_ids,
            torch.rand(inputs.num_reqs, max(inputs.num_drafts, 1)),
            torch.zeros(count.SIZE, dtype=torch.float64),
            all_greedy=temperature == 0,
        )
        return lambda: verify_seeded_triton.verify_seeded(batch)

    return make


def policy_tensors(rule: str, num_reqs: int) -> Any:
    """The `VerifyPolicies` of `num_reqs` requests under the rule, greedy and sampled ones alike."""
    from vllm_aasd.config import Settings
    from vllm_aasd.verification.table import PolicyBatch

    policy = Settings(verification=rule).policy()
    req_ids = [str(i) for i in range(num_reqs)]
    return PolicyBatch(num_reqs).fill(req_ids, [policy] * num_reqs, [[]] * num_reqs)[0]


def align(inputs: Inputs) -> Callable[[], Any]:
    """`align` of all rows."""
    from vllm_aasd.kernels.align import triton as align_triton

    return lambda: align_triton.align(inputs.logits, inputs.token_ids, inputs.slot_mapping, inputs.table(TOP_K))


def align_shards(inputs: Inputs) -> Callable[[], Any]:
    """`align_shard` on two ranks, and `align_merge`."""
    from vllm_aasd.kernels.align import triton as align_triton

    half = inputs.vocab_size // 2

    def run() -> None:
        shards = [
            align_triton.align_shard(inputs.logits[:, a : a + half], inputs.slot_mapping, a, TOP_K) for a in (0, half)
        ]
        partials = torch.stack(shards)
        align_triton.align_merge(partials, inputs.token_ids, inputs.slot_mapping, inputs.table(TOP_K))

    return run


def draft(
    top_k: int, prior_top_k: int, num_spec_tokens: int = NUM_SPECULATIVE_STEPS, num_pages: int = NUM_PAGES
) -> Callable:
    """`draft_batch` over contexts of up to 128k tokens, with predictions of positions and of the prior, and
    `num_pages` pages of known text."""

    def make(inputs: Inputs) -> Callable[[], Any]:
        from vllm_aasd.kernels.draft import triton as draft_triton
        from vllm_aasd.kernels.draft.batch import MAX_EXCLUDED, DraftBatch, draft_workspace

        max_ngram_size, max_matches, num_reqs, max_model_len = 6, 32, inputs.num_reqs, 131072
        int32 = {"dtype": torch.int32}
        prior_shape = (inputs.vocab_size if prior_top_k else 0, prior_top_k)
        batch = DraftBatch(
            all_token_ids=torch.empty((num_reqs, max_model_len), **int32),
            total_len=torch.empty(num_reqs, **int32),
            idx_mapping=inputs.idx_mapping,
            table=torch.empty((NUM_SLOTS if top_k else 0, 1 + 2 * top_k), **int32),
            block_tables=torch.empty((num_reqs, max_model_len // 16), **int32),
            block_size=16,
            theta=torch.empty(max_ngram_size),
            alignment=torch.empty(max_ngram_size),
            no_alignment_discount=torch.empty(1),
            prior_ids=torch.empty(prior_shape, **int32),
            prior_probs=torch.empty(prior_shape),
            vocab_size=inputs.vocab_size,
            max_matches=max_matches,
            min_survival=0.02,
            texts=known_texts(num_reqs, num_pages),
            max_len=torch.empty(num_reqs, **int32),
            num_sampled=torch.empty(num_reqs, **int32),
            excluded=torch.empty(MAX_EXCLUDED, **int32),
            longest=num_spec_tokens,
            workspace=draft_workspace(num_reqs, max_model_len, max_ngram_size, max_matches, top_k, prior_top_k, "cpu"),
            draft_token_ids=torch.empty((num_reqs, num_spec_tokens), dtype=torch.int64),
            num_drafts=torch.empty(num_reqs, **int32),
            survival=torch.empty((num_reqs, num_spec_tokens)),
            lookups=torch.empty(3, dtype=torch.int64),
        )
        return lambda: draft_triton.draft_batch(batch)

    return make


def known_texts(num_reqs: int, num_pages: int) -> Any:
    """Empty `TextTensors`, with as many pages of corpora."""
    from vllm_aasd.drafting.known_text import prior_reliability
    from vllm_aasd.kernels.text import new_index
    from vllm_aasd.kernels.text.batch import new_texts

    sizes = num_reqs, MAX_SPECULATIVE_STEPS, num_pages
    return new_texts(*sizes, new_index(num_pages), prior_reliability(), "cpu")


def texts(inputs: Inputs) -> Callable[[], Any]:
    """`learn_and_append` of all requests, and `append_predictions`."""
    from vllm_aasd.kernels.text import triton as text_triton

    of, int32 = known_texts(inputs.num_reqs, NUM_PAGES), {"dtype": torch.int32}
    contexts, total_len = torch.empty((inputs.num_reqs, 32768), **int32), torch.empty(inputs.num_reqs, **int32)
    num_sampled, pieces = torch.empty(inputs.num_reqs, **int32), torch.empty((8, 3), dtype=torch.int64)

    def run() -> None:
        text_triton.learn_and_append(of, contexts, total_len, inputs.idx_mapping, num_sampled, 32)
        text_triton.append_predictions(of, torch.empty((8, 1024), **int32), pieces)

    return run


# A further kernel is a further entry.
JOBS = (
    Job("verify, greedy, strict", verify(0.0, "strict")),
    Job("verify, greedy, conditional", verify(0.0, "conditional")),
    Job("verify, greedy, fly", verify(0.0, "fly")),
    Job("verify, sampled, strict", verify(1.0, "strict")),
    Job("verify, sampled, conditional", verify(1.0, "conditional")),
    Job("align", align),
    Job("align, two shards", align_shards),
    Job("known text", texts, reads_logits=False),
    Job("draft, retrieval alone", draft(0, 0, num_pages=0), reads_logits=False),
    Job("draft, top 2 and prior", draft(2, 8), reads_logits=False),
    Job("draft, top 4 and prior", draft(4, 8), reads_logits=False),
)


def main() -> None:
    """Compile, write the result, print its table."""
    arguments = results.arguments(__doc__, "kernels.json").parse_args()
    metadata = results.metadata(vocab_size=VOCAB_SIZE, num_speculative_steps=NUM_SPECULATIVE_STEPS, top_k=TOP_K)
    result = {"metadata": metadata, "builds": compile_all()}
    results.write(arguments.out, result)
    print(f"{results.heading(result)}\n\n{report.kernels(result)}")


def compile_all() -> list[dict[str, Any]]:
    """Compile every distinct launch of every job for every target: the most that any launch of a kernel takes."""
    from benchmarks.launches import TARGETS, build, distinct, recorded

    most: dict[tuple[str, str], dict[str, int]] = {}
    for num_reqs, dtype in BATCHES:
        calls = [job.make(Inputs(num_reqs, NUM_SPECULATIVE_STEPS, VOCAB_SIZE, dtype)) for job in JOBS]
        for name, target in TARGETS.items():
            for launch in distinct(launch for call in calls for launch in recorded(call, target)):
                built = build(launch, target)
                kernel = most.setdefault((launch.name.removesuffix("_kernel"), name), {})
                for field in ("registers", "shared_bytes", "spill_bytes", "stack_bytes"):
                    kernel[field] = max(getattr(built, field), kernel.get(field, 0))
    return [{"kernel": name, "target": target, **of} for (name, target), of in most.items()]


if __name__ == "__main__":
    main()
