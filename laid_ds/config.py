"""A run: one typed, frozen object read from one TOML file. Unknown keys are errors.

What DeepSpeed calls mechanics (ZeRO stage, offload, buckets) lives in ds_configs/*.json; what a run means (learning rate, batch, clip,
loss weights) lives here and only here.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from laid_ds.evaluation.heads import Probe, read_probe
from laid_ds.files import home_expanded, own_or_shipped, read_json, read_toml
from laid_ds.keys import find, meant


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers here; give one")
    return value


Plain = BeforeValidator(_no_truth)  # pydantic takes true for 1
NonNegative = Annotated[float, Plain, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Plain, Field(gt=0, allow_inf_nan=False)]
AboveMinusOne = Annotated[float, Plain, Field(gt=-1, allow_inf_nan=False)]
Finite = Annotated[float, Plain, Field(allow_inf_nan=False)]
Logit = Annotated[float, Plain, Field(gt=0), PlainSerializer(lambda x: "inf" if math.isinf(x) else x, when_used="json")]  # JSON has no inf
Count = Annotated[int, Plain, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
Decay = Annotated[float, Plain, Field(ge=0, lt=1)]
SEEDS = 2**31  # numpy takes twice as many, and each rank adds its number


def _ordered(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] > pair[1]:
        raise ValueError(f"the first number must not exceed the second, got {list(pair)}")
    return pair


Range = Annotated[tuple[Count, Count], AfterValidator(_ordered)]
UserPath = Annotated[Path, AfterValidator(lambda path: Path(home_expanded(str(path))))]
Source = Annotated[str, AfterValidator(home_expanded)]


class Section(BaseModel):
    """What stands under a field says what it is, and in a second paragraph when to change it; docs/recipe.md shows both."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(Section):
    path: UserPath
    """An ordinary transformers folder; `hf download NAME --local-dir FOLDER` makes one of a model on the hub.

    Always given (but for `teacher.self`). Teacher and student must share a tokenizer, and their processors must make the same pictures."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights in the forward and backward pass; the optimizer keeps fp32 beside bfloat16.

    float32 on a CPU, or to see whether rounding is to blame; it takes twice the memory."""
    deepspeed: Annotated[Path, AfterValidator(own_or_shipped)]
    """JSON with this engine's mechanics: ZeRO stage, offload, buckets. A file of yours, or one of ds_configs/ that comes with the package.

    Another one when memory does not suffice (offload) or the model is small (ZeRO-1, ZeRO-2); `laid plan` says what each takes."""
    trust_remote_code: bool = False
    """Run the code that lies in the folder (auto_map) with your rights; without it such a folder is refused.

    Only for a folder whose code you have read, and which transformers' own classes do not serve."""


