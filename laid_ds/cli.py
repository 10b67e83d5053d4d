"""`laid`: train, export, evaluate, report. Each command prints one clear sentence and a non-zero status when something is wrong."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from laid_ds.files import own_or_shipped
from laid_ds.parent import end
from laid_ds.terminal import next_step, print_facts, print_json, print_table, run_app, say, track, with_version, working

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.callback()(with_version)

ImagePixels = Annotated[
    str | None, typer.Option(metavar="LEAST,MOST", help="Show every picture within so many pixels; default: as the model's folder says.")
]


@app.command(epilog="Example: laid train recipes/demo.toml losses.match=0 --ranks 2")
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value; section=none removes a section.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes on this machine; default: one per GPU, or 1.")] = None,
    port: Annotated[int, typer.Option(help="Port for the ranks to meet; 0 takes a free one.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the resolved run as JSON, start nothing.")] = False,
) -> None:
    """Run a recipe with DeepSpeed's launcher, from its latest checkpoint if it has one. Ctrl-C saves and stops."""
    from laid_ds import config

    run = config.load(recipe, overrides or [])
    if not dry_run:  # whose stdout is the run as JSON
        print(f"{run}; first a look at its models, data and disk", flush=True)
        if run.align.probe is not None:
            print(f"by {run.align.probe}: {config.probed_words(run.align)}", flush=True)
    with working("looking at models, data and disk"):  # the imports among it: torch, transformers and DeepSpeed take seconds
        import torch

        from laid_ds.run.check import check, data_notes
        from laid_ds.run.folder import check_output
        from laid_ds.runtime import lock
        from laid_ds.runtime.local import launch

        if ranks or not dry_run:  # a dry run may be tried where the ranks will not be
            run.groups(ranks or torch.cuda.device_count() or 1)
        check_output(run)
        lock.wait_until_free(run.output)
        check(run)
        notes = data_notes(run) if dry_run else []
    if dry_run:
        for note in notes:
            say(note)
        print(json.dumps(config.as_tree(run), indent=1))
        return
    print("nothing speaks against it; the ranks start", flush=True)
    raise typer.Exit(launch([str(recipe), *(overrides or [])], ranks, port))


