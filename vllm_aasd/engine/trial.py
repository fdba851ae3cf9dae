"""One engine that answers prompts under any of the plugin's request options, for comparing them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_aasd.fields import PREFIX

MAX_NUM_SEQS = 8


class Answer(NamedTuple):
    """One answer and how fast it came.

    Attributes:
        token_ids: of the answer.
        decode_seconds: from the first token to the last.
    """

    token_ids: list[int]
    decode_seconds: float


def engine_arguments(model: str, arguments: list[str], drafting: Mapping[str, Any]) -> EngineArgs:
    """Read vLLM's own arguments from a command line.

    Args:
        model: path or name of the target model.
        arguments: such as ``["--max-num-seqs", "32"]``.
        drafting: further keys of ``--speculative-config``.

    Raises:
        SystemExit: an argument that vLLM doesn't know, or one that isn't to be given here.
    """
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="python -m vllm_aasd.tune"))
    parser.set_defaults(max_num_seqs=MAX_NUM_SEQS, disable_log_stats=False)
    parsed = parser.parse_args(["--model", model, *arguments])
    if parsed.speculative_config is not None:
        parser.error("--speculative-config is what is to be found: give --drafting for keys that all rows share")
    engine = EngineArgs.from_cli_args(parsed)
    engine.speculative_config = {"method": "aasd", **drafting, f"{PREFIX}allow_request_override": "any"}
    return engine


class Trial:
    """An engine with method aasd, in which each request brings its own options.

    Args:
        engine: as from `engine_arguments`.
    """

    def __init__(self, engine: EngineArgs) -> None:
        self._llm = LLM.from_engine_args(engine)
        self.tokenizer = self._llm.get_tokenizer()
        """Of the model, by transformers."""
        self.max_model_len: int = self._llm.llm_engine.model_config.max_model_len
        """Tokens of prompt and answer together."""

    def answer(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        options: Mapping[str, Any],
        sampling: Mapping[str, float],
    ) -> tuple[list[Answer], int]:
        """Answer prompts, as many at once as the engine takes.

        Args:
            prompts: token ids.
            max_tokens: of an answer.
            options: in every request's ``extra_args``.
            sampling: vLLM's parameters; empty for greedy.

        Returns:
            The answers, and how many draft tokens were accepted.
        """
        accepted = self._num_accepted()
        params = [
            SamplingParams(
                **({"temperature": 0.0} | ({**sampling, "seed": seed} if sampling else {})),
                max_tokens=max_tokens,
                detokenize=False,
                extra_args=dict(options),
            )
            for seed in range(len(prompts))
        ]
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        answers = [
            Answer(list(output.outputs[0].token_ids), output.metrics.last_token_ts - output.metrics.first_token_ts)
            for output in outputs
        ]
        return answers, self._num_accepted() - accepted

    def score(self, places: Sequence[tuple[list[int], list[int]]]) -> list[list[tuple[float, float]]]:
        """What the target itself finds of answers.

        Args:
            places: prompt and answer.

        Returns:
            Per answer and token, the token's log-probability in nats and that of the likeliest token there.
        """
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=1,
            detokenize=False,
            extra_args={f"{PREFIX}enabled": False},
        )
        prompts = [{"prompt_token_ids": [*prompt, *answer]} for prompt, answer in places]
        scored = []
        for (prompt, answer), output in zip(places, self._llm.generate(prompts, params, use_tqdm=False), strict=True):
            rows = output.prompt_logprobs[len(prompt) :]
            scored.append(
                [
                    (row[token].logprob, max(entry.logprob for entry in row.values()))
                    for token, row in zip(answer, rows, strict=True)
                ]
            )
        return scored

    def _num_accepted(self) -> int:
        name = "vllm:spec_decode_num_accepted_tokens"
        return sum(metric.value for metric in self._llm.get_metrics() if metric.name == name)