class Lora(Section):
    """Train low-rank factors beside frozen weights (needs the extra `lora`); the exported folder has them merged."""

    rank: Count = 16
    """Inner width of the factors.

    Larger where the student does not learn what full training does; memory grows with it."""
    alpha: Positive = 32.0
    """The factors' product counts alpha / rank times.

    With rank, to keep that ratio; it acts as a factor on the learning rate."""
    targets: Names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the decoder, by their last name.

    Fewer to save memory, or other names for another family; `k_proj` must be among them where layer 0 is compared."""
    dropout: Annotated[float, Plain, Field(ge=0, lt=1)] = 0.0
    """Share of the factors' inputs that are dropped in training.

    Above 0 when a small set is learned by heart."""


class Student(Model):
    """The model that is trained."""

    freeze_vision: bool = False
    """Leave the vision tower as it is.

    To save its optimizer states, where what is to be learned is where to look and not what is seen."""
    freeze_embeddings: bool = False
    """Leave the embeddings of tokens as they are, and with them a head that is tied to them.

    true for short runs on few words: Adam moves every row of a large vocabulary by as much as those that the data speak of."""
    gradient_checkpointing: bool | Literal["offload"] = True
    """Keep only each layer's input for the backward pass, which computes the rest again; "offload" keeps it in the CPU's memory.

    false when memory is left: a step then takes a quarter less computing. "offload" when even the inputs of all layers are too much."""
    lora: Lora | None = None
    """When the optimizer states of full training do not fit, or as a baseline."""


class Teacher(Model):
    """The model that is learned from. It stays frozen."""

    self: bool = False
    """The student's own weights teach, as they are in its folder: leave out `path`. Beside [student.lora] no second model is loaded; the
    factors and the gains are off while it teaches. Without LoRA it is loaded as any teacher, and needs `deepspeed`.

    When there is no larger model, with `sees`: what it knows of short windows is taught on long ones."""
    sees: Literal["all", "needles"] = "all"
    """"needles": the teacher reads the same turns with only the images that their questions need (and `fixed` ones), and what it says of
    the answers is learned. Every question must record its needles; attention of rows of other lengths is not compared.

    "needles" for a teacher that does not itself see as far as the training windows."""
    distractors: Annotated[int, Plain, Field(ge=0)] = 0
    """With sees = "needles": this many other images of the same window, drawn at random, beside the needles.

    Above 0 when a teacher with the needles alone is too easily right."""
    lessons: UserPath | None = None
    """A folder that `laid teach` has filled: what the teacher shows is read from there, and of the teacher only its head is loaded. Lessons
    of other data, pictures, windows, another seed or teacher are refused (docs/teachers.md).

    When several runs share a teacher and its samples, or when the teacher does not fit beside the student."""
    lessons_repeat: bool = False
    """The run may have more steps than `lessons`: after the whole epochs that are recorded, the same windows come again.

    true when drawing new windows in each epoch matters less than recording them costs."""
    check_answers: bool = True
    """Refuse, before step 1, a teacher that knows the answers of the first samples no better than a guess, or no better with their images
    than with those of other samples.

    false for a teacher whose answers do not matter (alignment alone), or for data on which it cannot do better."""


class Data(Section):
    """What both models are shown, and in which batches."""

    shards: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Folders written by `laid-data`, or URLs of such (http, s3, pipe:COMMAND with {} for the file's name).

    Always given. Several are read as one set, or mixed by `weights`."""
    weights: tuple[Positive, ...] | None = None
    """Share of each of `shards` in an epoch; without it every sample comes once.

    When a small set shall count more, or a large one less, than its number of samples."""
    images: Range | None = None
    """Train on windows of [least, most] images, drawn anew for each step; without it samples stay whole, and so stays what is no haystack
    (docs/data_format.md, Windows).

    For haystacks, always: [2, N] with N as large as memory allows (`laid plan --tokens`)."""
    grow_from: Count | None = None
    """Let the upper end of `images` grow from here to its full value over the first `grow_until` of the run (geometric).

    When the loss does not begin to fall at the full length."""
    grow_until: Annotated[float, Plain, Field(gt=0, le=1)] = 0.6
    """Share of the run after which `grow_from` has reached the full length.

    With `grow_from`: smaller leaves more steps for the longest windows."""
    questions: Count | None = None
    """Ask at most this many of a sample's questions in each window; without it all.

    When answers of one haystack crowd out the number of haystacks, or text takes too many tokens."""
    number_images: bool = False
    """Write "Image 7: " before the seventh image that a sample shows, in training as in asking.

    When answers are to name images by number. A model that was trained so is asked so (docs/benchmarks.md)."""
    shuffle: Literal["full", "none"] | Count = "full"
    """The order of the samples; a number shuffles within windows of so many samples.

    A number for URLs, so that few shards are needed at a time; "none" to keep the order of the shards."""
    on_bad: Literal["raise", "replace"] = "raise"
    """A sample that cannot be read stops the run, or is replaced by another that (seed, position) chooses, and logged.

    "replace" for large sets over a network; never to hide damage that `laid-data repair` would mend."""
    image_pixels: Range | None = None
    """Show both models every image at an area of [least, most] pixels, in the way of their family (laid_ds/models/image_pixels.py); the
    exported folder says the same.

    Always worth stating: the student's own processor may show a photograph as thousands of tokens. Less to see more images in a window;
    more where what is asked about is small in the picture."""
    decoder: Literal["exact", "pil", "fast"] = "exact"
    """How encoded images are decoded; teacher and student always see the same pixels. "exact": those of the stock processors, by the
    fastest decoder that gives them bit for bit. "pil": PIL alone. "fast": approximate JPEG, not bit-equal (needs the extra `fast`).

    "fast" when workers cannot keep up and evaluation by other tools need not see the same pixels."""
    resizer: Literal["pil", "torch"] = "pil"
    """How images are brought to the size that the processor asks for. "pil": as the stock processors. "torch": not bit-equal to it.

    "torch" when workers cannot keep up."""
    micro_batch: Count = 1
    """Samples per rank (or group of `sequence_parallel` ranks) and forward pass, padded to the longest; with tokens_per_pack packs, of
    which there is 1.

    Larger while memory allows. micro_batch x accumulation x ranks / sequence_parallel is the batch, which must stay the same when a run
    goes on."""
    tokens_per_pack: Count | None = None
    """Lay samples end to end in one row of at most about so many of the student's tokens, instead of padding them.

    When lengths differ (`fill` in metrics.jsonl is low), for families that can (docs/families.md, packable)."""
    count_tokens: str = "estimate"
    """How packs are planned: by the "estimate" in the shards' index, scaled to what the student's processor makes of some samples; or by
    the exact counts that samples record under another name.

    When the shards hold exact counts for this processor (`laid-data stats --tokens NAME`): packs are then filled more tightly."""
    workers: Annotated[int, Plain, Field(ge=0)] = 0
    """Processes of each rank that prepare batches ahead; 0 prepares them in the rank itself.

    On GPUs, as many as make `seconds` in metrics.jsonl fall. It changes no number."""

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
    def _counts_know_the_numbers(self) -> Data:
        if self.number_images and self.tokens_per_pack is not None and self.count_tokens != "estimate":
            raise ValueError(f'count_tokens={self.count_tokens!r} counts samples without numbered images: set it to "estimate"')
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
    """AdamW, and how its rate moves."""

    lr: Positive = 1e-5
    """Learning rate of the student after the warm-up.

    The first thing to sweep, in steps of 3. 1e-5 is the paper's for 7B; tiny models and LoRA take 1e-4 and more (docs/choosing.md)."""
    mixing_lr: NonNegative = 1e-5
    """Learning rate of the head mixture; 0 keeps it as it starts.

    Not above `lr` from a one-hot start; ten times `lr` is the paper's, from a uniform one."""
    gain_lr: NonNegative = 1e-4
    """Learning rate of the RoPE gain; 0 keeps it at 1.

    With `lr`, to stay at about ten times of it."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay of the mean and of the square of gradients.

    The second nearer to 1 where batches are small and gradients noisy."""
    weight_decay: NonNegative = 0.0
    """AdamW's, of the student's weights alone; mixture and gain have none.

    Above 0 when training from scratch."""
    clip: Positive = 1.0
    """Largest norm of the gradient of a step, over all ranks; a larger one is scaled down to it.

    When `gradient_norm` in metrics.jsonl is always above it, the clip sets the rate: lower weights of the loss, or raise it knowingly."""
    warmup_steps: Annotated[int, Plain, Field(ge=0)] = 0
    """Steps over which all rates rise linearly from 0.

    About 5 % of the run."""
    decay: Literal["cosine", "constant"] = "cosine"
    """What the rates do after the warm-up: fall to 0 at the last step, or stay.

    "constant" when you do not know yet how many steps it will be."""
    accumulation: Count = 1
    """Micro-batches per rank whose gradients make one step.

    To keep the batch (micro_batch x accumulation x ranks / sequence_parallel) on fewer GPUs."""


