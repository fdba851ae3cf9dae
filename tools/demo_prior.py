"""Make the demo model's prior, so that the server drafts at full strength (``make serve``, ``make demo``).

Takes some minutes, once: the model is run over its whole vocabulary. Where it would take long, the server does
without: `make prior` makes it all the same.
"""

import os
import sys

from console import report_errors, run_logged, say
from demo_model import MODEL_PATH
from environment import VENV, only_one_at_a_time

KV_CACHE_GIB = "1"
BEFORE_SERVING = "--before-serving"
PATIENCE_MINUTES = "15"


def is_there() -> bool:
    """Whether the prior of the demo model, as it is on disk, lies where the server will look for it."""
    from vllm_aasd.drafting.prior import cache_path
    from vllm_aasd.engine.model_key import model_key

    key = model_key(str(MODEL_PATH))
    path = cache_path(key) if key is not None else None
    return path is not None and path.exists()


def main() -> None:
    with only_one_at_a_time():
        if is_there():
            return
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)
        os.environ["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-m", "vllm_aasd.prior", str(MODEL_PATH)]
        if BEFORE_SERVING in sys.argv[1:]:
            command += ["--give-up-beyond", PATIENCE_MINUTES]
        run_logged("making the demo model's prior (about ten minutes, once)", command, VENV / "aasd-prior.log")
        say("the prior is ready" if is_there() else "this machine is too slow to make the prior now: serving without")


if __name__ == "__main__":
    report_errors(main)
