"""`laid-data`: the command line. Only wiring; each verb's work is in the module that it imports.

Exit codes: 0 done and sound, 1 damage was found, 2 bad input or usage.
"""

import importlib.util
import os
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from data_tools.console import show

app = typer.Typer(
    name="laid-data",
    help="Build, check, repair, look at and convert data sets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(help="Folder of a data set.", show_default=False)]
Source = Annotated[str, typer.Argument(help="Folder or URL of a data set.", show_default=False)]
Sources = Annotated[list[str], typer.Argument(help="Folders or URLs of data sets.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="New folder for the result.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Jobs = Annotated[int, typer.Option(min=1, help="Threads.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random choices.")]
Tokens = Annotated[str, typer.Option(help='Name of the lengths to use: "estimate" or a processor fingerprint.')]
MaxTokens = Annotated[int | None, typer.Option(help="Leave out longer samples.", show_default=False)]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="Most samples in a shard.")]
MegabytesPerShard = Annotated[int, typer.Option(min=1, help="Most MiB in a shard (one sample may be larger).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
Images = Annotated[Path, typer.Option(help="Folder under which the images lie.", show_default=False)]
Prefix = Annotated[str, typer.Option(help="Start of the keys; the number of the entry follows.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on after bad entries; rejected.jsonl names each.")]
Licence = Annotated[str, typer.Option(help="Licence to record with each sample.")]
CORES = os.cpu_count() or 1


class BuildFormat(StrEnum):
    """Formats of `build`."""

    llava = "llava"
    sharegpt = "sharegpt"
    obelics = "obelics"
    mmc4 = "mmc4"
    folder = "folder"


class ImportFormat(StrEnum):
    """Formats of `import`."""

    vhs = "vhs"
    mm_niah = "mm-niah"
    mmlongbench = "mmlongbench"
    llava = "llava"


class ExportFormat(StrEnum):
    """Formats of `export`."""

    vhs = "vhs"
    mm_niah = "mm-niah"


class Benchmark(StrEnum):
    """Benchmarks of `score`."""

    vhs = "vhs"
    mm_niah = "mm-niah"
    mmlongbench = "mmlongbench"


@app.command()
def build(
    format: Annotated[BuildFormat, typer.Argument(help="What the entries look like.", show_default=False)],
    source: Annotated[Path, typer.Argument(help="A JSON list or JSON lines.", show_default=False)],
    out: Out,
    images: Images,
    prefix: Prefix = "sample",
    licence: Licence = "",
    source_name: Annotated[str, typer.Option(help="Source to record with each sample.")] = "",
    samples_per_shard: SamplesPerShard = 256,
    megabytes_per_shard: MegabytesPerShard = 512,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, not only its header.")] = False,
    skip_bad: SkipBad = False,
    resume: Resume = False,
    jobs: Jobs = CORES,
    json: Json = False,
) -> None:
    """Build a data set from conversations, documents or questions with images.

    Example: laid-data build llava chat.json shards/chat --images pictures --licence CC-BY-4.0
    """
    from data_tools.build import Build
    from data_tools.build import build as run

    plan = Build(format, source, images, prefix, licence, source_name, samples_per_shard, megabytes_per_shard << 20, decode, skip_bad)
    show(run(plan, out, resume=resume, jobs=jobs), json)


@app.command("import")
def import_(
    format: Annotated[ImportFormat, typer.Argument(help="The benchmark or format.", show_default=False)],
    source: Annotated[Path, typer.Argument(help="Its file: visual_haystack_20.json, retrieval-image.jsonl, ...", show_default=False)],
    out: Out,
    images: Images,
    prefix: Prefix = "sample",
    licence: Licence = "",
    seed: Seed = 0,
    depth: Annotated[float | None, typer.Option(help="vhs: place of the needle in [0, 1]; without it images are shuffled.")] = None,
    skip_bad: SkipBad = False,
    resume: Resume = False,
    jobs: Jobs = CORES,
    json: Json = False,
) -> None:
    """Import a benchmark's file, field by field; the original entry stays in the sample's meta.

    Example: laid-data import vhs visual_haystack_20.json shards/vhs20 --images coco --seed 1
    """
    from data_tools.build import Build
    from data_tools.build import build as run
    from data_tools.visual_haystacks import read_entry

    reader = partial(read_entry, seed=seed, depth=depth) if format == ImportFormat.vhs else None
    plan = Build(format, source, images, prefix, licence, skip_bad=skip_bad, options={"seed": seed, "depth": depth} if reader else {})
    show(run(plan, out, resume=resume, jobs=jobs, reader=reader), json)


@app.command()
def export(
    format: Annotated[ExportFormat, typer.Argument(help="The benchmark's format.", show_default=False)],
    folder: Source,
    out: Out,
    json: Json = False,
) -> None:
    """Write a data set as a benchmark's files with their images.

    Example: laid-data export vhs shards/vhs20 exported
    """
    from data_tools import mm_niah, visual_haystacks
    from data_tools.console import track
    from laid_ds.data.dataset import Dataset

    dataset = Dataset.open(folder)
    refuse_full(out)
    write = visual_haystacks.write_files if format == ExportFormat.vhs else mm_niah.write_file
    show(write(track(dataset, "export", len(dataset)), out), json)


@app.command()
def score(
    benchmark: Annotated[Benchmark, typer.Argument(help="Whose rules.", show_default=False)],
    results: Annotated[Path, typer.Argument(help="Folder of results in the benchmark's own form.", show_default=False)],
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Score answers by the benchmark's own rule, and by a strict one beside it.

    Example: laid-data score vhs results/qwen --json
    """
    from data_tools import mm_niah, mmlongbench, visual_haystacks

    if not results.exists():
        raise ValueError(f"{results} does not exist")
    if benchmark == Benchmark.vhs:
        show(visual_haystacks.score(results, seed), json)
    else:
        show((mm_niah if benchmark == Benchmark.mm_niah else mmlongbench).score(results), json)


@app.command()
def index(folder: Folder, jobs: Jobs = CORES, json: Json = False) -> None:
    """Make the index files anew from whole shards.

    Example: laid-data index shards/chat
    """
    from data_tools.verify import reindex

    show(reindex(folder, jobs), json)


@app.command()
def verify(
    folder: Folder,
    deep: Annotated[bool, typer.Option("--deep", help="Also read every record and decode every image.")] = False,
    jobs: Jobs = CORES,
    json: Json = False,
) -> None:
    """Check every byte; exit code 1 and one line for each problem if there are any.

    Example: laid-data verify shards/chat --deep
    """
    from data_tools.verify import verify as run

    report = run(folder, deep, jobs)
    show(report, json)
    raise typer.Exit(0 if report["sound"] else 1)


@app.command()
def repair(folder: Folder, jobs: Jobs = CORES, json: Json = False) -> None:
    """Keep every whole sample, name the others, index anew. A damaged shard stays as NAME.damaged; exit code 1 if samples were lost.

    Example: laid-data repair shards/chat
    """
    from data_tools.verify import repair as run

    report = run(folder, jobs)
    show(report, json)
    raise typer.Exit(1 if report["lost"] else 0)


@app.command()
def info(folders: Sources, json: Json = False) -> None:
    """What the index says: samples, shards, bytes, fingerprint.

    Example: laid-data info shards/chat shards/vhs20
    """
    from data_tools.describe import info as run
    from laid_ds.data.dataset import Dataset

    show(run(Dataset.open(folders)), json)


@app.command()
def stats(folders: Sources, tokens: Tokens = "estimate", json: Json = False) -> None:
    """Histograms of lengths, images and needles; sources and licences.

    Example: laid-data stats shards/chat --json
    """
    from data_tools.describe import stats as run
    from laid_ds.data.dataset import Dataset

    show(run(Dataset.open(folders), tokens), json)


@app.command()
def plan(
    folders: Sources,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples, or packs, of a rank in a micro-step.")] = 1,
    budget: Annotated[int | None, typer.Option(min=1, help="Tokens of a pack; without it nothing is packed.", show_default=False)] = None,
    group: Annotated[int, typer.Option(min=1, help="Packs of similar work side by side.")] = 8,
    seed: Seed = 0,
    epoch: Annotated[int, typer.Option(min=0)] = 0,
    shuffle: Annotated[str, typer.Option(help="full, none, or a window in samples.")] = "full",
    weights: Annotated[str | None, typer.Option(help="Blend the folders: one weight each, as 0.7,0.3.", show_default=False)] = None,
    tokens: Tokens = "estimate",
    json: Json = False,
) -> None:
    """What an epoch will be: steps, fill, balance over ranks, the first global positions. Reads the index alone.

    Example: laid-data plan shards/chat --world-size 8 --budget 131072
    """
    from data_tools.describe import plan as run
    from laid_ds.data.dataset import Dataset

    window = int(shuffle) if shuffle.isdecimal() else shuffle
    show(
        run(
            Dataset.open(folders),
            world_size=world_size,
            micro_batch=micro_batch,
            budget=budget,
            group=group,
            seed=seed,
            epoch=epoch,
            shuffle=window,
            tokens=tokens,
            weights=[float(weight) for weight in weights.split(",")] if weights else None,
        ),
        json,
    )


@app.command()
def cat(
    folder: Source,
    key: Annotated[str, typer.Argument(help="Key of the sample.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="Also write its image files into this folder.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Print one sample.

    Example: laid-data cat shards/chat sample-00000042 --images /tmp/look
    """
    from data_tools.preview import cat as run
    from laid_ds.data.dataset import Dataset

    show(run(Dataset.open(folder), key, images), json)


@app.command()
def preview(
    folder: Source,
    first: Annotated[int, typer.Option(min=0, help="Number of the first sample.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 4,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet to write (PNG); needles are framed.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Print a few samples, and lay out their images.

    Example: laid-data preview shards/chat --count 8 --sheet chat.png
    """
    from data_tools.preview import preview as run
    from laid_ds.data.dataset import Dataset

    show(run(Dataset.open(folder), first, count, sheet), json)


@app.command()
def reshard(
    folder: Source,
    out: Out,
    samples_per_shard: SamplesPerShard = 256,
    megabytes_per_shard: MegabytesPerShard = 512,
    max_tokens: MaxTokens = None,
    tokens: Tokens = "estimate",
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Write the same samples into shards of another size.

    Example: laid-data reshard shards/chat shards/chat64 --samples-per-shard 64
    """
    from data_tools.rewrite import rewrite, within
    from laid_ds.data.dataset import Dataset

    dataset = Dataset.open(folder)
    kept = within(dataset, tokens, max_tokens)
    result = rewrite(dataset, kept, out, samples_per_shard=samples_per_shard, bytes_per_shard=megabytes_per_shard << 20, resume=resume)
    show({**result, "left_out": len(dataset) - len(kept)}, json)


@app.command()
def merge(
    folders: Sources,
    out: Annotated[Path, typer.Option(help="New folder for the result.", show_default=False)],
    samples_per_shard: SamplesPerShard = 256,
    megabytes_per_shard: MegabytesPerShard = 512,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Write several data sets as one. Their keys must differ.

    Example: laid-data merge shards/chat shards/vhs20 --out shards/all
    """
    from data_tools.rewrite import rewrite
    from laid_ds.data.dataset import Dataset

    dataset = Dataset.open(folders)
    show(
        rewrite(
            dataset,
            range(len(dataset)),
            out,
            samples_per_shard=samples_per_shard,
            bytes_per_shard=megabytes_per_shard << 20,
            resume=resume,
        ),
        json,
    )


@app.command()
def split(
    folder: Source,
    out: Out,
    shares: Annotated[str, typer.Option(help="Names and shares of the parts.", show_default=False)],
    seed: Seed = 0,
    samples_per_shard: SamplesPerShard = 256,
    megabytes_per_shard: MegabytesPerShard = 512,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Split a data set at random into parts, one folder each under OUT.

    Example: laid-data split shards/chat shards/chat-split --shares train=0.9,val=0.1
    """
    from data_tools.rewrite import rewrite, split_parts
    from laid_ds.data.dataset import Dataset

    dataset = Dataset.open(folder)
    bounds = {"samples_per_shard": samples_per_shard, "bytes_per_shard": megabytes_per_shard << 20, "resume": resume}
    parts = split_parts(dataset, shares, seed)
    show({name: rewrite(dataset, indices, out / name, **bounds) for name, indices in parts.items()}, json)


@app.command()
def shuffle(
    folder: Source,
    out: Out,
    seed: Seed = 0,
    samples_per_shard: SamplesPerShard = 256,
    megabytes_per_shard: MegabytesPerShard = 512,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Write the samples in a random order: for readers that can only read shards from front to back.

    Example: laid-data shuffle shards/chat shards/chat-shuffled --seed 1
    """
    from data_tools.rewrite import rewrite, shuffled
    from laid_ds.data.dataset import Dataset

    dataset = Dataset.open(folder)
    order = shuffled(dataset, seed)
    bounds = {"samples_per_shard": samples_per_shard, "bytes_per_shard": megabytes_per_shard << 20, "resume": resume}
    show(rewrite(dataset, order, out, **bounds), json)


def refuse_full(out: Path) -> None:
    """An export never writes over what is there."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")


if importlib.util.find_spec("data_tools.synth"):
    from data_tools import synth

    app.add_typer(synth.app, name="synth")


def main() -> None:
    """Entry point: whatever is wrong with the input becomes one sentence on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"laid-data: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