class Losses(Section):
    """Weights of the terms of the loss (docs/method.md). The paper prints no values; these are ours."""

    align: NonNegative = 0.0
    """Weight of head-level alignment: the student's queries and keys as a mixture of the teacher's (Paper).

    Above 0 where it beats KL + SFT in [evaluation]; 10 in the demo, at lr 3e-3 (docs/choosing.md, Weights and rates)."""
    match: NonNegative = 0.0
    """Weight of attention matching: the student looks where the teacher looks (ours).

    Above 0 where it beats KL + SFT in [evaluation]: 1 on the heads that retrieve, on all rows (docs/choosing.md); not for families whose
    image tokens see each other both ways."""
    kl: NonNegative = 1.0
    """Weight of the divergence from the teacher's distribution over the answer tokens (Paper).

    0 in a run without a [teacher]."""
    sft: NonNegative = 1.0
    """Weight of the cross-entropy of the answers.

    0 when the data's answers are worse than the teacher's."""
    temperature: Positive = 1.0
    """Both models' logits are divided by it in the divergence, which is then multiplied by its square.

    Above 1 to teach more of what the teacher finds unlikely; nothing but 1 was tried here."""
    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl"
    """What losses.kl weighs: KL(teacher || student) (the paper), KL(student || teacher), or the generalised Jensen-Shannon divergence.

    "reverse_kl" or "jsd" when the student cannot cover all that the teacher says; nothing but "kl" was compared here."""
    beta: Annotated[float, Plain, Field(gt=0, lt=1)] = 0.5
    """Share of the teacher in the mixture of "jsd".

    With divergence = "jsd" only."""
    rows_per_chunk: Count = 256
    """Answer tokens whose logits exist at one time. It changes memory and speed, and no number beyond rounding.

    Smaller for large vocabularies on full GPUs."""

    def __str__(self) -> str:
        """The terms that are learned, with their weights."""
        weights = {name: getattr(self, name) for name in ("sft", "kl", "align", "match")}
        return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)

    @property
    def listens(self) -> bool:
        """Whether attention of the two models is compared at all."""
        return self.align > 0 or self.match > 0


