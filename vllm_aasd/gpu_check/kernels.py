"""Every kernel against its reference: plainly, on another stream, replayed from a graph, and beyond 2^31 elements."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from vllm_aasd.gpu_check import verify_inputs
from vllm_aasd.gpu_check.gpu import Gpu, Skipped
from vllm_aasd.gpu_check.inputs import TextStep, batch_of, random_contexts, rows_to_align, text_episode
from vllm_aasd.kernels import align
from vllm_aasd.kernels.align import reference as align_reference
from vllm_aasd.kernels.draft import batch as draft
from vllm_aasd.kernels.draft import reference as draft_reference
from vllm_aasd.kernels.text import batch as text
from vllm_aasd.kernels.text import batch_reference as text_reference
from vllm_aasd.kernels.verify import reference as verify_reference
from vllm_aasd.kernels.verify import seeded
from vllm_aasd.kernels.verify.random_reference import token_gumbel

TOLERANCES = {"regret": (0, 2e-6), "state": (0, 2e-5), "probabilities": (1e-4, 0), "totals": (1e-6, 0)}
"""Relative and absolute, of float32 sums that are taken in another order; all else is equal to the bit."""

NEAR_RACE = 1e-4
"""Two tokens' scores of a Gumbel race that are nearer than this may win in either order."""

Outputs = dict[str, torch.Tensor]
BF16, F32 = torch.bfloat16, torch.float32


class Sizes(NamedTuple):
    """How large inputs are.

    Attributes:
        verify: vocabulary, dtype of the logits, rows of each request.
        align: rows, vocabulary, k, dtype.
        draft: lengths of contexts, vocabulary, draft tokens, predictions of a position and of the prior, matches.
        text: requests and steps.
        offset: elements of the large tensors.
    """

    verify: tuple[tuple[int, torch.dtype, list[int]], ...]
    align: tuple[tuple[int, int, int, torch.dtype], ...]
    draft: tuple[tuple[tuple[int, ...], int, int, int, int, int], ...]
    text: tuple[int, int]
    offset: int


SMALL = Sizes(
    ((111, BF16, [4, 1, 0, 4, 2]), (5000, F32, [3, 3])),
    ((5, 111, 3, F32), (4, 5000, 4, BF16)),
    (((0, 1, 60, 90), 9, 3, 2, 3, 5), ((700, 40), 20, 2, 0, 0, 32)),
    (4, 8),
    1 << 14,
)
QUICK = Sizes(
    (
        (32000, F32, [17, 1, 17, 9, 0, 17]),
        (151936, BF16, [8]),
        (128256, BF16, [2] * 64),
        (262144, BF16, [5, 5, 1]),
        (32000, BF16, [2] * 256),
    ),
    ((9, 32000, 4, F32), (40, 151936, 4, BF16), (9, 262144, 8, BF16)),
    (((0, 1, 2, 60, 900), 151936, 7, 4, 8, 32), ((9000,), 40, 8, 0, 8, 32), ((90,) * 256, 9, 1, 0, 8, 32)),
    (32, 12),
    1 << 31,
)
FULL = QUICK._replace(
    verify=(
        *QUICK.verify,
        (128256, F32, [9, 1, 9, 5, 0, 9]),
        (151936, F32, [3] * 64),
        (262144, F32, [17]),
        (151936, torch.float16, [5] * 4),
        (32000, BF16, [17] * 16),
    ),
    draft=(*QUICK.draft, ((100000, 100), 500, 7, 4, 8, 32), ((2000,) * 16, 60, 16, 4, 8, 32)),
    text=(256, 24),
)


class Case(NamedTuple):
    """One input of an op: `run` calls the op, or its reference, on arguments and gives what is compared."""

    name: str
    run: Callable[..., Outputs]
    op: Any
    reference: Any
    arguments: tuple[Any, ...]


def run_verify(op: Any, arguments: dict[str, Any]) -> Outputs:
    """`verify_seeded`, and what it updates: the requests' state, and the counts of drafts."""
    updated = {"state": arguments["policies"].state, "totals": arguments["totals"]}
    return op.verify_seeded(seeded.SeededBatch(**arguments))._asdict() | updated


def run_align(op: Any, logits: torch.Tensor, *where: Any) -> Outputs:
    """`align`: the table that it leaves."""
    op.align(logits, *where)
    return _entries(where[-1])


def run_shards(op: Any, logits: torch.Tensor, token_ids: torch.Tensor, slots: torch.Tensor, table: Any) -> Outputs:
    """`align_shard` on two ranks, and `align_merge`."""
    half, k = logits.shape[1] // 2, table.shape[1] // 2
    parts = [op.align_shard(part, slots, at, k) for at, part in ((0, logits[:, :half]), (half, logits[:, half:]))]
    op.align_merge(torch.stack(parts), token_ids, slots, table)
    return _entries(table)


def _entries(table: torch.Tensor) -> Outputs:
    ids, probabilities = table[:, : 1 + table.shape[1] // 2], table[:, 1 + table.shape[1] // 2 :]
    return {"entries": ids, "probabilities": probabilities.contiguous().view(torch.float32)}


def run_draft(op: Any, batch: draft.DraftBatch) -> Outputs:
    """`draft_batch`."""
    op.draft_batch(batch)
    return {name: getattr(batch, name) for name in ("draft_token_ids", "num_drafts", "survival", "lookups")}


def run_text(op: tuple[Any, Any], base: draft.DraftBatch, steps: list[TextStep]) -> Outputs:
    """A step after another: predictions are appended, what was emitted is learned and appended, and drafted from."""
    texts = base.texts
    outputs: Outputs = {}
    for number, step in enumerate(steps):
        texts.slots.copy_(step.slots)
        op[0].append_predictions(texts, step.piece_ids, step.pieces)
        contexts = base.all_token_ids, step.total_len, step.idx_mapping
        op[0].learn_and_append(texts, *contexts, step.num_sampled, 32)
        drafts = {name: getattr(base, name).clone() for name in ("draft_token_ids", "num_drafts", "survival")}
        rows = {name: getattr(step, name) for name in ("total_len", "idx_mapping", "num_sampled")}
        op[1].draft_batch(base._replace(longest=base.longest >> number % 4, **rows, **drafts))
        outputs |= {f"{name} of step {number}": tensor for name, tensor in drafts.items()}
    kept = ("tokens", "pages", "heads", "begun", "found", "right", "value", "documents", "predictions", "looked_up")
    return outputs | {name: getattr(texts, name) for name in kept}


def cases(sizes: Sizes, seed: int) -> Iterator[Case]:
    """Inputs of every op, each made when it is asked for."""
    for vocab_size, dtype, counts in sizes.verify:
        arguments = verify_inputs.random_batch(vocab_size, counts, dtype, seed)
        if all(n == 2 for n in counts):
            arguments |= {"all_greedy": True, "temperature": torch.zeros_like(arguments["temperature"])}
        verify_inputs.settle(arguments)
        name = f"verify {vocab_size} {str(dtype)[6:]} {len(counts)} requests"
        yield Case(name, run_verify, seeded, verify_reference, (arguments,))
    for num_rows, vocab_size, k, dtype in sizes.align:
        rows = rows_to_align(num_rows, vocab_size, dtype, seed)
        to_align = (*rows, torch.full((2 * num_rows, 1 + 2 * k), -12345, dtype=torch.int32))
        for kind, run in (("align", run_align), ("align, two shards", run_shards)):
            yield Case(f"{kind} {num_rows} x {vocab_size}", run, align, align_reference, to_align)
    for lengths, vocab_size, width, top_k, prior_top_k, max_matches in sizes.draft:
        contexts = random_contexts(lengths, min(vocab_size, 12), seed)
        made = batch_of(contexts, vocab_size, width, top_k, prior_top_k, max_matches, block_size=16, seed=seed)
        made.limit(*[1 if row % 4 == 2 else width for row in range(len(lengths))])
        made.num_sampled[5::8] = 0
        made.excluded[-1] = 5
        name = f"draft {len(lengths)} contexts up to {max(lengths)}"
        yield Case(name, run_draft, draft, draft_reference, (made.arguments(),))
    episode = text_episode(seed, *sizes.text)
    yield Case(f"text {sizes.text[0]} requests", run_text, (text, draft), (text_reference, draft_reference), episode)


def copied(value: Any, device: torch.device) -> Any:
    """All tensors in it on a device, in memory of their own, with the same strides and offsets."""
    if isinstance(value, torch.Tensor):
        storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return storage.to(device, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, dict):
        return {name: copied(inner, device) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        inner = [copied(one, device) for one in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


def refill(value: Any, source: Any) -> None:
    """Put what is in `source` into the tensors of `value`, its copy."""
    if isinstance(value, torch.Tensor):
        value.copy_(source)
    elif isinstance(value, dict | tuple | list):
        of = (lambda nested: nested.values()) if isinstance(value, dict) else iter
        for one, other in zip(of(value), of(source), strict=True):
            refill(one, other)


def agree(gpu: Gpu, case: Case, ways: tuple[str, ...] = ("plain",), given: tuple[Any, ...] | None = None) -> None:
    """Compare an op with its reference.

    Args:
        gpu: where the op runs.
        case: the input.
        ways: "plain", "side" (on another stream) and "graph" (captured, and replayed on fresh inputs).
        given: the arguments on the device, by default a copy of the case's.

    Raises:
        AssertionError: they differ; the text says where.
    """
    expected = case.run(case.reference, *copied(case.arguments, torch.device("cpu")))
    given = copied(case.arguments, gpu.device) if given is None else given
    for way in ways:
        if way != "plain":
            refill(given, case.arguments)
        call = lambda: case.run(case.op, *given)
        if way == "graph":
            outputs, replay = gpu.captured(call)
            refill(given, case.arguments)
            replay()
        else:
            outputs = gpu.aside(call) if way == "side" else call()
        gpu.synchronize()
        wrong = list(_differences(case, {name: tensor.cpu() for name, tensor in outputs.items()}, expected))
        if wrong:
            raise AssertionError(f"{case.name} ({way}): {'; '.join(wrong[:3])}")


def _differences(case: Case, ours: Outputs, theirs: Outputs) -> Iterator[str]:
    for name, one in ours.items():
        other = theirs[name]
        rtol, atol = TOLERANCES.get(name, (0, 0))
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f"{name} is {tuple(one.shape)} {one.dtype}, expected {tuple(other.shape)} {other.dtype}"
            continue
        differ = ~torch.isclose(one, other, rtol=rtol, atol=atol, equal_nan=True)
        if name == "sampled" and differ.any():
            for req, column in differ.nonzero().tolist():
                differ[req, column] = not _is_near_race(case.arguments[0], req, column, one, other)
        if differ.any():
            at = differ.nonzero()[0].tolist()
            yield f"{name}: {int(differ.sum())} of {one.numel()} differ, first {at}: {one[*at]} for {other[*at]}"


def _is_near_race(arguments: dict[str, Any], req: int, column: int, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tokens, drawn after the same accepted ones, have nearly the same score."""
    row = int(arguments["cu_num_logits"][req]) + column
    slot = int(arguments["idx_mapping"][req])
    logits, vocab_size = arguments["target_logits"][row].float(), arguments["target_logits"].shape[1]
    one, other = int(ours[req, column]), int(theirs[req, column])
    if arguments["temperature"][slot] == 0 or not (0 <= one < vocab_size and 0 <= other < vocab_size):
        return False
    gumbel = token_gumbel(int(arguments["seed"][slot]), int(arguments["pos"][row]), vocab_size)
    scores = [float(logits[token]) + float(gumbel[token]) for token in (one, other)]
    return abs(scores[0] - scores[1]) < NEAR_RACE


def check_kernels(gpu: Gpu, sizes: Sizes, seed: int, ways: tuple[str, ...] = ("plain",)) -> str:
    """`agree` for all cases, with memory poisoned that nothing is written to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        names = []
        for case in cases(sizes, seed):
            agree(gpu, case, ways)
            names.append(case.name)
    finally:
        torch.use_deterministic_algorithms(False)
    return f"{len(names)} inputs, seed {seed}: {', '.join(sorted({name.split()[0].strip(',') for name in names}))}"


def check_offsets(gpu: Gpu, sizes: Sizes, seed: int) -> str:
    """Rows, tables and contexts that begin beyond 2^31 elements give what the same ones near the start give."""
    need = 4 * sizes.offset + 4 * sizes.offset // 4
    if gpu.free_bytes() < need:
        raise Skipped(f"takes {need / 2**30:.0f} GiB of free memory")
    by_name = {case.name.split()[0].strip(","): case for case in reversed([*cases(SMALL, seed)])}
    verify, aligned, drafted = by_name["verify"], by_name["align"], by_name["draft"]
    logits = verify.arguments[0]["target_logits"]
    given = copied(verify.arguments[0], gpu.device) | {"target_logits": _spread(logits, sizes.offset, gpu.device)}
    agree(gpu, verify, given=(given,))
    del given
    far = copied(aligned.arguments, gpu.device)
    agree(gpu, aligned, given=(_spread(aligned.arguments[0], sizes.offset, gpu.device), *far[1:]))
    del far
    batch = copied(drafted.arguments[0], gpu.device)
    agree(gpu, drafted, given=(batch._replace(all_token_ids=_spread(batch.all_token_ids, sizes.offset, gpu.device)),))
    blocks = sizes.offset // (batch.table.shape[1] or 1) // batch.block_size + 1
    far_table = batch.table.new_empty((blocks * batch.block_size + len(batch.table), batch.table.shape[1]))
    far_table[-len(batch.table) :] = batch.table
    moved = batch._replace(table=far_table, block_tables=batch.block_tables + blocks)
    refill(moved.lookups, drafted.arguments[0].lookups)
    agree(gpu, drafted, given=(moved,))
    return f"logits, contexts and a table of more than {sizes.offset} elements"


def _spread(rows: torch.Tensor, elements: int, device: torch.device) -> torch.Tensor:
    """The same rows so far from each other that the last begins behind so many elements."""
    stride = max(-(-elements // (len(rows) - 1) // 16) * 16, rows.shape[1])
    far = torch.empty(stride * (len(rows) - 1) + rows.shape[1], dtype=rows.dtype, device=device)
    return far.as_strided(rows.shape, (stride, 1)).copy_(rows)


def check_sanitizer(gpu: Gpu, seed: int, tools: tuple[str, ...] = ("memcheck", "racecheck")) -> str:
    """Small inputs under compute-sanitizer, in a process of their own."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        raise Skipped("compute-sanitizer isn't installed")
    for tool in tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "vllm_aasd.gpu_check"]
        done = subprocess.run([*command, "--only", "small", "--seed", str(seed)], capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"{tool} exits with {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    return f"no error by {' and '.join(tools)}"
