"""One full training step of all of LAid beside a knowledge-distillation step of the usual trainers.

python -m benchmarks.train_step --tokens 4096 --json
python -m benchmarks.train_step --tokens 4096 --device cuda --json     larger models, in bfloat16, on a GPU

Arms: `laid` (every term of the loss, every layer compared) on a plain AdamW loop and in DeepSpeed's ZeRO-3 engines, TRL's GKDTrainer
(KL alone) and transformers' Trainer with cross-entropy + KL. All train the same two random Qwen2 models in one dtype on the same tokens,
7 of 8 supervised, with the same AdamW and clip; each run is a process of its own (on the CPU in fp32 with one thread), and the arms take
turns. Seconds are the CPU's, or those until the GPU has finished, of a step without the loading of data; added bytes are the peak of a
whole run beyond what was resident just before training (for our engines: before they were built). Needs `pip install .[bench]`, which
`make bench` does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from benchmarks import measure

DEVICE = os.environ.get("LAID_BENCH_DEVICE", "cpu")
ON_GPU = DEVICE == "cuda"
VOCABULARY, LAYERS, HEADS, KEY_HEADS = (32768, 8, 16, 4) if ON_GPU else (8192, 4, 4, 2)
HIDDEN = {"student": 1024, "teacher": 2048} if ON_GPU else {"student": 128, "teacher": 256}
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TIME, RATIO = ("gpu_seconds", "gpu_ratio") if ON_GPU else ("cpu_seconds", "cpu_ratio")
ENGINE = Path(__file__).resolve().parents[1] / "ds_configs" / ("zero3_student.json" if ON_GPU else "zero3_cpu.json")
LR, CLIP = 1e-4, 1.0
PACKAGES = ("transformers", "trl", "datasets", "accelerate", "deepspeed")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
OF_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

Finish = Callable[[], None]


def model(who: str, hidden: int | None = None):
    """A random Qwen2 language model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(len(who))
    hidden = hidden or HIDDEN[who]
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, use_cache=False, tie_word_embeddings=False, **sizes)
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config).to(DEVICE, DTYPE)


