"""Say whether ``method: aasd`` can work in this environment, and on which of vLLM's model runners.

    python -m vllm_aasd.doctor

Looks at the vLLM that is installed: its version, and every symbol and signature that this version of vllm-aasd relies
on, the same list that a worker checks before it starts; and where it keeps files. Nothing is served, and no more than
an empty cache folder is made. Exits with 1 where aasd can't work.
"""

import argparse
import sys

from vllm_aasd import __version__


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: 1 where aasd can't work with what is installed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_aasd.doctor", description="Check that method aasd can work in this environment."
    )
    parser.parse_args(arguments)
    try:
        from vllm_aasd.engine import diagnosis
    except ImportError as error:
        sys.exit(f"vllm-aasd {__version__}: vLLM can't be imported ({error}); install vllm-aasd[cuda] or [cpu]")
    found = diagnosis.diagnose()
    print("\n".join(found.lines))
    sys.exit(0 if found.works else 1)


if __name__ == "__main__":
    main()
