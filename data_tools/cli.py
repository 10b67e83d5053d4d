"""`laid-data`: the command line. Only wiring; each verb's work is in the module that it imports.

Exit codes: 0 done and sound, 1 damage was found, 2 bad input or usage.
"""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_tools.compose.command import EXAMPLE, compose
from data_tools.console import show
from laid_ds.terminal import next_step, run_app, with_version, working

app = typer.Typer(
    name="laid-data",
    help="Build, check, repair, look at and convert data sets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.callback()(with_version)


def argument(help: str):
    """An argument that must be given."""
    return typer.Argument(help=help, show_default=False)


def option(help: str, *names: str, **more):
    """An option, by its help first."""
    return typer.Option(*names, help=help, **more)


BuildFormat = Literal["llava", "sharegpt", "obelics", "mmc4", "folder"]
ImportFormat = Literal["vhs", "mm-niah", "mmlongbench", "llava"]
ExportFormat = Literal["vhs", "mm-niah", "lmms-eval"]
Benchmark = Literal["vhs", "mm-niah", "mmlongbench"]

Folder = Annotated[Path, argument("Folder of a data set.")]
Source = Annotated[str, argument("Folder or URL of a data set.")]
Sources = Annotated[list[str], argument("Folders or URLs of data sets.")]
Out = Annotated[Path, argument("New folder for the result.")]
Json = Annotated[bool, option("Print one JSON object.", "--json")]
Jobs = Annotated[int, option("Threads.", min=1)]
Seed = Annotated[int, option("Seed of the random choices.", min=0)]
Tokens = Annotated[str, option('Name of the lengths to use: "estimate" or a processor fingerprint.')]
MaxTokens = Annotated[int | None, option("Leave out longer samples.", show_default=False)]
ShardSamples = Annotated[int, option("Most samples in a shard.", "--samples-per-shard", min=1)]
ShardMegabytes = Annotated[int, option("Most MiB in a shard (one sample may be larger).", "--megabytes-per-shard", min=1)]
Resume = Annotated[bool, option("Go on where an interrupted run stopped.", "--resume")]
Images = Annotated[Path, option("Folder under which the images lie.", show_default=False)]
Prefix = Annotated[str, option("Start of the keys; the number of the entry follows.")]
Decode = Annotated[bool, option("Decode every image to its last row, not only its header.", "--decode/--no-decode")]
Shrink = Annotated[bool, option("Scale down images beyond the limits, which are else refused.", "--shrink")]
KeepRest = Annotated[bool, option("obelics, mmc4: a document may lose images that cannot be read.", "--keep-rest")]
FollowLinks = Annotated[bool, option("Links in the image folder may lead out of it (only a folder that you trust).", "--follow-links")]
Ignore = Annotated[list[str] | None, option("Field of the entries to leave out; may be given again.", show_default=False)]
Processor = Annotated[Path | None, option("Refuse what the processor of this model folder cannot take.", show_default=False)]
SkipBad = Annotated[bool, option("Go on after bad entries; rejected.jsonl names each.", "--skip-bad")]
Licence = Annotated[str, option("Licence to record with each sample.")]
CORES = os.cpu_count() or 1


def _then_verify(out: Path, json: bool) -> None:
    if not json:
        next_step("laid-data", "verify", out, "--deep")


@app.command()
def build(
    format: Annotated[BuildFormat, argument("What the entries look like.")],
    source: Annotated[Path, argument("A JSON list or JSON lines.")],
    out: Out,
    images: Images,
    prefix: Prefix = "sample",
    licence: Licence = "",
    source_name: Annotated[str, option("Source to record with each sample.")] = "",
    samples: ShardSamples = 256,
    megabytes: ShardMegabytes = 512,
    haystack: Annotated[
        bool, option("Each question stands alone, and stays true whichever images are left out or moved.", "--haystack")
    ] = False,
    skip_bad: SkipBad = False,
    decode: Decode = True,
    shrink: Shrink = False,
    follow_links: FollowLinks = False,
    keep_rest: KeepRest = False,
    ignore: Ignore = None,
    processor: Processor = None,
    resume: Resume = False,
    jobs: Jobs = CORES,
    json: Json = False,
) -> None:
    """Build a data set from conversations, documents or questions with images.

    Example: laid-data build llava chat.json shards/chat --images pictures --licence CC-BY-4.0
    """
    from data_tools import build

    bounds, more = (samples, megabytes << 20), (skip_bad, decode, shrink, keep_rest, tuple(ignore or ()), processor)
    plan = build.Build(format, source, images, prefix, licence, source_name, *bounds, *more, haystack=haystack, follow_links=follow_links)
    show(build.build(plan, out, resume=resume, jobs=jobs), json)
    _then_verify(out, json)


app.command(epilog=EXAMPLE)(compose)


@app.command("import")
def import_(
    format: Annotated[ImportFormat, argument("The benchmark or format.")],
    sources: Annotated[
        list[Path], argument("Its file: visual_haystack_20.json, retrieval-image.jsonl, ...; of vhs also several, one for each size.")
    ],
    out: Out,
    images: Images,
    prefix: Prefix = "sample",
    licence: Licence = "",
    seed: Annotated[int | None, option("vhs: seed of the order of images; 0 unless given.", min=0, show_default=False)] = None,
    depth: Annotated[float | None, option("vhs: place of the needle in [0, 1]; without it images are shuffled.")] = None,
    skip_bad: SkipBad = False,
    decode: Decode = True,
    shrink: Shrink = False,
    follow_links: FollowLinks = False,
    ignore: Ignore = None,
    processor: Processor = None,
    resume: Resume = False,
    jobs: Jobs = CORES,
    json: Json = False,
) -> None:
    """Import a benchmark's file, field by field; the original entry stays in the sample's meta.

    Example: laid-data import vhs VHs_large/visual_haystack_{oracle,5,10,20,50,100}.json shards/vhs --images coco
    """
    from data_tools import build

    options = {name: value for name, value in (("seed", seed), ("depth", depth)) if value is not None}
    ignored = tuple(ignore or ())
    more = {"skip_bad": skip_bad, "decode": decode, "shrink": shrink, "ignore": ignored, "processor": processor, "options": options}
    more |= {"follow_links": follow_links, "more_sources": tuple(sources[1:])}
    plan = build.Build(format, sources[0], images, prefix, licence, **more)
    show(build.build(plan, out, resume=resume, jobs=jobs), json)
    _then_verify(out, json)


@app.command()
def export(format: Annotated[ExportFormat, argument("The benchmark's format.")], folder: Source, out: Out, json: Json = False) -> None:
    """Write a data set as a benchmark's files with their images, or as a task folder for lmms-eval's --include_path; exit code 1 if they
    cannot hold all of its samples.

    Example: laid-data export vhs shards/vhs20 exported;  laid-data export lmms-eval shards/vhs20 tasks/vhs20
    """
    from data_tools import benchmark_files

    written = benchmark_files.export(format, folder, out)
    show(written, json)
    raise typer.Exit(1 if any(count for name, count in written.items() if name.startswith("samples_without")) else 0)


@app.command()
def score(
    benchmark: Annotated[Benchmark, argument("Whose rules.")],
    results: Annotated[Path, argument("Folder of results in the benchmark's own form.")],
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Score answers by the benchmark's own rule, and by a strict one beside it.

    Example: laid-data score vhs results/qwen --json
    """
    from data_tools import benchmark_files

    with working("scoring"):
        scored = benchmark_files.score(benchmark, results, seed)
    show(scored, json)


@app.command()
def index(folder: Folder, jobs: Jobs = CORES, json: Json = False) -> None:
    """Make the index files anew from whole shards. What others wrote is left alone and named.

    Example: laid-data index shards/chat
    """
    from data_tools import verify

    show(verify.reindex(folder, jobs), json)


@app.command()
def verify(
    folder: Folder,
    deep: Annotated[bool, option("Also read every record and decode every image.", "--deep")] = False,
    processor: Annotated[Path | None, option("With --deep: name what its processor cannot take.", show_default=False)] = None,
    jobs: Jobs = CORES,
    json: Json = False,
) -> None:
    """Check every byte; exit code 1 and one line for each problem if there are any.

    Example: laid-data verify shards/chat --deep
    """
    from data_tools import verify

    report = verify.verify(folder, deep, jobs, processor)
    show(report, json)
    raise typer.Exit(0 if report["sound"] else 1)


@app.command()
def repair(folder: Folder, jobs: Jobs = CORES, json: Json = False) -> None:
    """Keep every whole sample, name the others, index anew. A damaged shard stays as NAME.damaged; exit code 1 if samples were lost.

    What others wrote is left alone and named.

    Example: laid-data repair shards/chat
    """
    from data_tools import verify

    report = verify.repair(folder, jobs)
    show(report, json)
    raise typer.Exit(1 if report["lost"] else 0)


@app.command()
def info(folders: Sources, json: Json = False) -> None:
    """What the index says: samples, shards, bytes, fingerprint.

    Example: laid-data info shards/chat shards/vhs20
    """
    from data_tools import describe

    show(describe.info(folders), json)


@app.command()
def stats(folders: Sources, tokens: Tokens = "estimate", json: Json = False) -> None:
    """Histograms of lengths, images and needles; sources and licences.

    Example: laid-data stats shards/chat --json
    """
    from data_tools import describe

    show(describe.stats(folders, tokens), json)


@app.command()
def plan(
    folders: Sources,
    world_size: Annotated[int, option("Ranks; of those that share batches, groups.", min=1)] = 1,
    micro_batch: Annotated[int, option("Samples, or packs, of a rank in a micro-step.", min=1)] = 1,
    budget: Annotated[int | None, option("Tokens of a pack; without it nothing is packed.", min=1, show_default=False)] = None,
    group: Annotated[int, option("Packs of similar work side by side.", min=1)] = 8,
    seed: Seed = 0,
    epoch: Annotated[int, typer.Option(min=0)] = 0,
    shuffle: Annotated[str, option("full, none, or a window in samples.")] = "full",
    weights: Annotated[str | None, option("Blend the folders: one weight each, as 0.7,0.3.", show_default=False)] = None,
    tokens: Tokens = "estimate",
    json: Json = False,
) -> None:
    """What an epoch will be: steps, fill, balance over ranks, the first global positions. Reads the index alone.

    Example: laid-data plan shards/chat --world-size 8 --budget 131072
    """
    from data_tools import describe

    with working("planning"):
        planned = describe.plan(folders, describe.Layout(world_size, micro_batch, budget, group, seed, epoch, shuffle, weights, tokens))
    show(planned, json)


@app.command()
def cat(
    folder: Source,
    key: Annotated[str, argument("Key of the sample.")],
    images: Annotated[Path | None, option("Also write its image files into this folder.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Print one sample.

    Example: laid-data cat shards/chat sample-00000042 --images /tmp/look
    """
    from data_tools import preview

    show(preview.cat(folder, key, images), json)


@app.command()
def preview(
    folder: Source,
    first: Annotated[int, option("Number of the first sample.", min=0)] = 0,
    count: Annotated[int, option("How many.", min=1)] = 4,
    sheet: Annotated[Path | None, option("Contact sheet to write (PNG); needles are framed.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Print a few samples, and lay out their images.

    Example: laid-data preview shards/chat --count 8 --sheet chat.png
    """
    from data_tools import preview

    show(preview.preview(folder, first, count, sheet), json)


@app.command()
def reshard(
    folder: Source,
    out: Out,
    samples: ShardSamples = 256,
    megabytes: ShardMegabytes = 512,
    max_tokens: MaxTokens = None,
    tokens: Tokens = "estimate",
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Write the same samples into shards of another size.

    Example: laid-data reshard shards/chat shards/chat64 --samples-per-shard 64
    """
    from data_tools import rewrite

    show(rewrite.reshard(folder, out, rewrite.Bounds(samples, megabytes, resume), tokens, max_tokens), json)


@app.command()
def merge(
    folders: Sources,
    out: Annotated[Path, option("New folder for the result.", show_default=False)],
    samples: ShardSamples = 256,
    megabytes: ShardMegabytes = 512,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Write several data sets as one. Their keys must differ.

    Example: laid-data merge shards/chat shards/vhs20 --out shards/all
    """
    from data_tools import rewrite

    show(rewrite.merge(folders, out, rewrite.Bounds(samples, megabytes, resume)), json)


@app.command()
def split(
    folder: Source,
    out: Out,
    shares: Annotated[str, option("Names and shares of the parts.", show_default=False)],
    seed: Seed = 0,
    samples: ShardSamples = 256,
    megabytes: ShardMegabytes = 512,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Split a data set at random into parts, one folder each under OUT.

    Example: laid-data split shards/chat shards/chat-split --shares train=0.9,val=0.1
    """
    from data_tools import rewrite

    show(rewrite.split(folder, out, rewrite.Bounds(samples, megabytes, resume), shares, seed), json)


@app.command()
def shuffle(
    folder: Source,
    out: Out,
    seed: Seed = 0,
    samples: ShardSamples = 256,
    megabytes: ShardMegabytes = 512,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Write the samples in a random order: for readers that can only read shards from front to back.

    Example: laid-data shuffle shards/chat shards/chat-shuffled --seed 1
    """
    from data_tools import rewrite

    show(rewrite.shuffle(folder, out, rewrite.Bounds(samples, megabytes, resume), seed), json)


if importlib.util.find_spec("data_tools.synth"):
    from data_tools import synth, text_facts

    synth.app.command("facts", epilog="Example: laid-data synth facts runs/facts/train --samples 512 --facts 24 --questions 24")(
        text_facts.facts_command
    )
    app.add_typer(synth.app, name="synth")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run_app(app, "laid-data", arguments)


if __name__ == "__main__":
    main()
