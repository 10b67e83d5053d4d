"""What a run tells: metrics.jsonl (one object per step), one line per step on the console, TensorBoard or W&B when asked for."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from laid_ds.config import Logging
from laid_ds.disk import writing
from laid_ds.files import read_json_lines
from laid_ds.runtime import distributed
from laid_ds.terminal import working

MOST_SECONDS = 60  # between two lines on the console, whatever logging.every_steps says
LABELS = {"align": "align", "match": "match", "kl": "kl", "sft": "ce"}


class Reporter:
    """Writes on rank 0 only; on other ranks every call is empty."""

    def __init__(
        self,
        output: Path,
        steps: int,
        options: Logging,
        active: bool,
        run: dict[str, Any],
        flops: Callable[[float, float, float | None], float] | None = None,
    ):
        """flops: of a step of so many samples and tokens over all ranks, and tokens of a teacher that reads others, for the MFU; None
        leaves it out."""
        self.output, self.steps, self.options, self.active, self.flops = output, steps, options, active, flops
        self.console = Console(quiet=not active)
        self.progress = _progress(self.console) if self.console.is_terminal else None
        self.sinks = _sinks(output, options, run) if active else []
        self.started = self.last = self.told = time.monotonic()

    def start(self, step: int) -> None:
        """Begin at `step`; lines of metrics.jsonl from there on belong to a continuation that was abandoned and are dropped."""
        self.started = self.last = self.told = time.monotonic()
        self.first_step = step
        if self.active:
            keep_until(self.output / "metrics.jsonl", step)
        if self.progress:
            self.progress.start()
            self.task = self.progress.add_task("", total=self.steps, completed=step)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Record step (1-based, just finished). `values`: term means, counts, learning rate, gradient norm, sample keys."""
        if not self.active:
            return
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        record = {"step": step} | values | {"seconds": round(seconds, 4), "peak_bytes": peak_bytes()} | self._utilisation(values, seconds)
        with writing(self.output, "metrics.jsonl"), (self.output / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        for sink in self.sinks:
            sink(step, {name: value for name, value in record.items() if isinstance(value, int | float)})
        if step % self.options.every_steps == 0 or step == self.steps or now - self.told >= MOST_SECONDS:
            self.told = now
            self.say(self._line(step, record, seconds))
        if self.progress:
            self.progress.update(self.task, completed=step, description=f"loss {record['loss']:.4g}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def working(self, label: str) -> AbstractContextManager[Callable[[int], None]]:
        """Tell of something long between the steps, where no bar is shown already."""
        return working(label, active=self.active and not self.progress)

    def stop(self) -> None:
        if self.progress:
            self.progress.stop()

    def _line(self, step: int, record: dict[str, Any], seconds: float) -> str:
        terms = "  ".join(f"{label} {record[term]:.4g}" for term, label in LABELS.items() if term in record)
        per_step = (time.monotonic() - self.started) / max(1, step - self.first_step)
        remaining = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.steps - step)))
        rates = f"{record['tokens'] / seconds:,.0f} tokens/s  {record['images'] / seconds:,.0f} images/s"
        rates += f"  fill {record['fill']:.0%}" if "fill" in record else ""
        used = f"{record['peak_bytes'] / 2**30:.2f} GiB" + (f"  MFU {record['mfu']:.1%}" if "mfu" in record else "")
        loss = f"loss {record['loss']:.4g}  {terms}  |g| {record['gradient_norm']:.3g}"
        return f"step {step}/{self.steps}  {loss}  {rates}  {used}  {remaining} left"

    def _utilisation(self, values: dict[str, Any], seconds: float) -> dict[str, float]:
        if self.flops is None:
            return {}
        peak = self.options.peak_tflops * 1e12 * distributed.world_size()
        computed = self.flops(values["samples"], values["tokens"], values.get("teacher_tokens"))
        return {"mfu": round(computed / seconds / peak, 4)}


def peak_bytes() -> int:
    """Most memory that this rank has used: allocated on its GPU, or of its process where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_until(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`."""
    if path.is_file():
        kept = [record for record in read_json_lines(path) if record["step"] <= step]
        partial = path.with_name(path.name + ".partial")
        with writing(path.parent, path.name):
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(partial, path)


def _progress(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)


def check_loggers(options: Logging) -> None:
    """Raises ValueError when a logger that was asked for is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(options, name) and find_spec(name) is None:
            raise ValueError(f"logging.{name} needs the extra: pip install 'laid-ds[{name}]'")


def _sinks(output: Path, options: Logging, run: dict[str, Any]) -> list[Any]:
    """Functions (step, values) for the loggers that were asked for. Raises ValueError when one is not installed."""
    check_loggers(options)
    sinks = []
    if options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(output / "tensorboard"))
        sinks.append(lambda step, values: [writer.add_scalar(name, value, step) for name, value in values.items()])
    if options.wandb:
        import wandb

        board = wandb.init(project="laid", name=run["name"], config=run, dir=str(output), resume="allow")
        sinks.append(lambda step, values: board.log(values, step=step))
    return sinks
