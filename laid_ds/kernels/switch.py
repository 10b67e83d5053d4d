"""Which implementation of a kernel runs: each package has the same function in reference.py, chunked.py and fused.py.

"auto" takes a fused kernel only after it has given what the chunked one gives on a small problem, on this device, in this dtype, with these
heads, in this process: a compiler, a driver or a card that nobody has tried may make it wrong, and a wrong gradient looks like training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "chunked", "fused")
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 2e-3}
"""What two implementations may differ by, as a share of the largest entry: a few roundings of the inputs' dtype."""

log = logging.getLogger(__name__)


class Trial(NamedTuple):
    """A small problem that runs the code of a large one."""

    key: Hashable
    """All that decides which code a fused kernel is: device, dtypes, heads, masks."""
    what: str
    """Dtype and heads, for people."""
    dtype: torch.dtype
    """The coarsest of the inputs', or float64, which no fused kernel takes."""
    run: Callable[[Callable], dict[str, Tensor]]
    """function -> its results on the small problem, by name; floating point."""


_mismatches: dict[Hashable, str] = {}
_used: dict[str, str] = {}


def choose(package: str, function: str, implementation: str, device: torch.device, trial: Trial) -> Callable:
    """The function for `implementation`, to be called inside `exactly_on`; "auto" is fused where it can run and gives what chunked gives,
    else chunked."""
    if implementation == "auto":
        fits = can_be_fused(device) and trial.dtype in TOLERANCES
        implementation = "fused" if fits and _agrees(package, function, trial, device) else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}: expected 'auto', {', '.join(map(repr, IMPLEMENTATIONS))}")
    note(function, implementation)
    return load(package, function, implementation)


def load(package: str, function: str, implementation: str) -> Callable:
    return getattr(import_module(f"{package}.{implementation}"), function)


def can_be_fused(device: torch.device) -> bool:
    """Whether Triton can run there at all."""
    return device.type == "cuda" and find_spec("triton") is not None


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """How far each result is from the wanted one, as a share of the latter's largest entry; NaN counts as infinitely far."""
    shares = {}
    for name, want in wanted.items():
        want, got = want.detach().double(), found[name].detach().double()
        share = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)) if want.numel() else 0.0
        shares[name] = share if share == share else float("inf")
    return shares


def mismatch(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> str:
    """What differs most and by how much, or "" where all is within the tolerance."""
    shares = differences(found, wanted)
    worst = max(shares, key=shares.__getitem__)
    return "" if shares[worst] <= tolerance else f"{worst} is off by {shares[worst]:.2g} of its largest entry, {tolerance:g} is allowed"


def _agrees(package: str, function: str, trial: Trial, device: torch.device) -> bool:
    """Whether the fused kernel passes its trial; a failure is told of once."""
    key = (package, trial.key)
    if key not in _mismatches:
        _mismatches[key] = _tried(package, function, trial)
        if _mismatches[key]:
            log.warning(
                f"laid: the fused kernel of {function} is not used on {_name(device)} for {trial.what}: {_mismatches[key]};"
                " the chunked one goes on (`laid doctor` looks closer)"
            )
    return not _mismatches[key]


@torch.inference_mode(False)
@torch.enable_grad()
def _tried(package: str, function: str, trial: Trial) -> str:
    wanted = trial.run(load(package, function, "chunked"))
    try:
        found = trial.run(load(package, function, "fused"))
    except Exception as error:  # whatever the compiler or the driver says: it is told, and chunked serves
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
    return mismatch(found, wanted, TOLERANCES[trial.dtype])


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def exactly_on(device: torch.device) -> Iterator[None]:
    """Inside the block the device is the current one, where Triton launches, and no autocast lowers the precision of sums."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.autocast(device.type, enabled=False):
        yield


def note(what: str, which: str) -> None:
    """Remember which kernel served."""
    _used[what] = which


def used() -> dict[str, str]:
    """What has served in this process so far, by what it computes; the last one for each."""
    return dict(_used)
