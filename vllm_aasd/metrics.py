"""The figures of an `LLM` that runs with method ``aasd``, and the dashboard that shows those of a server.

from vllm_aasd import metrics
for metric in metrics.get(llm): ...

python -m vllm_aasd.metrics > aasd.json     # the Grafana dashboard, to be imported there
"""

import argparse
import importlib.resources
import sys
from typing import Any


def get(llm: Any) -> list[Any]:
    """All figures since the engine began to serve, as `LLM.get_metrics` gives vLLM's, with or without statistics on.

    Args:
        llm: a `vllm.LLM`.

    Returns:
        `Counter` and `Histogram` of ``vllm.v1.metrics.reader``, with the names, labels and meanings of README's table (a
        counter's name without ``_total``, as vLLM's). Values are floats.

    Raises:
        ValueError: it doesn't run with method ``aasd``.
    """
    # Here, so that the dashboard doesn't wait for vLLM.
    from vllm_aasd.engine import metrics

    return metrics.collect(llm)


def dashboard() -> str:
    """The Grafana dashboard, as JSON."""
    return importlib.resources.files("vllm_aasd").joinpath("grafana", "aasd.json").read_text()


def main(arguments: list[str] | None = None) -> None:
    """Print the dashboard."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_aasd.metrics", description="Print the Grafana dashboard of method aasd, as JSON."
    )
    parser.parse_args(arguments)
    sys.stdout.write(dashboard())


if __name__ == "__main__":
    main()
