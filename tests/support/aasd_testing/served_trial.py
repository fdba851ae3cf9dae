"""The served checks of `vllm_aasd.engine.gpu_trial`, on the V2 runner with interpreted kernels, in its own process."""

from aasd_testing.stand_in_gpu import TIMED, StandInGpu, said_by
from vllm_aasd.engine import gpu_trial
from vllm_aasd.engine.v2 import rejection_sampler
from vllm_aasd.gpu_check import speed

_TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_MODEL = _TINY | {"num_key_value_heads": 2, "vocab_size": 512}
_OPTIONS = {
    "max_model_len": 256,
    "block_size": 32,
    "max_num_seqs": 3,
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
}
SIZES = gpu_trial.Served(_MODEL, _MODEL, _OPTIONS, None, (1, 3), 8, 4)
PREEMPTED = SIZES._replace(blocks=9, max_tokens=30)


def served(sizes="SIZES", is_wrong=False):
    """`check_served`, perhaps with a verifier that emits other tokens."""
    stock = rejection_sampler.verify_seeded

    def verify(batch):
        output = stock(batch)
        return output._replace(sampled=(output.sampled + 1).clamp(max=511)) if len(batch.pos) > 3 else output

    rejection_sampler.verify_seeded = verify if is_wrong else stock
    return said_by(lambda: gpu_trial.check_served(globals()[sizes], {"num_speculative_tokens": 4}))


def steady():
    """`check_steady`."""
    return said_by(lambda: gpu_trial.check_steady(SIZES))


def speed_of(least):
    """`check_speed`, with what share of the speed without aasd is enough."""
    return said_by(lambda: gpu_trial.check_speed(SIZES, 1 << 40, least))


def stock_kernels():
    """`check_times` beside vLLM's own kernels."""
    return said_by(lambda: speed.check_times(StandInGpu(), TIMED, gpu_trial.stock_calls))
