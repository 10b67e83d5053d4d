"""DeepSpeed: a training engine (student beside Align) and an optimizer-less engine (frozen teacher). The only place that imports it.

The JSON files hold mechanics; learning rate, batch, clip and precision come from the run and are refused in the JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laid_ds.config import Run
from laid_ds.files import line_of, read_json, read_text

RUN_KEYS = {
    "train_batch_size": "data.micro_batch and optimizer.accumulation",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "optimizer.accumulation",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "[optimizer]",
    "scheduler": "[optimizer]",
    "bf16": "dtype",
    "fp16": "dtype",
}


def start_processes(wait_seconds: float | None = None) -> None:
    """Join the process group that the launcher described, and take this rank's GPU.

    Raises ValueError when there is no launcher, when a rank has no GPU of its own, and when the others do not come in `wait_seconds`
    (default: DeepSpeed's half hour), which no later message may take, either.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"no launcher: {', '.join(missing)} not set; start with `laid train RECIPE` or `deepspeed --module laid_ds.train RECIPE`"
        )
    choose_accelerator()
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # the one that was just taken
    import deepspeed

    for handler in deepspeed.utils.logger.handlers:  # stdout is for what a command was asked for
        handler.setStream(sys.stderr)
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # the op serves inference only; building it takes minutes of g++
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    patience = {} if wait_seconds is None else {"timeout": timedelta(seconds=wait_seconds)}
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, **patience)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"the {os.environ['WORLD_SIZE']} ranks cannot meet at {place} ({str(error).splitlines()[0]}); is the port in use, or were fewer"
            " ranks started?"
        ) from None


def _take_gpu(local_rank: int) -> None:
    """Before any message: NCCL refuses two ranks on one GPU, and until a rank chooses, the first is everyone's."""
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"LOCAL_RANK is {local_rank}, but {gpus} GPU(s) can be used here: start at most {gpus} ranks on this machine")
    torch.cuda.set_device(local_rank)


def compiled_on_use() -> dict[str, str]:
    """DeepSpeed's own operations that an engine file of ds_configs/ may ask for, and whether each is built, could be, or could not.

    All others are left alone: the optimizer is torch's, buffers are pinned by torch. Raises ImportError when DeepSpeed cannot be imported.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = AsyncIOBuilder()
    if Path(_get_build_directory(builder.name, verbose=False), f"{builder.name}.so").is_file():
        return {builder.name: "built"}
    return {builder.name: "could be" if builder.is_compatible(verbose=False) else "could not"}


def choose_accelerator() -> None:
    """Tell DeepSpeed to use the CPU where there is no GPU, before it is imported and guesses with a warning."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def read_deepspeed(path: Path, dtype: str, run: Run, trains: bool) -> dict[str, Any]:
    """The engine config: the JSON's mechanics with the run's values filled in. Raises ValueError for a missing file or a key of the run."""
    if not path.is_file():
        raise ValueError(f"no DeepSpeed config at {path}; ready ones are in ds_configs/")
    config = read_json(path)
    for key in RUN_KEYS:
        if key in config:
            raise ValueError(f"{path} sets {key!r}, which belongs to the recipe ({RUN_KEYS[key]}); remove it from the JSON")
    _refuse_auto(path, config)
    config["train_micro_batch_size_per_gpu"] = run.data.micro_batch
    config["bf16"] = {"enabled": dtype == "bfloat16"}
    if trains:
        config["gradient_accumulation_steps"] = run.optimizer.accumulation
        config["gradient_clipping"] = run.optimizer.clip
        config["zero_allow_untested_optimizer"] = True
    return config


