"""What must not be written down: tokens, keys and passwords in environments, scripts, overrides and diffs."""

from __future__ import annotations

import re
from collections.abc import Mapping

REMOVED = "<removed>"
SECRET_NAME = re.compile(
    r"TOKEN(?!IZER|S)|KEY(?!S)|SECRET|PASS(WORD|WD|PHRASE|$)|PWD$|CREDENTIAL|AUTH|COOKIE|PRIVATE|SIGNATURE|(^|_)PAT$", re.IGNORECASE
)
SECRET_VALUES = (
    re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"),  # user:password of an address
    re.compile(r"(?<=Bearer )[\w.~+/=-]{8,}|(?<=[?&](?:sig|key)=)[^&\s'\"]+|(?<=[?&]token=)[^&\s'\"]+", re.IGNORECASE),
    re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abpr]-|AKIA|ASIA|AIza)[\w-]{8,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),  # JSON web tokens
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)
ASSIGNMENT = re.compile(r"""(?P<name>[A-Za-z_][\w.-]*)(?P<sign>["']?\s*[:=]\s*)(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s"',;)}]+)""")
KEPT = re.compile(  # variables whose values explain a run; of all others only the names are kept
    r"^(PATH|LD_\w+|HOME|LANG|LC_\w+|SHELL|USER|HOSTNAME|VIRTUAL_ENV|LOADEDMODULES|TMPDIR|"
    r"(CONDA|CUDA|NCCL|TORCH|PYTORCH|PYTHON|OMP|MKL|GLOO|UCX|FI|HF|TRANSFORMERS|TOKENIZERS|DS|LAID|SLURM|SBATCH|SRUN|TRITON|XDG|MASTER)_?\w*)$"
)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What may be kept of an environment: values of known variables without a secret in name or value, of all others the name."""
    return {name: redact(value) if KEPT.match(name) and not _is_secret(name) else REMOVED for name, value in sorted(environ.items())}


def redact(text: str) -> str:
    """The text with every value removed that looks like a secret, by its form or by the name that it is given to."""
    for pattern in SECRET_VALUES:
        text = pattern.sub(REMOVED, text)
    return ASSIGNMENT.sub(lambda found: _without_value(found) if _is_literal_secret(found) else found[0], text)


def names_of_secrets(text: str) -> list[str]:
    """Names, or forms, of the secrets that a script spells out."""
    return [match["name"] for match in ASSIGNMENT.finditer(text) if _is_literal_secret(match)] + forms_of_secrets(text)


def forms_of_secrets(text: str) -> list[str]:
    """The same for recipes and overrides, none of whose keys asks for a secret: only the form of a value betrays one."""
    return ["a password or token" for pattern in SECRET_VALUES if pattern.search(text)]


def _without_value(found: re.Match[str]) -> str:
    quote = found["value"][0] if found["value"][0] in "\"'" else ""  # JSON stays JSON
    return f"{found['name']}{found['sign']}{quote}{REMOVED}{quote}"


def _is_literal_secret(found: re.Match[str]) -> bool:
    """`HF_TOKEN=abc` and `token = "abcd1234"` are; `KEY=$OTHER`, `pad_token = 3` and `keys = model.keys()` are not."""
    name, value = found["name"], found["value"]
    bare = value.strip("\"'")
    if not _is_secret(name) or not bare or bare.startswith(("$", "/", "~", "<")):
        return False
    looks_random = bool(re.fullmatch(r"[\w+/=.-]{16,}", bare)) and bool(re.search(r"\d", bare))
    return name.isupper() or looks_random or (bare != value and len(bare) >= 8 and " " not in bare)


def _is_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(name))