class Align(Section):
    """Which layers are compared, and by which mixture of the teacher's heads."""

    pairs: Literal["last", "proportional", "probed"] | Annotated[tuple[tuple[int, int], ...], Field(min_length=1)] = "last"
    """(student layer, teacher layer) pairs, counted from 0, or a rule that makes them. The paper: last to last. "proportional": every
    student layer, with the teacher's at the same depth. "probed": the layers that retrieve in `probe`.

    For a real pair, nearly always: "probed"."""
    heads: Literal["all", "probed"] | tuple[tuple[tuple[int, int], ...], ...] = "all"
    """For each of `pairs` the (student head, teacher head) couples that are compared; all other heads are free and nothing is mixed. "all"
    (the paper): every student head listens to a learned mixture. "probed": the teacher's heads that retrieve in `probe`.

    For a real pair: "probed" (docs/choosing.md)."""
    start: Literal["one_hot", "uniform", "probed"] | tuple[tuple[tuple[int, int], ...], ...] = "one_hot"
    """Where the mixture of heads = "all" starts. `one_hot` (ours, anchored): each student head on one teacher head. `uniform`: the mean of
    all heads (the paper's recipe). "probed" and lists of (student head, teacher head) couples for each of `pairs`: those on these, all
    others as `one_hot`.

    "uniform" to repeat the paper; "probed" to have all heads compared, those that retrieve with those that do."""
    probe: UserPath | None = None
    """What `laid probe TEACHER SHARDS --student STUDENT --out FILE` wrote, where `pairs`, `heads` or `start` are "probed". The layers and
    heads that follow from it stand in run.json in place of that word: a run that has begun needs the file no more, and goes on with none
    that says otherwise.

    With "probed", always."""
    start_logit: Logit = 3.0
    """Logit of the chosen head at a one-hot start. inf: the other heads get nothing, now and ever, so that no mixture is learned, and
    matching computes one teacher head for each of the student's.

    Larger to hold on to the chosen head; smaller to let the mixture be learned; inf to keep it."""
    weights: Literal["softmax", "free"] = "softmax"
    """Whether a mixture's weights are a distribution (ours) or any numbers (the paper's text).

    "free" to repeat the paper; matching needs "softmax"."""
    mixing: Literal["tied", "separate"] = "tied"
    """One mixture for queries and keys (the paper), or one for each (ours).

    "separate" when the models group their key heads differently."""
    reduction: Literal["relative", "mean", "sum"] = "relative"
    """How a head's squared error is scaled: by the squared norm of its target, so that 1 means nothing is copied (ours); as a mean over
    elements; or not at all (the paper's Eq. 7, literally).

    "sum" to repeat the paper; the weight then depends on lengths and sizes."""


