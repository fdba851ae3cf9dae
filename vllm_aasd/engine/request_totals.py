"""What relaxed acceptance came to in one request, on its way from the verifier to the answer.

vLLM tells each answer's drafts where ``--per-request-spec-decode-metrics`` asks for it. Beside them stand then
``aasd_relaxed_tokens`` and ``aasd_regret_nats``, from three processes: the worker adds up a step by request and puts it
beside the runner's output (`StepTotals`), the engine's scheduler adds up the steps
(`vllm_aasd.engine.scheduler`), and the front end joins the sums to vLLM's own figures (`install`). vLLM's messages have
no room for them, so between the last two they travel in ``kv_transfer_params`` of a request's last output, and are taken out
before anybody reads it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_aasd.engine import patching
from vllm_aasd.engine.failsafe import Faults

_BESIDE = "aasd_request_totals"


class Totals(NamedTuple):
    """Of one request.

    Attributes:
        relaxed_tokens: draft tokens that only the relaxed rule accepted.
        regret_nats: the log-probability that they cost, see `vllm_aasd.kernels.verify`.
    """

    relaxed_tokens: int = 0
    regret_nats: float = 0.0

    def plus(self, other: "Totals") -> "Totals":
        """Both together."""
        return Totals(self.relaxed_tokens + other.relaxed_tokens, self.regret_nats + other.regret_nats)


class StepTotals:
    """Adds up one step by request, in the worker; on a GPU without waiting for it.

    Args:
        faults: of the worker; what fails here is a fault of ``metrics``.
    """

    def __init__(self, faults: Faults) -> None:
        self._contained = faults.contained("metrics")
        self._step: torch.Tensor | None = None

    def add(
        self, cu_num_rows: torch.Tensor, num_emitted: torch.Tensor, relaxed: torch.Tensor, regret: torch.Tensor
    ) -> None:
        """Take in what a step's verification came to.

        Args:
            cu_num_rows: ``[num_reqs + 1]`` integer, the bounds of each request's rows, from 0.
            num_emitted: ``[num_reqs]`` integer, emitted tokens, of which the last isn't a draft.
            relaxed: ``[num_rows]`` bool, as the verifier tells of each draft, accepted or not.
            regret: ``[num_rows]`` float32, nats.
        """
        rows = torch.stack([relaxed.double(), torch.where(relaxed, regret, 0.0).double()])
        sums = torch.nn.functional.pad(rows.cumsum(1), (1, 0))
        first = cu_num_rows[:-1].long()
        step = sums[:, first + (num_emitted - 1).clamp(min=0)] - sums[:, first]
        # vLLM waits for its own copy of the tokens, which begins later, before it reads the output.
        self._step = step.to("cpu", non_blocking=True)

    def beside(self, output: Any) -> Any:
        """The output of the runner with the step's totals beside it; as it is where there is nothing to tell.

        Args:
            output: what the runner's ``sample_tokens`` returned.
        """
        step, self._step = self._step, None
        if step is None or output is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _LaterOutput(output, functools.partial(self._put, step))
        self._put(step, output)
        return output

    def _put(self, step: torch.Tensor, output: ModelRunnerOutput) -> None:
        with self._contained:
            relaxed, regret = step.tolist()
            # Ranks that sample for a part of the batch don't know whose rows they have seen.
            if len(relaxed) == len(output.req_ids):
                totals = {
                    req_id: Totals(int(count), nats)
                    for req_id, count, nats in zip(output.req_ids, relaxed, regret, strict=True)
                    if count
                }
                setattr(output, _BESIDE, totals)


class _LaterOutput(AsyncModelRunnerOutput):
    def __init__(self, output: AsyncModelRunnerOutput, put: Callable[[ModelRunnerOutput], None]) -> None:
        self._output, self._put = output, put

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        self._put(output)
        return output


def by_request(output: ModelRunnerOutput) -> dict[str, Totals]:
    """The totals beside a runner's output, by request id; requests without any relaxed token are left out."""
    return getattr(output, _BESIDE, {})


def send(output: EngineCoreOutput, totals: Totals) -> None:
    """Put a request's totals into its last output."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), _BESIDE: list(totals)}


def receive(output: EngineCoreOutput) -> None:
    """Take them out again, and join them to vLLM's own figures of the request."""
    params = dict(output.kv_transfer_params)
    totals = Totals(*params.pop(_BESIDE))
    output.kv_transfer_params = params or None
    if output.spec_decode_metrics is not None:
        output.spec_decode_metrics = RequestMetrics(
            **vars(output.spec_decode_metrics),
            aasd_relaxed_tokens=totals.relaxed_tokens,
            aasd_regret_nats=totals.regret_nats,
        )


@dataclasses.dataclass
class RequestMetrics(RequestSpecDecodeMetrics):
    """vLLM's figures of a request's drafts, and ours."""

    aasd_relaxed_tokens: int = 0
    aasd_regret_nats: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As vLLM's, with ours behind."""
        return {
            **super().to_dict(),
            "aasd_relaxed_tokens": self.aasd_relaxed_tokens,
            "aasd_regret_nats": self.aasd_regret_nats,
        }


def install() -> list[patching.Replacement]:
    """Have the front end receive the totals; does nothing where it does already.

    Returns:
        What was replaced, to be undone.

    Raises:
        SeamError: if vLLM isn't as we know it; nothing was replaced then.
    """
    return patching.replace({patching.PROCESS_OUTPUTS: _receiving})


def _receiving(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def process_outputs(
        self: OutputProcessor, engine_core_outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            if output.kv_transfer_params and _BESIDE in output.kv_transfer_params:
                receive(output)
        return stock(self, engine_core_outputs, *args, **kwargs)

    return process_outputs
