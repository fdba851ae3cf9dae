"""A model of how long a step of a target model takes: bytes over bandwidth, operations over arithmetic.

It knows nothing of any implementation but its efficiencies, which are assumptions, and says what an accelerator
allows, not what it was seen to do. For a batch of B requests with c tokens of context each and n tokens in all::

    T(B, n) = overhead + B request_overhead + sum over parts of combine(bytes / bandwidth, operations / arithmetic)

The parts are the layers' matrices (their weights once, 2 operations per weight and token), the attention (every
request's keys and values once a step, whatever is drafted; 4 operations per token, context position, head and
channel) and the lm_head with the sampler (its weights once; each pass over the logits). ``combine`` is the larger
of the two (perfect overlap: the roofline of Williams, Waterman, Patterson, 2009) or their sum (none).
"""

from typing import NamedTuple

import numpy as np

BYTES = 2
"""Of a weight, a key or a value: bfloat16."""

LOGIT_BYTES = 4
"""vLLM's samplers read logits in float32."""


class Target(NamedTuple):
    """The shapes of a target model that step time depends on; a dense decoder with gated feed-forward layers."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the lm_head."""
        return self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token of context, in all layers."""
        return 2 * BYTES * self.layers * self.kv_heads * self.head_size


class Machine(NamedTuple):
    """What the target runs on.

    Attributes:
        name: in tables.
        bandwidth: bytes a second that are reached, efficiency included.
        arithmetic: operations a second that are reached, efficiency included.
        overhead: seconds of every step.
        request_overhead: seconds of a step by request.
        overlap: whether memory and arithmetic overlap fully, or not at all.
        memory: bytes that weights and keys and values may take; None where that isn't asked.
    """

    name: str
    bandwidth: float
    arithmetic: float
    overhead: float = 0.0
    request_overhead: float = 0.0
    overlap: bool = True
    memory: float | None = None


def step_time(
    target: Target,
    machine: Machine,
    num_requests: int,
    num_tokens: np.ndarray | int,
    context: int,
    logit_passes: int,
) -> np.ndarray:
    """Seconds of a decode step.

    Args:
        target, machine: see there.
        num_requests: in the batch.
        num_tokens: in the batch, draft tokens included; any shape.
        context: tokens of each request.
        logit_passes: how often the logits go over the memory's bus.
    """
    tokens = np.asarray(num_tokens, np.float64)
    layers = _combined(machine, BYTES * target.layer_weights + 0 * tokens, 2 * target.layer_weights * tokens)
    operations = 4 * target.layers * target.heads * target.head_size * context * tokens
    attention = _combined(machine, num_requests * context * target.kv_bytes + 0 * tokens, operations)
    logits = logit_passes * LOGIT_BYTES * target.vocab * tokens
    head = _combined(machine, BYTES * target.head_weights + logits, 2 * target.head_weights * tokens)
    return machine.overhead + num_requests * machine.request_overhead + layers + attention + head


def prefill_time(target: Target, machine: Machine, num_tokens: int) -> float:
    """Seconds of arithmetic and memory of one prompt, the lm_head at its last position alone."""
    operations = 2 * target.layer_weights * num_tokens
    # Causal: on average half of the prompt lies before a token.
    operations += 2 * target.layers * target.heads * target.head_size * num_tokens**2
    head = _combined(machine, BYTES * target.head_weights, 2 * target.head_weights)
    return float(_combined(machine, BYTES * target.layer_weights, operations) + head)


def prompt_alignment_time(target: Target, machine: Machine, num_tokens: int) -> float:
    """Seconds more for predictions at every position of a prompt: one lm_head over it, its logits written and read."""
    logits = 2 * BYTES * target.vocab * num_tokens
    operations = 2 * target.head_weights * num_tokens
    return float(_combined(machine, BYTES * target.head_weights + logits, operations))


def most_requests(target: Target, machine: Machine, context: int) -> int:
    """How many requests' keys and values fit beside the weights; the embedding counts as much as the lm_head."""
    weights = BYTES * (target.layer_weights + 2 * target.head_weights)
    return max(int((machine.memory - weights) // (context * target.kv_bytes)), 0)


def _combined(machine: Machine, num_bytes: np.ndarray | float, operations: np.ndarray | float) -> np.ndarray:
    moving, computing = num_bytes / machine.bandwidth, operations / machine.arithmetic
    return np.maximum(moving, computing) if machine.overlap else moving + computing