class Match(Section):
    """How attention matching weighs distances (docs/method.md, 2). Ours throughout."""

    omega: Literal["uniform", "frontier", "power"] = "uniform"
    """The weight of a distance: all alike; more beyond a frontier that moves outwards; or a power of it that grows.

    The others where your held-out window says so: here no distance weighting helped (docs/study.md)."""
    gamma: AboveMinusOne = 4.0
    """How much more than 1 the far side of the frontier weighs, before all weights are scaled to mean 1.

    With omega = "frontier" only; below 0 the far side weighs less."""
    frontier_tokens: tuple[NonNegative, NonNegative] = (64.0, 4096.0)
    """The frontier moves from the first to the second distance, in tokens, over the run.

    With omega = "frontier": the second to about the longest training window."""
    width_tokens: Positive = 256.0
    """How soft the frontier is, in tokens.

    With omega = "frontier": smaller for short windows (16 in the demo)."""
    delta_tokens: Positive = 256.0
    """The distance, in tokens, from which on the power counts.

    With omega = "power" only."""
    alpha: Finite = 1.0
    """The exponent at the end of the run; it moves there from 0.

    With omega = "power" only; below 0 it favours near keys."""
    rows: Count | None = None
    """Compare this many sampled rows per sample instead of all (an unbiased estimate).

    When matching takes too much of a step: its time is proportional to the rows."""
    rows_from: Literal["all", "answers"] = "all"
    """Compare every row, or only those from which a token of an answer is predicted; the mean is over the rows compared.

    "answers" where matching takes too much of a step, or lessons too much of a disk (docs/choosing.md)."""


class Gain(Section):
    """The RoPE response gain (docs/method.md, 3). Ours."""

    enabled: bool = False
    """Learn a factor for each rotary plane of the student's heads; it folds into the exported weights.

    true where your held-out window says so: over seeds it did nothing here (docs/study.md). Not for families where nothing folds
    (docs/families.md)."""


class Checkpoint(Section):
    """When a run is saved, and what stays."""

    every_steps: Count = 500
    """Steps between two checkpoints; the last step is always saved.

    So that at most minutes to an hour of work can be lost: a power cut loses the steps since the last one."""
    keep_last: Count = 2
    """Keep this many of the newest checkpoints.

    1 when the disk is small; more to go back by hand. A checkpoint takes 12 bytes per trained parameter, and those of what is frozen."""
    keep_every: Count | None = None
    """Keep also the checkpoints of every so many steps, for good.

    To export and evaluate earlier states later (`laid export --step`)."""


class Evaluation(Section):
    """A small held-out haystack evaluation before the first step, every so many steps and at the end (evaluation.jsonl)."""

    shards: Source
    """Test shards with recorded needles and choices, of pictures that are not trained on.

    Always given, where the section is."""
    every_steps: Count = 500
    """Steps between two evaluations; before the first and after the last step there is always one.

    So that the run holds some ten of them: each costs forward passes of every size."""
    sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 5, 10, 20, 50)
    """Numbers of images; the first one's accuracy before training sets the threshold of the window.

    Up to well above the training windows, and no more than the haystacks hold."""
    haystacks: Count = 32
    """Haystacks that are asked at each size, the first of the shards.

    More for steadier figures: 32 questions leave a standard error of up to 9 points."""
    questions: Count = 1
    """Questions asked of each haystack.

    More for steadier figures at nearly no cost, where haystacks hold several."""

    @model_validator(mode="after")
    def _sizes_ascend(self) -> Evaluation:
        if list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes={list(self.sizes)} must ascend")
        return self


class Stop(Section):
    """When a run stops before its end."""

    after_minutes: Positive | None = None
    """Save and stop once the process is this old; the same command goes on from there.

    For clusters that give no warning signal: some minutes less than their time limit."""


