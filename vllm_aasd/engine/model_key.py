"""Names the content of a model, so that what was learned from one model is never used for another."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_OTHERS = {
    "config.json",
    "chat_template.jinja",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
# Weights are sampled, since hashing hundreds of GB would take too long.
_SAMPLE_BYTES = 1 << 20


def model_key(model: str, revision: str | None = None) -> str | None:
    """Name the content of a model by its configuration, tokenizer and weights.

    Of each weight file, the name, the size and three megabytes (begin, middle, end) count; other files count in full.

    Args:
        model: a folder, a file (GGUF), or a name on the hub whose files are in the local cache.
        revision: of a name on the hub.

    Returns:
        32 hexadecimal digits; None if the files aren't on this machine.
    """
    path = Path(model)
    try:
        if not path.exists():
            path = Path(snapshot_download(model, revision=revision, local_files_only=True))
        files = [path] if path.is_file() else sorted(path.iterdir())
        files = [file for file in files if file.suffix in _WEIGHTS or file.name in _OTHERS]
        if not any(file.suffix in _WEIGHTS for file in files):
            return None
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as content:
                if file.name in _OTHERS or size <= 3 * _SAMPLE_BYTES:
                    digest.update(content.read())
                    continue
                for start in (0, size // 2, size - _SAMPLE_BYTES):
                    content.seek(start)
                    digest.update(content.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:32]
    except (OSError, LocalEntryNotFoundError, HFValidationError):
        return None
