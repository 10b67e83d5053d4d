"""What tells one model folder from another: by content, not by name or time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from laid_ds.models.folder import read_header, weight_files

PIECE = 4096
OF_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OF_PROCESSOR += ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.json", "chat_template.jinja")


def model_identity(path: Path) -> str:
    """sha256 of config.json and, of each file of weights, its size, header and the first 4 KiB of every tensor: reading all of a large
    model would take minutes. A change deep inside a tensor alone is not seen; training and quantising change all of them. Files of other
    kinds than safetensors are read whole."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in weight_files(path):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as opened:
            if file.suffix != ".safetensors":
                digest.update(hashlib.file_digest(opened, "sha256").digest())
                continue
            header = read_header(file)
            digest.update(json.dumps(header, sort_keys=True).encode())
            first = 8 + int.from_bytes(opened.read(8), "little")
            for begin, end in sorted(entry["data_offsets"] for entry in header.values()):
                opened.seek(first + begin)
                digest.update(opened.read(min(PIECE, end - begin)))
    return digest.hexdigest()


def processor_identity(path: Path) -> str:
    """sha256 of the files that decide what a sample becomes."""
    digest = hashlib.sha256()
    for name in OF_PROCESSOR:
        if (path / name).is_file():
            digest.update(f"{name} {(path / name).stat().st_size}".encode() + (path / name).read_bytes())
    return digest.hexdigest()