class Logging(Section):
    """What a run tells of itself, beside metrics.jsonl with every step."""

    every_steps: Count = 1
    """Steps between two lines on the console; a minute after the last one there is a line anyway.

    Larger where steps take less than a second."""
    attention_every_steps: Count | None = None
    """Record entropy and mass by distance of the compared layers, of both models, in metrics.jsonl every so many steps.

    To see whether the student's attention reaches farther."""
    peak_tflops: Positive | None = None
    """Peak of one device in the run's dtype (A100 bf16: 312, H100: 989); with it each line says which share of it the model gets (MFU).

    Whenever you care about speed."""
    tensorboard: bool = False
    """Write scalars for TensorBoard into the run folder (needs the extra `tensorboard`).

    When you watch runs there."""
    wandb: bool = False
    """Report to Weights & Biases (needs the extra `wandb`, and your login).

    When you watch runs there."""


class Run(Section):
    """Everything that decides the outcome of a run."""

    name: str
    """What the run is called in its log, job and model card.

    Always given."""
    output: UserPath
    """Folder of the run: checkpoints, metrics, and run.json with all of these values. Relative to where the command is started.

    Always given; another one for another run. The same one goes on where it stopped."""
    seed: Annotated[int, Plain, Field(ge=0, lt=SEEDS)] = 0
    """Of the order of samples, the windows, the rows that are sampled and LoRA's start.

    To see how much of a result is luck."""
    steps: Count
    """Optimizer steps of the whole run; rates and windows follow the share of it that is done.

    Always given. An epoch has samples / (micro_batch x accumulation x ranks / sequence_parallel) steps (`laid-data plan`)."""
    sequence_parallel: Count = 1
    """So many consecutive ranks share each batch: both models keep a slice of its rows on each, and attention gathers keys and values. It
    divides the number of ranks and changes no number beyond rounding; 1: each rank reads batches of its own.

    When the longest window does not fit one GPU (docs/operations.md, One sequence over several GPUs): the smallest that `laid plan` calls
    enough, and no more than one node's GPUs."""
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

    def __str__(self) -> str:
        return f"{self.name}: {self.steps} steps of {self.losses} into {self.output}"

    @property
    def taught(self) -> bool:
        """Whether a term of the loss asks a teacher; where none does, a [teacher] is not loaded."""
        return self.losses.listens or self.losses.kl > 0

    def groups(self, ranks: int) -> int:
        """How many batches so many ranks read at one time. Raises ValueError unless sequence_parallel divides them."""
        if ranks % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel = {self.sequence_parallel} does not divide the {ranks} rank{'s' * (ranks > 1)} of this run: start a"
                " multiple of it, or set another sequence_parallel"
            )
        return ranks // self.sequence_parallel

    @property
    def keeps_one_hot(self) -> bool:
        """Whether each student head listens to one teacher head from the first step to the last: its mixture has nothing to learn."""
        align = self.align
        kept = math.isinf(align.start_logit) if align.weights == "softmax" else self.optimizer.mixing_lr == 0
        return align.heads == "all" and align.start != "uniform" and kept

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
    def _lessons_can_be_told(self) -> Run:
        teacher = self.teacher
        if teacher is None or (teacher.lessons is None and not teacher.lessons_repeat):
            return self
        if teacher.lessons is None:
            raise ValueError("teacher.lessons_repeat = true is for teacher.lessons: give its folder, or leave lessons_repeat out")
        if teacher.lessons_repeat and self.data.grow_from is not None:
            raise ValueError("teacher.lessons_repeat repeats windows, and data.grow_from lets them grow: leave out one")
        return self

    @model_validator(mode="after")
    def _terms_have_their_parts(self) -> Run:
        if self.taught and self.teacher is None:
            raise ValueError("losses.align, losses.match and losses.kl need a [teacher]; set them to 0 to train without one")
        if not self.taught and self.losses.sft == 0:
            raise ValueError("every loss weight is 0: nothing would be learned")
        if self.losses.match > 0 and self.align.weights == "free" and not self.keeps_one_hot:
            raise ValueError("align.weights = 'free' gives no distribution to match; use 'softmax' or set losses.match = 0")
        return self


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Run:
    """Read a recipe and apply `section.key=value` overrides (values as TOML; a bare word is a string; `section=none` removes it).

    Raises ValueError with one line per wrong key or value, each with its place in the file.
    """
    path = own_or_shipped(Path(path))
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    tree = read_toml(path)
    for override in overrides:
        _apply(tree, override)
    try:
        run = Run.model_validate(tree)
        probed = _probed_align(path, run)
        return Run.model_validate(as_tree(run) | {"align": as_tree(run)["align"] | probed}) if probed else run
    except ValidationError as error:
        raise ValueError("\n".join(_sentences(path, error.errors()))) from None