def _refuse_auto(path: Path, tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if value == "auto":
            line = line_of(read_text(path), key)
            raise ValueError(
                f'{path}, line {line}: {key!r} is "auto", which transformers\' Trainer alone fills in; give a value or leave it out'
            )
        if isinstance(value, dict):
            _refuse_auto(path, value)


def parameter_groups(student: nn.Module, run: Run) -> list[dict[str, Any]]:
    """Model, mixture and gain with their own learning rates; no weight decay on the last two. Empty and frozen groups are left out."""
    groups = {
        "model": ([p for name, p in student.named_parameters() if name.startswith("model.")], run.optimizer.lr, run.optimizer.weight_decay),
        "mixing": (_aligned(student, ("mixing", "key_mixing", "projections")), run.optimizer.mixing_lr, 0.0),
        "gain": (_aligned(student, ("gain",)), run.optimizer.gain_lr, 0.0),
    }
    for parameters, lr, _ in groups.values():
        if lr == 0:
            for parameter in parameters:
                parameter.requires_grad_(False)
    trained = {name: ([p for p in parameters if p.requires_grad], lr, decay) for name, (parameters, lr, decay) in groups.items()}
    return [
        {"name": name, "params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for name, (parameters, lr, decay) in trained.items()
        if parameters
    ]


def _aligned(student: nn.Module, parts: tuple[str, ...]) -> list[nn.Parameter]:
    return [p for name, p in student.named_parameters() if name.startswith("align.") and name.split(".")[1] in parts]


def training_engine(student: nn.Module, run: Run, config: dict[str, Any]):
    """The student's engine in training mode, with torch's AdamW (DeepSpeed's own would be compiled on first use)."""
    import deepspeed

    optimizer = torch.optim.AdamW(parameter_groups(student, run), betas=run.optimizer.betas)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    engine.train()
    return engine


def teacher_engine(teacher: nn.Module, config: dict[str, Any]):
    """The frozen teacher's engine: parameters sharded, no optimizer, no gradient."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    engine.eval()
    return engine


def sharded_config(dtype: str) -> dict[str, Any]:
    """Mechanics of a model that is only read: ZeRO-3 over all ranks. Nothing is fetched ahead: reading a prompt and saying a token run
    other modules, and what was recorded of one would be wrong for the other."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 1e5, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 1_000_000}
    return {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == "bfloat16"}}


def set_learning_rate(engine, factor: float) -> None:
    """Every group's learning rate = its base rate x factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def checkpoint_weights(saved: Path) -> dict[str, torch.Tensor]:
    """All fp32 weights of a checkpoint under the names of distill.Student, put together from the ranks' shards on one CPU."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _silence():
        return get_fp32_state_dict_from_zero_checkpoint(str(saved.parent), tag=saved.name)


def write_universal(saved: Path, target: Path) -> None:
    """Rewrite a ZeRO-3 checkpoint as files of whole parameters and optimizer states, which any number of ranks can load."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(saved),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with _silence():
        ds_to_universal.main(options)


@contextmanager
def _silence() -> Iterator[None]:
    """DeepSpeed's tools print what they do, line by line."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def load_universal(engine, saved: Path) -> None:
    """Load what `write_universal` wrote. Collective.

    DeepSpeed gives every parameter group the hyper-parameters of the first one, and all of them one shared `step` tensor, which AdamW
    then raises once per group; both are put right here.
    """
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(saved.parent), tag=saved.name)
    engine._config.load_universal_checkpoint = False
    optimizer = torch.load(saved / "zero" / "optimizer_state.pt", weights_only=False, mmap=True)["optimizer_state_dict"]
    for group, theirs in zip(engine.optimizer.param_groups, optimizer["param_groups"], strict=True):
        group.update({name: value for name, value in theirs.items() if name != "params"})
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


@contextmanager
def whole(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block, parameters of which each rank holds a share are whole on every rank. Collective."""
    import deepspeed

    shared = [parameter for parameter in parameters if parameter.numel() < getattr(parameter, "ds_numel", 0)]
    with deepspeed.zero.GatheredParameters(shared, enabled=bool(shared)):
        yield


def sharded_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters that this rank holds between steps."""
    return sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in module.parameters())