def sample(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels [1, T]; the first eighth is a prompt without loss."""
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, : tokens // 8] = -100
    return ids, labels


class Meter:
    """Seconds of each step, of the CPU or until the GPU has finished, and memory beyond what the process held when the meter was made."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[dict[str, float]] = []
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
            self.before = measure.status_mb("VmRSS")

    def begin(self) -> None:
        self.began = self._now()

    def end(self) -> None:
        self.seconds.append(self._now() - self.began)

    def _now(self) -> float:
        if ON_GPU:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def report(self) -> dict:
        peak = torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else measure.status_mb("VmHWM")
        return {
            TIME: statistics.median(self.seconds[1:]),  # the first step warms up
            "added_bytes": round((peak - self.before) * 2**20),
            "peak_bytes": round(peak * 2**20),
            "losses": self.losses,
        }


def laid(tokens: int, steps: int, engines: bool) -> dict:
    """All of LAid: cross-entropy, KL, head alignment and attention matching of every layer, gains on."""
    from laid_ds.config import Run
    from laid_ds.data.batch import Batch
    from laid_ds.method import schedule
    from laid_ds.method.align import Align, layer_pairs
    from laid_ds.method.distill import Student, Teacher, train_step
    from laid_ds.models.attention import Tap, attention_shape, listen
    from laid_ds.models.rope_gain import responder

    kind = str(DTYPE).removeprefix("torch.")
    place = {"path": "random", "dtype": kind, "deepspeed": ENGINE}
    optimizer = {"lr": LR, "mixing_lr": LR, "gain_lr": LR, "betas": (0.9, 0.999), "clip": CLIP}
    run = Run.model_validate(
        {"name": "bench", "output": "none", "steps": steps, "student": place, "teacher": place, "data": {"shards": ["none"]}}
        | {"optimizer": optimizer, "align": {"pairs": "proportional"}, "losses": {"align": 1.0, "match": 1.0}}
        | {"match": {"omega": "frontier"}, "gain": {"enabled": True}}
    )
    pupil, master = model("student"), model("teacher")
    pairs = layer_pairs("proportional", LAYERS, LAYERS)
    shapes = attention_shape(pupil.config), attention_shape(master.config)
    gains = {layer: (HEADS, shapes[0][2] // 2) for layer in range(LAYERS)}
    align = Align(run.align, pairs, *shapes, gains, DTYPE).to(DEVICE)
    taps = Tap([s for s, _ in pairs], lse=True), Tap([t for _, t in pairs], lse=True)  # as run/build.py has them
    listen(pupil, taps[0], {layer: responder(align.gain, layer) for layer in range(LAYERS)})
    listen(master, taps[1])
    student, teacher = Student(pupil, align, taps[0], run.losses, VOCABULARY), Teacher(master, taps[1], VOCABULARY, shows_logits=True)
    ids, labels = sample(tokens)
    labels = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], 1)
    batch = Batch({"input_ids": ids}, labels, torch.zeros_like(ids), ("sample",), num_images=0).to(torch.device(DEVICE))
    counted_by = {"kl": "rows", "sft": "rows"} | align.counted_by()
    make = _zero3 if engines else _plain
    meter = Meter()
    student, teacher = make(student, teacher, run)
    for step in range(steps):
        meter.begin()
        values = train_step(student, teacher, [batch], run.losses, schedule.omega(step / steps, run.match), counted_by)
        meter.end()
        meter.losses.append({name: values[name] for name in ("loss", "sft", "kl", "align", "match")})
    return meter.report()


def _plain(student, teacher, run):
    return PlainEngine(student), teacher


def _zero3(student, teacher, run):
    """Both DeepSpeed engines, one rank."""
    from laid_ds.runtime import engine

    mechanics = [engine.read_deepspeed(ENGINE, run.student.dtype, run, trains) for trains in (True, False)]
    return engine.training_engine(student, run, mechanics[0]), engine.teacher_engine(teacher, mechanics[1])


class PlainEngine:
    """The least that train_step needs of an engine: one process, AdamW, the gradient clipped."""

    def __init__(self, student: torch.nn.Module) -> None:
        self.module, self.optimizer = student.train(), torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0)

    def __call__(self, *arguments):
        return self.module(*arguments)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _arguments(folder: str, steps: int) -> dict:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": CLIP,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not ON_GPU,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _metered(meter: Meter):
    """A callback that times steps, without the loading of data and the logging around them."""
    from transformers import TrainerCallback

    class Metered(TrainerCallback):
        def on_step_begin(self, *_, **__):
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.end()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                meter.losses.append({"loss": float(logs["loss"])})

    return Metered()


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _dataset(tokens: int, steps: int):
    from datasets import Dataset

    ids, labels = sample(tokens)
    return Dataset.from_dict({"input_ids": ids.tolist() * steps, "labels": labels.tolist() * steps})


