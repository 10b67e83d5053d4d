"""A model folder before anything of it is loaded: are its files whole, is it a plain model, and does it want code of its own to run?

Whatever is refused here is refused by name, before minutes of loading and never by a question on the terminal.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from huggingface_hub.errors import StrictDataclassError

from laid_ds.files import read_json

POINTER = b"version https://git-lfs.github.com/spec/"
READ_AS_JSON = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for, in this order; an index names the files that together hold the weights."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL = (".json", ".jinja", ".txt", ".model")
PACKED_TYPES = ("U8", "I8", "U4", "I4")  # of matrices: several small numbers, or one that needs a scale


def check_folder(path: str | Path, trust_remote_code: bool = False) -> None:
    """Raises ValueError, naming the file, unless the small files are whole and the folder is a model that runs without code of its own.

    An adapter is refused: from_pretrained would put it on top of the weights without a word, a second time where they hold it already.
    """
    path = Path(path)
    check_no_hub_name(path)
    _check_small_files(path)
    _check_adapter(path)
    own_code = [name for name in READ_AS_JSON if _mentions(_tree(path / name), "auto_map")]
    if own_code and not trust_remote_code:
        raise ValueError(
            f"the model at {path} wants code of its own to run (auto_map in {own_code[0]}): set trust_remote_code = true in the recipe's"
            " [student] or [teacher] to run it, which other commands do not; or, if transformers' own classes serve, remove auto_map"
        )
    method = _quantisation(_tree(path / "config.json"))
    if method is not None:
        raise _quantised(path, f"config.json says {method}")


def check_no_hub_name(path: Path) -> None:
    """Raises ValueError, with what to do, for what looks like a name on the hub: nothing is downloaded here."""
    if HUB_NAME.fullmatch(str(path)) and not path.exists() and not path.parent.is_dir():
        raise ValueError(
            f"no model at {path}: it is no folder here, and nothing is downloaded on the way; if it is a name on the hub,"
            f" `hf download {path} --local-dir models/{path.name}` first, then give models/{path.name}"
        )


def first_paragraph(error: Exception) -> str:
    """What a library says, as one line: its advice follows after an empty one."""
    return " ".join(str(error).strip().split("\n\n")[0].split())


def said_by(error: Exception) -> str:
    """The same for whatever a family's own code raises: behind the error's name where what it says alone is no sentence."""
    plain = isinstance(error, OSError | ImportError | TypeError | ValueError | StrictDataclassError)
    return first_paragraph(error) if plain else f"{type(error).__name__}: {first_paragraph(error)}".removesuffix(": ")


def check_weights(path: str | Path) -> None:
    """Raises ValueError, naming the file, unless every file of weights is there, is as long as its header says, and holds plain numbers."""
    for file in weight_files(Path(path)):
        _refuse_pointer(file)
        if file.suffix == ".safetensors":
            for name, entry in read_header(file).items():
                _check_type(file, name, entry)
        elif _begins(file, b"PK") and not is_zipfile(file):
            raise ValueError(f"{file} is cut: its end is missing; copy it again")


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights, as transformers would choose. Raises ValueError when there are none or one is missing."""
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        raise ValueError(f"the model at {path} cannot be loaded: it has no weights (none of {', '.join(WEIGHTS)}); copy them there")
    if not found.name.endswith(".index.json"):
        return [found]
    _refuse_pointer(found)
    tree = read_json(found, plain=True)
    if not isinstance(tree.get("weight_map"), dict) or not tree["weight_map"]:
        raise ValueError(f"{found} names no files (it has no weight_map); copy it again")
    files = [path / name for name in sorted(set(tree["weight_map"].values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"the model at {path} cannot be loaded: {len(missing)} of {len(files)} files that {found.name} names are missing (first:"
            f" {missing[0]}); copy them there"
        )
    return files


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file. Raises ValueError unless the file is as long as that says."""
    num_bytes = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length <= num_bytes - 8 else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(f"{file} ({num_bytes} bytes) has no safetensors header, or is cut inside it; copy it again") from None
    if num_bytes != needed:
        raise ValueError(f"{file} has {num_bytes} bytes, its header says {needed}; copy it again")
    return header


def _check_small_files(path: Path) -> None:
    for name in READ_AS_JSON:
        if (path / name).is_file():
            _refuse_pointer(path / name)
            read_json(path / name, plain=True)
    for file in (file for pattern in ("*.model", "*.jinja", "*.txt", "*.py") for file in sorted(path.glob(pattern))):
        _refuse_pointer(file)


def _check_adapter(path: Path) -> None:
    if not (path / "adapter_config.json").is_file():
        return
    if (path / "config.json").is_file():
        raise ValueError(
            f"an adapter lies beside the weights at {path} (adapter_config.json), and whether they hold it already cannot be told: if they"
            " do, remove adapter_config.json; if not, merge it first (peft: merge_and_unload(), then save_pretrained)"
        )
    raise ValueError(f"{path} holds an adapter, not a model: merge it into its base (peft: merge_and_unload(), then save_pretrained)")


def _check_type(file: Path, name: str, entry: dict[str, Any]) -> None:
    dtype = str(entry.get("dtype"))
    if dtype.startswith(("F8", "F6", "F4")) or (dtype in PACKED_TYPES and len(entry["shape"]) > 1):
        raise _quantised(file.parent, f"{file.name} holds {name} as {dtype}")


def _quantised(path: Path, sign: str) -> ValueError:
    return ValueError(
        f"the model at {path} is quantised ({sign}): neither training it nor learning from it is known to work here; give the folder with"
        " the plain weights (bfloat16, float16 or float32)"
    )


def _quantisation(config: Any) -> str | None:
    """How a config says that the weights are quantised, at whatever depth."""
    for found in _values(config, "quantization_config", "compression_config"):
        if found:
            return str(found.get("quant_method") or ", ".join(sorted(found))) if isinstance(found, dict) else str(found)
    return None


def copy_beside(stock: Path, folder: Path, code: bool = False) -> None:
    """Everything small that stands beside the weights and that `folder` does not have yet: tokenizer, processor and chat template, as they
    were. code: and the code that a trusted folder runs."""
    for path in sorted(stock.iterdir()):
        small = path.suffix in SMALL + ((".py",) if code else ()) and not path.name.endswith(".index.json")
        if small and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _mentions(tree: Any, key: str) -> bool:
    return any(bool(found) for found in _values(tree, key))


def _values(tree: Any, *keys: str) -> Iterator[Any]:
    """All values of these keys in nested objects."""
    if isinstance(tree, dict):
        yield from (tree[key] for key in keys if key in tree)
        for value in tree.values():
            yield from _values(value, *keys)


def _tree(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds, None where there is none."""
    return read_json(file, plain=True) if file.is_file() else None


def _refuse_pointer(file: Path) -> None:
    if _begins(file, POINTER):
        raise ValueError(f"{file} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository")


def _begins(file: Path, mark: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark
