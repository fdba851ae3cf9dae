"""Seeded requests in the midst of their prompts, on vLLM's V1 model runner where it runs on a CPU.

The runner samples for every request of a batch, and throws away what it drew for those whose prompts aren't read to
the end. Their generators have moved on by then, so it winds them back by their offset; a CPU's generator has none, and
the engine dies of it, with speculation or without, as soon as a seeded request's prompt comes in two chunks. A generator
that isn't asked needs no winding back.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def set_aside(runner: Any) -> Iterator[None]:
    """While it lasts, the runner has no generators on a CPU for requests whose samples it will throw away.

    Args:
        runner: vLLM's, between its forward pass and its sampling.
    """
    generators = runner.input_batch.generators
    resting = {
        row: generator
        for row, generator in generators.items()
        if generator.device.type == "cpu" and runner.discard_request_mask.np[row]
    }
    for row in resting:
        del generators[row]
    try:
        yield
    finally:
        generators.update(resting)
