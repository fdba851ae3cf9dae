"""A private folder that the processes of a server share, for what has no other way between them."""

import atexit
import functools
import logging
import multiprocessing
import os
import shutil
import tempfile

logger = logging.getLogger("vllm.aasd")

# "<pid of the process that made it>:<folder>", for API servers that vLLM starts as children of that process.
VARIABLE = "AASD_SERVER_FOLDER"


@functools.cache
def server_folder() -> str:
    """The folder, which is deleted when the process ends that has asked first; empty if there can't be one."""
    owner, _, folder = os.environ.get(VARIABLE, "").partition(":")
    parent = multiprocessing.parent_process()
    # An inherited variable may also be that of a server that has started another one.
    if parent is None or owner != str(parent.pid):
        try:
            folder = tempfile.mkdtemp(prefix="vllm-aasd-")
        except OSError as error:
            logger.warning(
                "aasd: no metrics on /metrics, and no corpora while serving, since no folder can be created: %s", error
            )
            return ""
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[VARIABLE] = f"{os.getpid()}:{folder}"
    return folder
