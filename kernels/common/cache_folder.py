"""Where what was computed once is kept between runs."""

import os


def cache_folder() -> str:
    """``vllm_aasd`` in ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "vllm_aasd")
