"""Say whether ``method: aasd`` can work in this environment, and on which of vLLM's model runners.

    python -m vllm_aasd.doctor

Checks the version of the installed vLLM and every function of it that vllm-aasd replaces, and says where files are
kept. Serves nothing, and makes no more than an empty cache folder. Exits with 1 if aasd can't work.
"""

import argparse
import sys

from vllm_aasd import __version__


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: 1 aasd can't work with what is installed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_aasd.doctor", description="Check that method aasd can work in this environment."
    )
    parser.parse_args(arguments)
    try:
        from vllm_aasd.engine import diagnosis
    except ImportError as error:
        sys.exit(f"vllm-aasd {__version__}: vLLM can't be imported ({error}); install vllm-aasd[cuda] or [cpu]")
    lines, works = diagnosis.diagnose()
    print("\n".join(lines))
    sys.exit(0 if works else 1)


if __name__ == "__main__":
    main()
