"""Checks of a GPU where there is none: the CPU stands in for it, kernels are interpreted, and faults are planted."""

import contextlib
import dataclasses
import importlib
import time

import torch

from vllm_aasd.gpu_check import kernels, speed
from vllm_aasd.kernels.text import PAGE_SIZE

NONE = kernels.Sizes((), (), (), (1, 1), 1 << 14)
KERNELS = {
    "verify": NONE._replace(verify=((111, torch.bfloat16, [4, 1, 0, 4]),)),
    "align": NONE._replace(align=((5, 111, 3, torch.float32),)),
    "draft": NONE._replace(draft=(((0, 60, 90), 9, 3, 2, 3, 5),)),
    "text": NONE._replace(text=(2, 5)),
}
TIMED = speed.Sizes(((1, 3), (3, 1)), (64, 200), 300, 16)
# By op, the function that computes it, and a tensor of what it gets or gives that is changed afterwards.
WRONG = {
    "verify": ("verify.seeded:verify_seeded", lambda given, output: output.sampled[0, 0].add_(1)),
    "verify state": ("verify.seeded:verify_seeded", lambda given, output: given[0].policies.state.add_(1)),
    "align": ("align:align", lambda given, output: given[3][1:, 1].add_(1)),
    "align, two shards": ("align:align_merge", lambda given, output: given[3][:, -1].add_(2**20)),
    "verify counts": ("verify.seeded:verify_seeded", lambda given, output: given[0].totals[3].add_(1)),
    "draft": ("draft.batch:draft_batch", lambda given, output: given[0].survival.mul_(1.000001)),
    "text": ("text.batch:learn_and_append", lambda given, output: given[0].tokens[PAGE_SIZE // 2 :].add_(1)),
}


@dataclasses.dataclass
class StandInGpu:
    """As `vllm_aasd.gpu_check.gpu.Gpu`: graphs are calls made again, and nothing is compiled or waited for."""

    seconds_factor: float = 1.0
    num_launches: int = 1
    bytes_taken: int = 0
    device = torch.device("cpu")
    compiled: list = dataclasses.field(default_factory=list)

    def describe(self):
        return "a stand-in"

    def synchronize(self):
        pass

    def free_bytes(self):
        return 1 << 30

    def allocated(self):
        self.bytes_taken *= 2
        return self.bytes_taken

    def captured(self, call):
        output = call()
        return output, lambda: kernels.refill(output, call())

    def aside(self, call):
        return call()

    @contextlib.contextmanager
    def no_synchronization(self):
        yield

    def microseconds(self, call):
        begin = time.perf_counter()
        call()
        return self.seconds_factor * (time.perf_counter() - begin)

    host_microseconds = microseconds

    def launches(self, call):
        call()
        return self.num_launches

    def bandwidth(self):
        return 1e12


@contextlib.contextmanager
def wrapped(function, wrap):
    """Have a function of `vllm_aasd.kernels`, as "module:name", replaced by what `wrap` makes of it."""
    module, _, name = function.partition(":")
    owner = importlib.import_module(f"vllm_aasd.kernels.{module}")
    stock = getattr(owner, name)
    users = [owner, *(user for user in (speed,) if getattr(user, name, None) is stock)]
    for user in users:
        setattr(user, name, wrap(stock))
    try:
        yield
    finally:
        for user in users:
            setattr(user, name, stock)


def said_by(call):
    """What a check says, or of its failure."""
    try:
        return "pass", call()
    except AssertionError as error:
        return "fail", str(error)


def kernels_agree(op, wrong=None, ways=("plain",)):
    """`check_kernels` of an op, and a text episode besides; with a fault of `WRONG` planted, if one is named."""

    def wrap(stock):
        def op(*given):
            output = stock(*given)
            WRONG[wrong][1](given, output)
            return output

        return op

    planted = wrapped(WRONG[wrong][0], wrap) if wrong else contextlib.nullcontext()
    with planted:
        return said_by(lambda: kernels.check_kernels(StandInGpu(), KERNELS[op], 5, ways))


def graphs_replay(num_calls):
    """`check_kernels` of alignment by a graph, with a kernel that does nothing after some calls."""

    def wrap(stock):
        calls = []

        def op(*given):
            calls.append(1)
            if len(calls) <= num_calls:
                stock(*given)

        return op

    with wrapped("align:align", wrap):
        return said_by(lambda: kernels.check_kernels(StandInGpu(), KERNELS["align"], 5, ("plain", "graph")))


def offsets_agree(packed=False):
    """`check_offsets`, perhaps with a kernel that takes rows for dense."""

    def wrap(stock):
        return lambda logits, *given: stock(logits.as_strided(logits.shape, (logits.shape[1], 1)), *given)

    with wrapped("align:align", wrap) if packed else contextlib.nullcontext():
        return said_by(lambda: kernels.check_offsets(StandInGpu(), kernels.SMALL, 5))


def measured(check, **gpu):
    """A check of `speed` by its name."""
    further = {"check_times": (lambda step: {"another's": lambda: None},), "check_compilations": ((1, 2),)}
    return said_by(lambda: getattr(speed, check)(StandInGpu(**gpu), TIMED, *further.get(check, ())))


def compiled_late():
    """`check_compilations` with a kernel that is compiled for two requests only."""
    gpu = StandInGpu()

    def wrap(stock):
        def verify(batch):
            if len(batch.idx_mapping) == 2:
                gpu.compiled.append(("late_kernel", 1.0))
            return stock(batch)

        return verify

    with wrapped("verify.seeded:verify_seeded", wrap):
        return said_by(lambda: speed.check_compilations(gpu, TIMED, (1, 2)))
