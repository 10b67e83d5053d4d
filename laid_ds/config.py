"""A run: one typed, frozen object read from one TOML file. Unknown keys are errors.

What DeepSpeed calls mechanics (ZeRO stage, offload, buckets) lives in ds_configs/*.json; what a run means (learning rate, batch, clip,
loss weights) lives here and only here.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from laid_ds.files import read_toml

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _ordered(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] > pair[1]:
        raise ValueError(f"the first number must not exceed the second, got {list(pair)}")
    return pair


Range = Annotated[tuple[Count, Count], AfterValidator(_ordered)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    path: Path
    """An ordinary transformers folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    deepspeed: Path
    """JSON with this engine's mechanics (see ds_configs/)."""
    trust_remote_code: bool = False
    """Run the code that lies in the folder (auto_map) with your rights; without it such a folder is refused."""


class Lora(Section):
    """Train low-rank factors beside frozen weights (needs the extra `lora`); the exported folder has them merged."""

    rank: Count = 16
    alpha: Positive = 32.0
    """The factors' product counts alpha / rank times."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the decoder, by their last name."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Student(Model):
    freeze_vision: bool = False
    gradient_checkpointing: bool | Literal["offload"] = True
    """Keep only each layer's input for the backward pass; "offload" keeps it in the CPU's memory."""
    lora: Lora | None = None


class Teacher(Model):
    self: bool = False
    """The student's own weights teach, as they are in its folder: leave out `path`. Beside [student.lora] no second model is loaded; the
    factors and the gains are off while it teaches. Without LoRA it is loaded as any teacher, and needs `deepspeed`."""
    sees: Literal["all", "needles"] = "all"
    """"needles": the teacher reads the same turns with only the images that their questions need (and `fixed` ones), and what it says of
    the answers is learned. Every question must record its needles; attention of rows of other lengths is not compared."""
    distractors: Annotated[int, Field(ge=0)] = 0
    """With sees = "needles": this many other images of the same window, drawn at random, beside the needles."""
    check_answers: bool = True
    """Refuse, before step 1, a teacher that knows the answers of the first samples no better than a guess, or no better with their images
    than with those of other samples."""


class Data(Section):
    shards: tuple[str, ...]
    """Folders written by `laid-data`, or URLs of such (http, s3, pipe:COMMAND with {} for the file's name)."""
    weights: tuple[Positive, ...] | None = None
    """Share of each of `shards` in an epoch; None takes every sample once."""
    images: Range | None = None
    """Train on windows of [least, most] images, drawn anew for each step; None keeps samples whole, and so stays what is no haystack
    (docs/data_format.md, Windows)."""
    grow_from: Count | None = None
    """Let the upper end of `images` grow from here to its full value over the first `grow_until` of the run (geometric)."""
    grow_until: Annotated[float, Field(gt=0, le=1)] = 0.6
    questions: Count | None = None
    """Ask at most this many of a sample's questions in each window; None asks all."""
    shuffle: Literal["full", "none"] | Count = "full"
    """A number shuffles within windows of so many samples (for URLs: few shards are then needed at a time)."""
    on_bad: Literal["raise", "replace"] = "raise"
    """A sample that cannot be read stops the run, or is replaced by another that (seed, position) chooses, and logged."""
    image_pixels: Range | None = None
    """Show both models every image at an area of [least, most] pixels, in the way of their family (laid_ds/models/image_pixels.py); the
    exported folder says the same.

    Always worth stating: the student's own processor may show a photograph as thousands of tokens. Less to see more images in a window;
    more where what is asked about is small in the picture."""
    decoder: Literal["exact", "pil", "fast"] = "exact"
    """How encoded images are decoded (data/images.py); teacher and student always see the same pixels."""
    resizer: Literal["pil", "torch"] = "pil"
    micro_batch: Count = 1
    """Samples per rank and forward pass, padded to the longest; with tokens_per_pack packs, of which there is 1."""
    tokens_per_pack: Count | None = None
    """Lay samples end to end in one row of at most about so many of the student's tokens, instead of padding them."""
    count_tokens: str = "estimate"
    """How packs are planned: by the "estimate" in the shards' index, scaled to what the student's processor makes of some samples; or by
    the exact counts that samples record under another name."""
    workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _weights_fit(self) -> Data:
        if self.weights is not None and len(self.weights) != len(self.shards):
            raise ValueError(f"{len(self.weights)} weights for {len(self.shards)} shard folders; give one weight for each")
        return self

    @model_validator(mode="after")
    def _packs_are_plannable(self) -> Data:
        if self.tokens_per_pack is not None and self.micro_batch != 1:
            raise ValueError(f"micro_batch is {self.micro_batch}: with tokens_per_pack a forward pass is one pack; set micro_batch = 1")
        if self.tokens_per_pack is not None and self.grow_from is not None:
            raise ValueError("packs are planned before the run, for windows of one range: leave out grow_from or tokens_per_pack")
        return self

    @model_validator(mode="after")
    def _questions_are_of_windows(self) -> Data:
        if self.questions is not None and self.images is None:
            raise ValueError(f"questions={self.questions} is for windows: give images as well, or leave questions out")
        return self

    @model_validator(mode="after")
    def _growth_has_a_range(self) -> Data:
        if self.grow_from is not None and (self.images is None or not self.images[0] <= self.grow_from <= self.images[1]):
            raise ValueError(f"grow_from={self.grow_from} must lie inside images={self.images}")
        return self


class Optimizer(Section):
    lr: Positive = 1e-5
    mixing_lr: NonNegative = 1e-5
    """Learning rate of the head mixture; 0 keeps it as it starts."""
    gain_lr: NonNegative = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    clip: Positive = 1.0
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["cosine", "constant"] = "cosine"
    accumulation: Count = 1


class Losses(Section):
    """Weights of the terms of the loss (docs/method.md). The paper prints no values; these are ours."""

    align: NonNegative = 1.0
    match: NonNegative = 1.0
    kl: NonNegative = 1.0
    sft: NonNegative = 1.0
    temperature: Positive = 1.0
    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl"
    """What losses.kl weighs: KL(teacher || student) (the paper), KL(student || teacher), or the generalised Jensen-Shannon divergence."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the teacher in the mixture of "jsd"."""
    rows_per_chunk: Count = 256
    """Rows of logits that exist at one time."""

    @property
    def listens(self) -> bool:
        """Whether attention of the two models is compared at all."""
        return self.align > 0 or self.match > 0


class Align(Section):
    pairs: Literal["last", "proportional"] | tuple[tuple[int, int], ...] = "last"
    """(student layer, teacher layer) pairs, or a rule that makes them. The paper: last to last."""
    heads: Literal["all"] | tuple[tuple[tuple[int, int], ...], ...] = "all"
    """For each of `pairs` the (student head, teacher head) couples that are compared; all other heads are free and nothing is mixed. "all"
    (the paper): every student head listens to a learned mixture. `laid probe` says which heads retrieve (docs/choosing.md)."""
    start: Literal["one_hot", "uniform"] = "one_hot"
    """`one_hot` (ours, anchored): each student head starts on one teacher head. `uniform`: the mean of all heads (the paper's recipe)."""
    start_logit: Positive = 3.0
    """Logit of the chosen head at a one-hot start; inf-like values (30 and more) freeze the choice in practice."""
    weights: Literal["softmax", "free"] = "softmax"
    mixing: Literal["tied", "separate"] = "tied"
    reduction: Literal["relative", "mean", "sum"] = "relative"


class Match(Section):
    omega: Literal["uniform", "frontier", "power"] = "frontier"
    gamma: NonNegative = 4.0
    frontier_tokens: tuple[NonNegative, NonNegative] = (64.0, 4096.0)
    """The frontier moves from the first to the second distance over the run."""
    width_tokens: Positive = 256.0
    delta_tokens: Positive = 256.0
    alpha: NonNegative = 1.0
    rows: Count | None = None
    """Compare this many sampled rows per sample instead of all (an unbiased estimate)."""
    rows_from: Literal["all", "answers"] = "all"
    """Compare every row, or only those from which a token of an answer is predicted; the mean is over the rows compared."""


class Gain(Section):
    enabled: bool = True


class Checkpoint(Section):
    every_steps: Count = 500
    keep_last: Count = 2
    """Keep this many of the newest checkpoints."""
    keep_every: Count | None = None
    """Keep also the checkpoints of every so many steps, for good."""


class Evaluation(Section):
    """A small held-out haystack evaluation before the first step, every so many steps and at the end (evaluation.jsonl)."""

    shards: str
    """Test shards with recorded needles and choices."""
    every_steps: Count = 500
    sizes: tuple[Count, ...] = (1, 2, 5, 10, 20, 50)
    """Numbers of images; the first one's accuracy before training sets the threshold of the window."""
    haystacks: Count = 32
    questions: Count = 1

    @model_validator(mode="after")
    def _sizes_ascend(self) -> Evaluation:
        if list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes={list(self.sizes)} must ascend")
        return self


class Stop(Section):
    after_minutes: Positive | None = None
    """Save and stop once the process is this old; the same command goes on from there. For clusters that give no warning signal."""


class Logging(Section):
    every_steps: Count = 1
    attention_every_steps: Count | None = None
    """Record entropy and mass by distance of the compared layers, of both models, in metrics.jsonl every so many steps."""
    peak_tflops: Positive | None = None
    """Peak of one device in the run's dtype (A100 bf16: 312, H100: 989); with it each line says which share of it the model gets (MFU)."""
    tensorboard: bool = False
    wandb: bool = False


class Run(Section):
    """Everything that decides the outcome of a run."""

    name: str
    output: Path
    seed: int = 0
    steps: Count
    student: Student
    teacher: Teacher | None = None
    """Without a teacher the run is plain supervised training (only losses.sft may be positive)."""
    data: Data
    optimizer: Optimizer = Optimizer()
    losses: Losses = Losses()
    align: Align = Align()
    match: Match = Match()
    gain: Gain = Gain()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation | None = None
    stop: Stop = Stop()
    logging: Logging = Logging()

    @property
    def taught(self) -> bool:
        """Whether a term of the loss asks a teacher; where none does, a [teacher] is not loaded."""
        return self.losses.listens or self.losses.kl > 0

    @model_validator(mode="before")
    @classmethod
    def _own_teacher(cls, tree: Any) -> Any:
        """teacher.self = true: what the student's section says of the weights, the teacher's says too."""
        student, teacher = (tree.get(name) if isinstance(tree, dict) else None for name in ("student", "teacher"))
        if not (isinstance(student, dict) and isinstance(teacher, dict) and teacher.get("self") is True):
            return tree
        shared = ["path", "dtype", "trust_remote_code"] + ["deepspeed"] * bool(student.get("lora"))
        teacher = {key: student[key] for key in shared if key in student} | teacher
        other = [key for key in ("path", "dtype") if key in teacher and key in student and str(teacher[key]) != str(student[key])]
        if other:
            raise ValueError(
                f"teacher.{other[0]} is {teacher[other[0]]}, and teacher.self = true takes the student's: leave out one of the two"
            )
        return tree | {"teacher": teacher}

    @model_validator(mode="after")
    def _teacher_sees_rows_like_the_student(self) -> Run:
        teacher = self.teacher
        if teacher is not None and teacher.sees == "needles" and self.losses.listens:
            raise ValueError(
                'teacher.sees = "needles" gives the teacher shorter rows than the student has, so that attention cannot be compared: set'
                " losses.align and losses.match to 0"
            )
        if teacher is not None and teacher.distractors and teacher.sees == "all":
            raise ValueError(
                f'teacher.distractors = {teacher.distractors} is for teacher.sees = "needles": set it, or leave distractors out'
            )
        return self

    @model_validator(mode="after")
    def _terms_have_their_parts(self) -> Run:
        if self.taught and self.teacher is None:
            raise ValueError("losses.align, losses.match and losses.kl need a [teacher]; set them to 0 to train without one")
        if not self.taught and self.losses.sft == 0:
            raise ValueError("every loss weight is 0: nothing would be learned")
        if self.losses.match > 0 and self.align.weights == "free":
            raise ValueError("align.weights = 'free' gives no distribution to match; use 'softmax' or set losses.match = 0")
        return self


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Run:
    """Read a recipe and apply `section.key=value` overrides (values as TOML; a bare word is a string; `section=none` removes it).

    Raises ValueError with one line per wrong key or value, each with its place in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    tree = read_toml(path)
    for override in overrides:
        _apply(tree, override)
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(path, item) for item in error.errors())) from None


def as_tree(run: Run) -> dict[str, Any]:
    """The resolved run as plain values, for run.json and for comparing two runs."""
    return run.model_dump(mode="json")


def _apply(tree: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    if not sign:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *sections, key = name.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {section!r} is a value, not a section")
    if text.strip().lower() == "none":
        tree.pop(key, None)
    else:
        tree[key] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(path: Path, item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "the run"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key {place!r}; see laid_ds/config.py for the keys of each section"
    if item["type"] == "missing":
        return f"{path}: {place!r} is missing"
    return (
        f"{path}: {place}: {item['msg'].removeprefix('Value error, ')} (value: {item['input']!r})"
        if item["loc"]
        else f"{path}: {item['msg'].removeprefix('Value error, ')}"
    )
