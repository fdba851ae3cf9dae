"""An engine that answers prompts with any request options of the plugin, to compare them."""

from collections.abc import Mapping, Sequence

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_aasd.config import PREFIX


class Trial:
    """An engine with method aasd and without memory, in which each request brings its own options.

    Args:
        model: path or name of the target model.
        arguments: vLLM's own, such as ``["--max-num-seqs", "32"]``.

    Raises:
        SystemExit: an argument that vLLM doesn't know, or a speculative config.
    """

    def __init__(self, model: str, arguments: list[str]) -> None:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="python -m vllm_aasd.tune"))
        parser.set_defaults(max_num_seqs=8, disable_log_stats=False)
        parsed = parser.parse_args(["--model", model, *arguments])
        if parsed.speculative_config is not None:
            parser.error("--speculative-config is not allowed here; --settings takes the settings to compare")
        engine = EngineArgs.from_cli_args(parsed)
        # Prompts come again and again here: drafts from earlier answers would be right under every rule.
        settings = {f"{PREFIX}allow_request_override": "any", f"{PREFIX}memory": "off"}
        engine.speculative_config = {"method": "aasd", **settings}
        self._llm = LLM.from_engine_args(engine)
        self.tokenizer = self._llm.get_tokenizer()

    def answer(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        options: Mapping[str, object],
        sampling: Mapping[str, float],
    ) -> tuple[list[tuple[list[int], float]], int]:
        """Answer prompts, as many at once as the engine takes.

        Args:
            prompts: token ids.
            max_tokens: of an answer.
            options: of every request, its ``extra_args``.
            sampling: vLLM's parameters; empty for greedy.

        Returns:
            The answers, each as token ids and the seconds from its first token to its last; accepted draft tokens.
        """
        accepted = self._num_accepted()
        params = []
        for seed in range(len(prompts)):
            how = {**sampling, "seed": seed} if sampling else {"temperature": 0.0}
            params.append(SamplingParams(max_tokens=max_tokens, detokenize=False, extra_args=dict(options), **how))
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        answers = [
            (list(one.outputs[0].token_ids), one.metrics.last_token_ts - one.metrics.first_token_ts) for one in outputs
        ]
        return answers, self._num_accepted() - accepted

    def _num_accepted(self) -> int:
        name = "vllm:spec_decode_num_accepted_tokens"
        return sum(metric.value for metric in self._llm.get_metrics() if metric.name == name)
