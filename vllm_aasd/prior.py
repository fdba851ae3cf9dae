"""Complete the prior of a model: what it predicts outside of any request, for drafts to start from.

    python -m vllm_aasd.prior MODEL [--conversations 1024] [--force] [arguments of vLLM's engine]

A server's first start makes as much of it as a minute allows. This command asks for the rest of the vocabulary, and
then has the model generate conversations, whose text is kept too. The result is written to a cache folder, under a name
derived from the model's content, where a server with method ``aasd`` finds it. On a cluster, run it on each node, or
put ``AASD_CACHE_ROOT`` on a file system that the nodes share.
"""

import argparse
import sys
import tempfile

from vllm_aasd.drafting import own_text
from vllm_aasd.drafting import prior as prior_file
from vllm_aasd.drafting.tensor_file import TensorFileError

DEFAULT_CONVERSATIONS = 1024


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
    parser.add_argument(
        "--conversations",
        type=int,
        default=DEFAULT_CONVERSATIONS,
        metavar="N",
        help="questions that the model writes and answers, to learn from; 0 for the vocabulary alone",
    )
    parser.add_argument("--force", action="store_true", help="begin anew, whatever is there")
    ours, engine_arguments = parser.parse_known_args(arguments)
    if ours.conversations < 0:
        parser.error(f"--conversations {ours.conversations} is not allowed: it takes an integer from 0")

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
            prior = prior_file.load(path, key, vocab_size)
            if (prior.ids[:, 0] >= 0).all() and (prior.texts.size or not ours.conversations):
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
    llm = prior_builder.start(engine)
    prior_builder.ask_for_successors(llm)
    prior = prior_file.load(path, key, vocab_size)
    if not prior.texts.size:
        texts = prior_builder.conversations(llm, ours.conversations, prior_file.NUM_SUCCESSORS)
        prior_file.save(path, own_text.with_texts(prior, texts), key)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