def trl_gkd(tokens: int, steps: int, folder: str) -> dict:
    """TRL's GKDTrainer as documented, off-policy (lmbda=0) with the forward KL alone (beta=0)."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")
    trainer = GKDTrainer(
        model=model("student"),
        teacher_model=model("teacher"),
        args=GKDConfig(**_arguments(folder, steps), lmbda=0.0, beta=0.0, temperature=1.0, max_length=tokens),
        train_dataset=_dataset(tokens, steps),
        data_collator=_collate,
        processing_class=tokenizer,
    )
    return _trained(trainer)


def hf_ce_kl(tokens: int, steps: int, folder: str) -> dict:
    """transformers' Trainer with the loss as one writes it first: the model's own cross-entropy plus KL of the supervised rows."""
    from transformers import Trainer, TrainingArguments

    teacher = model("teacher").eval()

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            with torch.no_grad():
                shown = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            rows = inputs["labels"][:, 1:] != -100
            logs = [F.log_softmax(logits[:, :-1][rows], -1) for logits in (outputs.logits, shown)]
            loss = outputs.loss + F.kl_div(*logs, reduction="batchmean", log_target=True)
            return (loss, outputs) if return_outputs else loss

    trainer = Distiller(
        model=model("student"),
        args=TrainingArguments(**_arguments(folder, steps)),
        train_dataset=_dataset(tokens, steps),
        data_collator=_collate,
    )
    return _trained(trainer)


def _trained(trainer) -> dict:
    meter = Meter()
    trainer.add_callback(_metered(meter))
    trainer.train()
    return meter.report()


ARMS = {
    "laid": lambda tokens, steps, folder: laid(tokens, steps, engines=False),
    "laid_engine": lambda tokens, steps, folder: laid(tokens, steps, engines=True),
    "trl_gkd": trl_gkd,
    "hf_ce_kl": hf_ce_kl,
}


def run_arm(name: str, tokens: int, steps: int) -> dict:
    """One arm in this process."""
    if name == "laid_engine":
        from laid_ds.runtime import engine

        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        engine.start_processes()
    with TemporaryDirectory() as folder:
        return ARMS[name](tokens, steps, folder)


def in_own_process(name: str, tokens: int, steps: int) -> dict:
    """One arm in a fresh process; its report is the last line it prints."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--arm", name, "--tokens", str(tokens), "--steps", str(steps)]
    command += ["--device", DEVICE]
    given = {name: value for name, value in os.environ.items() if name not in OF_CPU} | ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=given if ON_GPU else given | OF_CPU)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(tokens: int, steps: int, repeats: int) -> dict:
    """Medians over `repeats` processes of each arm, and ours divided by the peers'."""
    runs = {name: [] for name in ARMS}
    for _ in range(repeats):
        for name in ARMS:
            runs[name].append(in_own_process(name, tokens, steps))
    _check_losses({name: found[0]["losses"][0] for name, found in runs.items()})
    figures = {
        f"{quantity}_{name}": statistics.median(run[quantity] for run in found)
        for name, found in runs.items()
        for quantity in (TIME, "added_bytes", "peak_bytes")
    }
    for ours, suffix in (("laid", ""), ("laid_engine", "_engine")):
        for peer in ("trl_gkd", "hf_ce_kl"):
            figures[f"{RATIO}{suffix}_vs_{peer}"] = figures[f"{TIME}_{ours}"] / figures[f"{TIME}_{peer}"]
            figures[f"memory_ratio{suffix}_vs_{peer}"] = figures[f"added_bytes_{ours}"] / figures[f"added_bytes_{peer}"]
    return figures


def _check_losses(first: dict[str, dict[str, float]]) -> None:
    """All arms compute the same: at first TRL's loss is our KL, the Trainer's our cross-entropy + KL, and engines change nothing."""
    ours = first["laid"]
    for found, expected in (
        (first["trl_gkd"]["loss"], ours["kl"]),
        (first["hf_ce_kl"]["loss"], ours["sft"] + ours["kl"]),
        (first["laid_engine"]["loss"], ours["loss"]),
    ):
        assert abs(found - expected) < (2e-2 if ON_GPU else 1e-3) * abs(expected), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4, help="in each process; the first warms up")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each arm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-row", action="store_true", help="leave results.csv as it is")
    parser.add_argument("--arm", choices=ARMS, help="run one arm in this process and print its report")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install -e '.[bench]'")
    if arguments.device != DEVICE:  # what the models are is decided before anything is made
        words = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:]]
        sys.exit(subprocess.run(words, env=os.environ | {"LAID_BENCH_DEVICE": arguments.device}).returncode)
    if arguments.arm:
        print(json.dumps(run_arm(arguments.arm, arguments.tokens, arguments.steps)))
        return
    figures = compare(arguments.tokens, arguments.steps, arguments.repeats)
    if not arguments.no_row:
        measure.append("train_step.compare", DEVICE, f"tokens={arguments.tokens}", figures, PACKAGES)
    measure.show(figures | {"tokens": arguments.tokens, "versions": measure.versions(PACKAGES)}, arguments.json)


if __name__ == "__main__":
    main()