def as_tree(run: Run) -> dict[str, Any]:
    """The resolved run as plain values, for run.json and for comparing two runs."""
    return run.model_dump(mode="json")


PROBED = ("pairs", "heads", "start")  # of [align], may be "probed"


def _probed_align(path: Path, run: Run) -> dict[str, Any]:
    """What the keys of [align] that are "probed" mean: what follows from `align.probe`, or where that file is gone and the run has begun,
    what run.json says. Raises ValueError for a file that gives no such thing."""
    align = run.align
    asked = [name for name in PROBED if getattr(align, name) == "probed"]
    if not asked and align.probe is None:
        return {}
    if not asked:
        raise ValueError(f'{path}: align.probe is {align.probe}, and neither pairs, heads nor start is "probed": leave it out, or set them')
    if align.probe is None:
        raise ValueError(f'{path}: align.{asked[0]} is "probed": give align.probe, the file that `laid probe ... --out FILE` writes')
    begun = _begun(run.output)
    if not align.probe.is_file() and all(isinstance(begun.get(name), list) for name in asked):
        return {name: begun[name] for name in asked}
    try:
        return _meant_by(align, read_probe(align.probe), asked)
    except ValueError as error:
        raise ValueError(f"{path}: align.probe: {error}") from None


def probed_words(align: Align) -> str:
    """What stands in [align] for "probed", in words."""
    names = [name for name in PROBED if not isinstance(getattr(align, name), str)]
    return ", ".join(f"{name} = {json.dumps(getattr(align, name))}" for name in names)


def _begun(output: Path) -> dict[str, Any]:
    """The section [align] of a run that has begun there."""
    record = output / "run.json"
    run = read_json(record).get("run") if record.is_file() else None
    align = run.get("align") if isinstance(run, dict) else None
    return align if isinstance(align, dict) else {}


def _meant_by(align: Align, probe: Probe, asked: list[str]) -> dict[str, Any]:
    if isinstance(align.pairs, str) and align.pairs != "probed":
        raise ValueError(f'align.{asked[0]} is "probed", and align.pairs {align.pairs!r}: give "probed" there, too, or a list')
    pairs = probe.pairs() if align.pairs == "probed" else align.pairs
    couples = probe.couples(pairs) if asked != ["pairs"] else []
    return {name: pairs if name == "pairs" else couples for name in asked}


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
        if key not in tree and find(Run, name.strip()) is None:
            raise ValueError(f"override {override!r}: {_unknown(name.strip())}")
        tree.pop(key, None)
    else:
        tree[key] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentences(path: Path, items: list[Any]) -> list[str]:
    """One for each place; of the alternatives that a key has, each of which pydantic names, none is told but what the key may hold."""
    found: dict[str, list[Any]] = {}
    for item in items:
        found.setdefault(_place(item["loc"]), []).append(item)
    return [f"{path}: {_sentence(place, those[0], len(those))}" for place, those in found.items()]


def _place(loc: tuple[Any, ...]) -> str:
    """The dotted name that an error is about, without the alternative and the place in a list behind a key."""
    parts = [str(part) for part in loc]
    whole = next((".".join(parts[:end]) for end in range(len(parts), 0, -1) if find(Run, ".".join(parts[:end]))), "")
    return whole if whole and find(Run, whole).section is None else ".".join(parts)


def _sentence(place: str, item: Any, alternatives: int) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown(place)
    if item["type"] == "missing" and not isinstance(item["loc"][-1], int):  # else a list is too short
        return f"{place!r} is missing"
    reason = item["msg"].removeprefix("Value error, ")
    if alternatives > 1 or item["type"] == "missing":
        reason = f"give {find(Run, place).values}"
    return f"{place}: {reason} (value: {item['input']!r})" if place else reason


def _unknown(place: str) -> str:
    near = meant(Run, place)
    return f"unknown key {place!r}; {f'did you mean {near!r}? ' if near else ''}docs/recipe.md has all keys (python -m laid_ds.recipe_page)"