@app.command(epilog="Example: laid teach my.toml lessons/my --ranks 4;  then: laid train my.toml teacher.lessons=lessons/my")
def teach(
    recipe: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    out: Annotated[Path, typer.Argument(help="Folder to record into; one that holds a part of these lessons is gone on with.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value; section=none removes a section.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the run to record; default: all.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Samples (or packs) of a step of the run; default: micro_batch x accumulation x ranks here."),
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes on this machine; default: one per GPU, or 1.")] = None,
    port: Annotated[int, typer.Option(help="Port for the ranks to meet; 0 takes a free one.")] = 0,
) -> None:
    """Record what the teacher shows of every sample that a run will read, so that it trains without the teacher in memory.

    Then train with teacher.lessons = "OUT", as often as you like. Killed or stopped, the same command goes on (docs/teachers.md).
    """
    from laid_ds import config

    run = config.load(recipe, overrides or [])
    with working("looking at models, data and disk"):
        import torch

        from laid_ds.run.teach import check_teaching
        from laid_ds.runtime.local import launch

        ranks = ranks or torch.cuda.device_count() or 1
        batch = batch or run.data.micro_batch * run.optimizer.accumulation * ranks
        sentence = check_teaching(run, out, steps, batch)
    print(sentence, flush=True)
    asked = ["--teach", str(out), "--steps", str(steps or run.steps), "--batch", str(batch)]
    status = launch([*asked, str(recipe), *(overrides or [])], ranks, port)
    if status == 0:
        next_step("laid", "train", recipe, *(overrides or []), f"teacher.lessons={out}")
    raise typer.Exit(status)


@app.command(epilog="Example: laid doctor --run /scratch/runs --ranks 8")
def doctor(
    run: Annotated[Path, typer.Option(help="Folder that runs are written to; its disk is looked at.")] = Path("runs"),
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes on this machine; default: one per GPU, or 1.")] = None,
    port: Annotated[int, typer.Option(help="Port for the ranks to meet; 0 takes a free one.")] = 0,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for ranks that do not come or do not answer.")] = 120,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this machine, its software and its cards: ok, slow, wrong or absent, with what to do. Status 1 where something is wrong.

    Versions, driver, memory, disks; what DeepSpeed would compile; ranks and their messages; every kernel of attention and of matching
    against its definition; a step under ZeRO-3; speeds. Nothing is kept. On several nodes: srun python -m laid_ds.doctor.
    """
    from tempfile import TemporaryDirectory

    from laid_ds.doctor import software
    from laid_ds.doctor.examine import main as examine

    words = ["--run", str(run), "--wait", str(wait), *(["--json"] if as_json else [])]
    if software.missing():  # is a line of the table
        raise typer.Exit(examine(words))
    import torch

    from laid_ds.runtime.local import launch

    if (ranks or torch.cuda.device_count() or 1) == 1:
        raise typer.Exit(examine(words))
    with TemporaryDirectory() as folder:  # launchers have much to say of a rank that leaves with another status than 0
        found = Path(folder) / "status"
        status = launch([*words, "--status-to", str(found)], ranks, port, module="laid_ds.doctor")
        raise typer.Exit(int(found.read_text()) if found.is_file() else status)


@app.command(
    epilog="Examples: laid init recipes/demo_teacher_model.json runs/demo/teacher --corpus runs/demo/short;  "
    "laid init recipes/study/real/model.json models/real --decoder SmolLM2.gguf --template recipes/study/real/chat.jinja;  "
    "laid init models/real models/seeing --captions data/captions;  laid init models/real models/half --layers 0,2,4,6"
)
def init(
    model: Annotated[
        Path, typer.Argument(help="JSON with the fields of a transformers config, model_type included; with --layers, a model folder.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Shards whose text trains the tokenizer and whose images set the normalisation; may be given more than once."),
    ] = None,
    decoder: Annotated[
        Path | None,
        typer.Option(help="Decoder and tokenizer of this folder, or GGUF file, of a causal language model; only the tower is random."),
    ] = None,
    template: Annotated[Path | None, typer.Option(help="With --decoder: chat template (Jinja); default: the tokenizer's own.")] = None,
    layers: Annotated[str | None, typer.Option(help="Keep only these decoder layers of a model folder, such as 0,1,2,6.")] = None,
    captions: Annotated[
        list[Path] | None,
        typer.Option(help="Shards of single images, whose words the random tower of a model folder learns; may be given more than once."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="With --captions: steps of 64 images; default: 1000.")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=256, help="With --corpus: size of the tokenizer before its special tokens; default: 400.")
    ] = None,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --corpus or --decoder: most tokens an image may take; default: 1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
) -> None:
    """Make an ordinary model folder without any download: a small model with random weights and its processor (--corpus), one around a
    pretrained decoder (--decoder), one whose tower has learned words (--captions), or some layers of a model (--layers)."""
    from laid_ds.data.dataset import Dataset
    from laid_ds.data.images import Pixels
    from laid_ds.files import read_text
    from laid_ds.models.from_decoder import write_around_decoder, write_with_layers
    from laid_ds.models.new_model import write_new_model
    from laid_ds.models.new_tower import write_with_words
    from laid_ds.runtime.engine import choose_accelerator

    if sum(way is not None for way in (corpus, decoder, captions, layers)) != 1:
        raise ValueError(
            "give one of --corpus (random weights), --decoder (a pretrained decoder), --captions (words for its tower) and --layers (a part"
            " of a model)"
        )
    for name, value, belongs, ways in (
        ("--template", template, decoder, "--decoder"),
        ("--steps", steps, captions, "--captions"),
        ("--vocabulary", vocabulary, corpus, "--corpus"),
        ("--image-tokens", image_tokens, corpus or decoder, "--corpus or --decoder"),
    ):
        if value is not None and belongs is None:
            raise ValueError(f"{name} {value} is for {ways}, and without it would do nothing; leave it out")
    choose_accelerator()  # transformers imports DeepSpeed when it makes a model
    if layers is not None:
        with working(f"writing some layers of {model}"):
            size = write_with_layers(model, output, _numbers("--layers", layers))
    elif decoder is not None:
        written = read_text(own_or_shipped(template)) if template is not None else None
        with working(f"reading {decoder} and making the model around it"):
            size = write_around_decoder(own_or_shipped(model), decoder, output, written, image_tokens or 1, seed)
    elif captions is not None:
        samples = [dataset.read(i) for dataset in map(Dataset.open, captions) for i in range(len(dataset))]
        size, right = write_with_words(model, output, samples, Pixels(), steps or 1000, seed)
        print(f"{output}: the tower says {right:.1%} of the words of captions that it did not learn")
    else:
        places = [(dataset, i) for dataset in map(Dataset.open, corpus) for i in range(min(len(dataset), 300))]
        samples = [dataset.read(i) for dataset, i in track(places, "reading samples")]
        with working("making the model and its tokenizer"):
            size = write_new_model(own_or_shipped(model), output, samples, vocabulary or 400, image_tokens or 1, seed)
    print(f"{output}: {size:,} parameters")
    next_step("laid", "train", "RECIPE", f"student.path={output}")


@app.command(epilog="Example: laid new my.toml --student models/7B --teacher models/32B --data data/train --test data/test --gpus 4")
def new(
    recipe: Annotated[Path, typer.Argument(help="TOML file to write; must not exist.")],
    student: Annotated[Path, typer.Option(help="Stock model folder of the student.")],
    teacher: Annotated[Path, typer.Option(help="Stock model folder of the teacher.")],
    data: Annotated[list[str], typer.Option(help="Shards to train on, a folder or URL; may be given more than once.")],
    test: Annotated[str | None, typer.Option(help="Held-out haystacks, of pictures that are in no training sample.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/ and the recipe's name.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs, one rank each; default: this machine's, or its CPU without any.")] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, max=1e6, help="GiB of one GPU.")] = 80,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a commented recipe for a pair of models and a data set: what fits, what is safe to start from, and what to look at next."""
    from laid_ds.runtime.engine import choose_accelerator

    choose_accelerator()
    from laid_ds.run.new_recipe import machine_of, next_steps, write_recipe

    with working("measuring the pair, planning and trying the recipe"):
        written = write_recipe(recipe, student, teacher, data, test, output or Path("runs") / recipe.stem, machine_of(gpus, gpu_memory))
    steps = next_steps(recipe, written.run)
    if as_json:
        print_json({"recipe": str(recipe), "notes": written.notes, "next": steps, "plan": written.plan.as_json()})
        return
    for note in (*written.plan.notes, *written.notes):
        print(f"note: {note}")
    print("\n".join([f"{recipe}: written, and its dry run passes", *(f"next: {step}" for step in steps)]))


@app.command(epilog="Example: laid models runs/demo/models/student")
def models(
    path: Annotated[Path | None, typer.Argument(help="Model folder to measure; without it, the table of families.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what is expected of each family of models, or measure a model (it is loaded in fp32) and compare."""
    from laid_ds.models.family import table
    from laid_ds.models.probe import probe_folder
    from laid_ds.runtime.engine import choose_accelerator

    choose_accelerator()
    if path is None:
        (print_json if as_json else print_table)(table())
        return
    with working(f"measuring {path}"):
        found = probe_folder(path)
    if as_json:
        print_json(found)
        return
    layers = Counter(found["rotary_dims"].values())
    print_facts(found | {"rotary_dims": [f"{dims} in {number} layers" for dims, number in layers.items()]})


@app.command(epilog="Example: laid export runs/demo/laid runs/demo/models/laid")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    output: Annotated[Path, typer.Argument(help="Model folder to write; must not exist.")],
    step: Annotated[int | None, typer.Option(min=1, help="Take the checkpoint of this step; default: the latest.")] = None,
) -> None:
    """Write the trained student as a stock model folder: gain folded in, processor and model card beside it."""
    from laid_ds.export import export_run
    from laid_ds.runtime.engine import choose_accelerator

    choose_accelerator()
    with working(f"exporting {run}"):
        export_run(run, output, step)
    print(f"{output}: loads with transformers' from_pretrained")
    next_step("laid", "eval", "SHARDS", f"student={output}", "--out", run / "evaluation.json")


@app.command(
    "eval",
    epilog="Examples: laid eval runs/demo/test teacher=runs/demo/models/teacher laid=runs/demo/models/laid --out e.json;  "
    "laid eval shards/vhs20 shards/niah qwen=models/qwen --out runs/e/evaluation.json --ranks 8",
)
def evaluate(
    context: typer.Context,
    what: Annotated[
        list[str], typer.Argument(metavar="TASKS... NAME=FOLDER...", help="Folders of shards, and stock model folders by name.")
    ],
    out: Annotated[Path, typer.Option(help="Results file; answers stand beside it (.answers.jsonl) and are not asked again.")],
    sizes: Annotated[
        str | None,
        typer.Option(help="Numbers of images of the windows; default: 1,2,5,10,20,50,100,150 for haystacks, benchmarks as they are."),
    ] = None,
    haystacks: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task; default: 100 haystacks or all, all of a benchmark.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions in each window.")] = 1,
    depths: Annotated[int | None, typer.Option(min=1, help="Ask with the needle at so many places, evenly from the first on.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="teacher-forced (default for haystacks with choices) or generate (default for benchmarks).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a model may say.")] = 64,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Most tokens of a batch with padding, one question at least.")] = 16384,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: bfloat16 on a GPU, else float32.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine; or start this command by a launcher.")] = 1,
    port: Annotated[int, typer.Option(help="Port for the ranks to meet; 0 takes a free one.")] = 0,
    zero3: Annotated[
        bool | None, typer.Option("--zero3/--whole", help="Shard models over the ranks, or not; default: where one GPU is too small.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes of each rank that render ahead; default: a spare core each.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Ask models that have changed since anew.")] = False,
    attention: Annotated[bool, typer.Option("--attention", help="Also record what each head attends to.")] = False,
    number_images: Annotated[
        bool | None, typer.Option("--number-images/--plain-images", help='Write "Image 7: " before the seventh; default: as trained.')
    ] = None,
    image_pixels: ImagePixels = None,
    self_extend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=GROUP,WINDOW", help="Ask this model with SelfExtend (a baseline); may be given more than once."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at tasks and models, and ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as one JSON object.")] = False,
) -> None:
    """Ask models about tasks: haystacks of growing size and imported benchmarks. Every answer is kept as text, and scored."""
    from laid_ds.evaluation.job import leave_when_asked, note_done

    leave_when_asked(os.environ)
    from laid_ds.evaluation.evaluate import How, check
    from laid_ds.evaluation.ranks import evaluate
    from laid_ds.evaluation.results import scores_of
    from laid_ds.evaluation.tasks import Wish

    folders, models = tasks_and_models(what)
    wish = Wish(sizes and _sizes(sizes), haystacks, questions, depths, mode)
    limits = {"max_new_tokens": max_new_tokens, "tokens_per_batch": tokens_per_batch, "workers": _spare_cores(ranks, workers)}
    extended = _extended(self_extend or [], models)
    shown = {"number_images": number_images, "image_pixels": _image_pixels(image_pixels)}
    how = How(dtype or _default_dtype(), **limits, attention=attention, extended=extended, zero3=zero3, again=again, **shown)
    if dry_run:
        tasks = check(folders, models, wish, how, ranks)
        if as_json:
            print_json({"models": list(models), "tasks": [task.setting() | {"left_out": task.left_out} for task in tasks]})
        else:
            print(f"nothing speaks against asking {', '.join(models)} about {', '.join(task.name for task in tasks)}")
        return
    results = evaluate(folders, models, out, wish, how, context.obj, ranks, port)
    if results is not None:
        note_done(os.environ)
        found = [{"model": name, "task": task} | scores for name, task, scores in scores_of(results)]
        if as_json:
            print_json({"out": str(out), "scores": found})
        else:
            print_table(found)
            next_step("laid", "report", out.parent)


@app.command(epilog="Example: laid probe models/teacher data/test --student models/student --out probe.json")
def probe(
    model: Annotated[Path, typer.Argument(help="Stock model folder, the teacher's as a rule.")],
    shards: Annotated[Path, typer.Argument(help="Haystacks with recorded needles.")],
    student: Annotated[
        Path | None, typer.Option(help="Look at this student, too, and propose align.pairs and align.heads for the two.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images in each haystack, or texts; a student that is lost there is shown half as many.")
    ] = 16,
    haystacks: Annotated[int | None, typer.Option(min=1, help="Haystacks to look at; default: 32, or all of a smaller set.")] = None,
    image_pixels: ImagePixels = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON into this file: a recipe's align.probe.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of the weights.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which layers and heads of a model look at the needle when they answer, and from how far."""
    from laid_ds.disk import writing
    from laid_ds.evaluation.heads import Probe
    from laid_ds.evaluation.retrieval import measure, measure_student
    from laid_ds.models.load import load_config
    from laid_ds.runtime.checkpoint import write_durably
    from laid_ds.runtime.engine import choose_accelerator

    choose_accelerator()
    limits = _image_pixels(image_pixels)
    if student is not None:
        load_config(student)
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; name a file in it, as {out / 'probe.json'}")
        with writing(out.parent, out.name):
            out.parent.mkdir(parents=True, exist_ok=True)
    with working(f"looking where {model} looks"):
        found = measure(model, shards, images, haystacks, dtype, limits)
    tree, text = found.as_json(), [found.as_text()]
    if student is not None:
        with working(f"looking where {student} looks"):
            other = measure_student(student, shards, images, haystacks, dtype, limits)
        choice = Probe(found.looks, other.looks).proposed()
        tree |= {"student": other.as_json()} | choice.as_json()
        text += [other.as_text(), choice.as_text(out)]
    if out is not None:
        write_durably(out, json.dumps(tree, indent=1))
    if as_json:
        print_json(tree)
    else:
        print("\n\n".join(text))


@app.command(epilog="Example: laid yarn models/student models/student-yarn --factor 4")
def yarn(
    model: Annotated[Path, typer.Argument(help="Stock model folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    factor: Annotated[float, typer.Option(help="How many times as long the window of positions shall be.")],
) -> None:
    """Copy a model folder with YaRN in its config (a baseline: a longer window without training); the weights stay as they are."""
    from laid_ds.models.extension import write_yarn
    from laid_ds.runtime.engine import choose_accelerator

    choose_accelerator()
    with working(f"copying {model}"):
        write_yarn(model, output, factor)
    print(f"{output}: positions stretched {factor:g} times by YaRN")


Baseline = Annotated[str, typer.Option(help="Model whose one-image skill sets the threshold.")]


@app.command(epilog="Examples: laid report runs/demo;  laid report runs/laid runs/e;  laid report runs/e --official runs/e/official")
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Runs, results of `laid eval`, logs of lmms-eval, or folders that hold some; runs may be going on.")
    ],
    baseline: Baseline = "student",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and report/; default: the first folder.")] = None,
    official: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Also write the answers as the benchmarks' own scorers take them, into a new folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object.")] = False,
) -> None:
    """Write one self-contained report.html: windows, training, attention, answers, recipe; its pictures and data stand in report/."""
    from laid_ds.evaluation.official import write_official
    from laid_ds.evaluation.summary import all_answers
    from laid_ds.report.write import write_report

    with working("bootstrapping windows, drawing and writing"):
        summary = write_report(folders, baseline, out)
    answers = [answer for folder in folders for answer in all_answers(folder)] if official else []
    files = {} if official is None else {"official": write_official(answers, official)}
    if as_json:
        print_json(summary.as_json() | files)
        return
    print(summary.as_text())
    print("".join(f"official: {benchmark}, {len(paths)} files\n" for benchmark, paths in files.get("official", {}).items()), end="")
    print(f"next: open {summary.path} in a browser")


@app.command(epilog="Example: laid compare runs/demo/laid runs/demo/kl+sft --out runs/demo/compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs, with or without an evaluation in them.")],
    baseline: Baseline = "student",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and report/; default: `compare` beside the first run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object.")] = False,
) -> None:
    """Write the page of `laid report` for several runs side by side; of their recipes it shows where they differ."""
    if len(runs) < 2:
        raise ValueError("give at least two runs to compare; `laid report RUN` is for one")
    from laid_ds.report.write import write_report

    with working("bootstrapping windows, drawing and writing"):
        summary = write_report(runs, baseline, out or runs[0].resolve().parent / "compare")
    if as_json:
        print_json(summary.as_json())
        return
    print(summary.as_text())
    print(f"next: open {summary.path} in a browser")


@app.command(
    epilog="Examples: laid study recipes/study/small.toml --world runs/demo;  laid study recipes/study/*.toml --report docs/study.md"
)
def study(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY.toml...", help="The study; with --report one or more.")],
    world: Annotated[Path | None, typer.Option(help="Folder of the models and shards that the study names by {world}.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to work in; default: runs/study/STUDY/WORLD.")] = None,
    results: Annotated[Path | None, typer.Option(help="Its lines; default: STUDY.jsonl beside the study.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ARM", help="Only this arm (and the student before); may be repeated.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds of the study, separated by commas.")] = None,
    teachers: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this teacher; may be repeated.")] = None,
    unswept: Annotated[bool, typer.Option("--unswept", help="Leave out the sweep: every arm takes its first value.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Jobs at a time; default: one for each core.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would run and how long it takes, and run nothing.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="PAGE.md", help="Run nothing; write the page from the lines alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run arms x seeds that one file describes, each to one line of results; finished ones are never run again. Or write them up.

    An arm is trained, exported and asked by the commands of this project. Killed or stopped, the same command goes on (docs/study.md).
    """
    from laid_ds.study.file import read_study

    read = [(path, read_study(path)) for path in studies]
    if report is not None:
        from laid_ds.study.page import write_page

        if results is not None and not results.is_file():
            raise ValueError(f"--results {results} is no file; give the lines that the study wrote, or leave it out")
        with working("bootstrapping, drawing and writing"):
            found = write_page([(study, path, _results_of(path, results)) for path, study in read], report)
        print_json(found) if as_json else print(f"{report}: {found['lines']} lines of {len(read)} studies")
        return
    if len(read) > 1 or world is None:
        raise ValueError("give one study and its --world to run; several are for --report PAGE.md")
    from laid_ds.study.jobs import Wanted, check_trained
    from laid_ds.study.runner import Work, run
    from laid_ds.study.telling import told

    ((path, one),) = read
    world = world.resolve()
    if not world.is_dir():
        raise ValueError(f"--world {world} is no folder")
    places = (world, (out or Path("runs/study") / path.stem / world.name).resolve(), _results_of(path, results))
    part = (tuple(only or ()), tuple(sorted(set(_numbers("--seeds", seeds))) if seeds is not None else ()), tuple(teachers or ()))
    work = Work(one, path, *places, Wanted(*part, unswept))
    at_once = jobs or os.cpu_count() or 1
    plan = told(work, at_once)
    if dry_run:
        check_trained(work.open_jobs())
        print_json(plan.as_json()) if as_json else print(plan.as_text())
        return
    say(plan.sentence())
    with working(f"study {path.stem} in {world.name}", len(plan.rows)) as advance:
        failed = run(work, at_once, threads, advance)
    if as_json:
        print_json({"results": str(work.lines_file), "lines": len(work.lines()), "failed": failed})
    else:
        print(f"{work.lines_file}: {len(work.lines())} lines of {world.name}")
        next_step("laid", "study", path, *(["--results", results] if results else []), "--report", work.out / "study.md")
    raise typer.Exit(int(bool(failed)))


def _results_of(study: Path, results: Path | None) -> Path:
    return results or own_or_shipped(study).with_suffix(".jsonl")


@app.command(epilog="Examples: laid plan recipes/demo.toml --gpus 4 --gpu-memory 80; laid plan my.toml --gpus 8 --tokens 20000 --json")
def plan(
    recipe: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value; section=none removes a section.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, one rank each.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, max=1e6, help="GiB of one GPU.")] = 80,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of one micro-batch on one GPU, padding included; default: as the shards have it, or 8192."),
    ] = None,
    student_config: Annotated[Path | None, typer.Option(help="JSON config of the student, where its folder is not here.")] = None,
    teacher_config: Annotated[Path | None, typer.Option(help="The same for the teacher.")] = None,
    peak_tflops: Annotated[
        float, typer.Option(min=0.001, max=1e9, help="Peak of one GPU in the run's dtype (A100 bf16: 312, H100: 989).")
    ] = 312,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that you expect to reach.")] = 0.35,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, memory in bytes.")] = False,
) -> None:
    """Say what a run takes of each GPU, how long it lasts and how many tokens fit, from the models' configs and the index of the shards."""
    from laid_ds import config
    from laid_ds.plan.pair import Machine, read_pair
    from laid_ds.plan.report import plan
    from laid_ds.runtime.engine import choose_accelerator

    choose_accelerator()
    with working("reading the models' configs"):
        configs = [path and own_or_shipped(path) for path in (student_config, teacher_config)]
        pair = read_pair(config.load(recipe, overrides or []), *configs)
        found = plan(pair, Machine(gpus, int(gpu_memory * 2**30), peak_tflops * 1e12, mfu), tokens)
    if as_json:
        print_json(found.as_json())
        return
    print(found.as_text())
    next_step("laid", "train", recipe, *(overrides or []), "--dry-run")


checkpoint = typer.Typer(no_args_is_help=True, help="Look at, verify and remove the checkpoints of a run.")
app.add_typer(checkpoint, name="checkpoint")
checkpoint.command("export", epilog="Example: laid checkpoint export runs/demo/laid models/laid --step 200")(export)
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@checkpoint.command("list", epilog="Example: laid checkpoint list runs/demo/laid")
def list_checkpoints(run: RunFolder, as_json: AsJson = False) -> None:
    """Print the complete checkpoints, oldest first; their files are not read (that is `verify`)."""
    rows = [
        {"name": saved.path.name, "step": saved.step, "ranks": saved.ranks, "bytes": saved.num_bytes, "latest": saved.is_latest}
        for saved in _checkpoints(run)
    ]
    if as_json:
        print_json(rows)
        return
    print_table([{"name": r["name"], "step": r["step"], "ranks": r["ranks"], "MB": r["bytes"] / 1e6, "latest": r["latest"]} for r in rows])


@checkpoint.command(epilog="Example: laid checkpoint verify runs/demo/laid")
def verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Read every file of every checkpoint and compare size and checksum; status 1 when one is damaged."""
    from laid_ds.runtime.checkpoint import damage

    rows = [{"name": saved.path.name, "damage": damage(saved.path)} for saved in track(_checkpoints(run), "reading checkpoints")]
    if as_json:
        print_json(rows)
    else:
        print_table([row | {"damage": row["damage"] or "whole"} for row in rows])
    raise typer.Exit(int(any(row["damage"] for row in rows)))


@checkpoint.command(epilog="Example: laid checkpoint prune runs/demo/laid --keep-last 1")
def prune(
    run: RunFolder,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Newest checkpoints to keep; default: as the run says.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Also keep those of every so many steps; default: as the run says.")] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Remove what is damaged instead; go back to the newest whole one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints. Never the one that the run goes on from, unless --damaged finds it so. Not while the run is running."""
    from laid_ds.run.folder import recorded
    from laid_ds.runtime import checkpoint, lock

    _checkpoints(run)
    with lock.alone(run):
        if damaged:
            with working("reading checkpoints"):
                removed = checkpoint.go_back(run)
        else:
            options = recorded(run)["run"]["checkpoint"]
            removed = checkpoint.prune(run, keep_last or options["keep_last"], keep_every or options.get("keep_every"))
    if as_json:
        print_json({"removed": removed})
    else:
        print(f"removed: {', '.join(removed) or 'nothing'}")


def _checkpoints(run: Path) -> list:
    """Complete checkpoints of a run folder (laid_ds.runtime.checkpoint.Saved). Raises ValueError when there is none."""
    from laid_ds.runtime.checkpoint import all_saved

    found = all_saved(run)
    if not found:
        raise ValueError(f"no checkpoint in {run}; give the folder of a run (its recipe's `output`)")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Launchers may put --local_rank before the words of a rank."""
    try:
        run_app(app, "laid", [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank")])
    except SystemExit as leaving:
        if arguments is None and "RANK" in os.environ:
            end(leaving.code)
        raise


def tasks_and_models(words: list[str]) -> tuple[list[Path], dict[str, Path]]:
    """Folders of shards, and models by name: a word with = that is no folder itself. Raises ValueError where either is missing."""
    named = [word for word in words if "=" in word and not Path(word).is_dir()]
    folders, models = [Path(word) for word in words if word not in named], _named(named)
    if not folders or not models:
        raise ValueError("give at least one folder of shards, and at least one model as NAME=FOLDER")
    return folders, models


def _named(models: list[str]) -> dict[str, Path]:
    wrong = [word for word in models if not all(word.partition("="))]
    if wrong:
        raise ValueError(f"models are given as NAME=FOLDER, got {wrong}")
    named = [word.partition("=")[::2] for word in models]
    twice = sorted({name for name, _ in named if [other for other, _ in named].count(name) > 1})
    if twice:
        raise ValueError(f"the name {twice[0]!r} is given to several models; each needs a name of its own")
    return {name: Path(folder) for name, folder in named}


def _extended(options: list[str], models: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """NAME=GROUP,WINDOW of models that are asked with SelfExtend."""
    found = {}
    for option in options:
        name, _, numbers = option.partition("=")
        group, comma, window = numbers.partition(",")
        if name not in models or not (comma and group.strip().isdigit() and window.strip().isdigit()):
            raise ValueError(f"--self-extend {option!r}: give NAME=GROUP,WINDOW, with the NAME of a model ({', '.join(models)})")
        found[name] = (int(group), int(window))
    return found


def _default_dtype() -> str:
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def _spare_cores(ranks: int, workers: int | None) -> int:
    """Workers of each rank, where their number is not given: one at least, and as many as leave a core to the rank itself, up to 4."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return workers if workers is not None else min(4, max(1, (os.cpu_count() or 1) // here - 1))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: give whole numbers separated by commas") from None


def _sizes(text: str) -> list[int]:
    sizes = sorted(set(_numbers("--sizes", text)))
    if sizes[0] < 1:
        raise ValueError(f"--sizes {text!r}: sizes start at 1")
    return sizes


def _image_pixels(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    limits = _numbers("--image-pixels", text)
    if len(limits) != 2 or not 0 < limits[0] <= limits[1]:
        raise ValueError(f"--image-pixels {text!r}: give the least and the most pixels of a picture, as 3136,200704")
    return limits[0], limits[1]


if __name__ == "__main__":
    main()
