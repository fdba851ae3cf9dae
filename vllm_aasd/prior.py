"""Complete the prior of a model: what it predicts outside of any request, for drafts to start from.

    python -m vllm_aasd.prior MODEL [--force] [arguments of vLLM's engine]

A server's first start makes as much of it as a minute allows. This command asks for the rest of the vocabulary. The
result is written to a cache folder, under a name derived from the model's content, where a server with method ``aasd``
finds it. On a cluster, run it on each node, or put ``AASD_CACHE_ROOT`` on a file system that the nodes share.
"""

import argparse
import sys
import tempfile

from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting.tensor_file import TensorFileError


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with a message, if the model's files or the arguments can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_aasd.prior",
        description="Complete the prior of a model, which drafts of method aasd start from.",
        epilog="All other arguments are those of vLLM's engine, such as --tensor-parallel-size 2.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="path or name of the target model")
    parser.add_argument("--force", action="store_true", help="begin anew, whatever is there")
    ours, engine_arguments = parser.parse_known_args(arguments)

    # Here, so that --help doesn't wait for vLLM.
    from vllm_aasd.engine import prior_builder
    from vllm_aasd.engine.model_key import model_key

    engine = prior_builder.engine_arguments(ours.model, engine_arguments)
    key = model_key(engine.model, engine.revision)
    if key is None:
        sys.exit(f"error: the files of {ours.model!r} are not on this machine; download the model first")
    path = prior_file.cache_path(key)
    if path is None:
        sys.exit("error: no folder to keep the prior in: set AASD_CACHE_ROOT to an absolute path")
    vocab_size = engine.create_model_config().get_vocab_size()
    if not ours.force:
        try:
            if (prior_file.load(path, key, vocab_size).ids[:, 0] >= 0).all():
                print(f"there already: {path}")
                return
        except FileNotFoundError:
            pass
        except TensorFileError as error:
            sys.exit(f"error: {error}; --force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Before the work, not after it.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if ours.force:
            path.unlink(missing_ok=True)
    except OSError as error:
        sys.exit(f"error: {path.parent} can't be written to ({error}): set AASD_CACHE_ROOT")
    prior_builder.ask_for_successors(engine)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
