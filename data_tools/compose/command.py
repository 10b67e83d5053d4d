"""The command line of `laid-data compose`. Only wiring, and what it prints."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_tools.console import show
from laid_ds.terminal import next_step

Format = Literal["questions", "llava", "vqa", "coco", "vhs", "classes", "shards"]
EXAMPLE = """Examples:

laid-data compose questions mine.jsonl --images pictures --rule class --train data/train --test data/test

laid-data compose vqa questions.json annotations.json --instances instances.json --lead "With the {class}: " --images coco --train data/t

laid-data compose vhs instances_train2017.json --images train2017 --train data/vhs

laid-data compose classes animals --choices 4 --train data/train --test data/test"""


def compose(
    format: Annotated[Format, typer.Argument(help="What the files hold.", show_default=False)],
    files: Annotated[list[Path], typer.Argument(help="The files; for classes and shards, folders.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="Folder under which the pictures lie.", show_default=False)] = None,
    train: Annotated[Path | None, typer.Option(help="New folder for the training set.", show_default=False)] = None,
    test: Annotated[Path | None, typer.Option(help="New folder for the test set, of other pictures.", show_default=False)] = None,
    samples: Annotated[int | None, typer.Option(help="Haystacks to train on; 1000, for vhs 5000.", min=1, show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="Images in each, as 20 or 2-20; 20, for vhs 2-20.", show_default=False)] = None,
    questions: Annotated[int, typer.Option(help="Questions in each haystack.", min=1)] = 1,
    test_samples: Annotated[int | None, typer.Option(help="Haystacks to test on; 100.", min=1, show_default=False)] = None,
    test_size: Annotated[str | None, typer.Option(help="Images in each; the most of --size unless given.", show_default=False)] = None,
    test_share: Annotated[
        float | None, typer.Option(help="Share of the pictures for the test, where both sets are written; 0.2.", show_default=False)
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="class|caption|question",
            help="What no distractor may have in common with the picture asked about.",
            show_default=False,
        ),
    ] = None,
    lead: Annotated[str, typer.Option(help='Words before each question, as "For the image with the {class}: ".', show_default=False)] = "",
    instances: Annotated[list[Path] | None, typer.Option(help="COCO instances file: classes of the pictures.", show_default=False)] = None,
    captions: Annotated[list[Path] | None, typer.Option(help="COCO captions file: captions of the pictures.", show_default=False)] = None,
    apart_from: Annotated[
        list[Path] | None, typer.Option(help="Data set whose pictures are left out; may be given again.", show_default=False)
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="Answers to choose from, as yes,no; others are not asked.", show_default=False)
    ] = None,
    choices: Annotated[
        int | None, typer.Option(help="Ask only what offers so many answers; classes: 4.", min=2, show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.", min=0)] = 0,
    licence: Annotated[str, typer.Option(help="Licence to record with each sample.")] = "",
    source_name: Annotated[str, typer.Option(help="Source to record with each sample; the file's name unless given.")] = "",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on after bad rows and pictures; rejected.jsonl names each.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Field to leave out; may be given again.", show_default=False)] = None,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every picture once, not only its header.")] = True,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Links among the pictures may lead out of their folder.")] = False,
    jobs: Annotated[int, typer.Option(help="Threads that read pictures.", min=1)] = os.cpu_count() or 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Draw and check, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compose haystacks of single pictures with their questions; check them for shortcuts; write a training and a test set.

    Example: laid-data compose questions mine.jsonl --images pictures --rule class --train data/train --test data/test
    """
    from data_tools.compose.compose import Compose
    from data_tools.compose.compose import compose as run

    plan = Compose(
        format,
        tuple(files),
        images,
        train=train,
        test=test,
        samples=samples,
        size=_bounds("--size", size),
        questions=questions,
        test_samples=test_samples,
        test_size=_bounds("--test-size", test_size),
        test_share=test_share,
        rule=rule,
        lead=lead,
        instances=tuple(instances or ()),
        captions=tuple(captions or ()),
        apart_from=tuple(apart_from or ()),
        answers=tuple(answer.strip() for answer in answers.split(",")) if answers else (),
        choices=choices,
        seed=seed,
        licence=licence,
        source_name=source_name,
        skip_bad=skip_bad,
        ignore=tuple(ignore or ()),
        decode=decode,
        follow_links=follow_links,
        jobs=jobs,
    )
    result = run(plan, dry_run)
    steps = [] if dry_run else _next(train, test)
    if json:
        show(result | {"next": list(map(shlex.join, steps))}, True)
        return
    print("\n".join(lines_of(result)))
    for words in steps:
        next_step(*words)


def _bounds(option: str, text: str | None) -> tuple[int, int] | None:
    """(least, most) of "20" or "2-20"."""
    from laid_ds.data.record import MAX_IMAGES

    if text is None:
        return None
    least, _, most = text.partition("-")
    if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least) <= MAX_IMAGES:
        raise ValueError(f"{option} {text!r}: give a number of images, or least-most, from 1 to {MAX_IMAGES}")
    return int(least), int(most or least)


def _next(train: Path | None, test: Path | None) -> list[list[str]]:
    """Commands that one runs after this one."""
    look = ["laid-data", "preview", str(train or test), "--sheet", "preview.png"]
    held_out = ["--test", str(test)] if test else []
    learn = ["laid", "new", "RECIPE.toml", "--student", "STUDENT", "--teacher", "TEACHER", "--data", str(train), *held_out]
    ask = ["laid", "eval", str(test), "NAME=MODEL_FOLDER", "--out", "evaluation.json"]
    return [look, *([learn] if train else []), *([ask] if test else [])]


def lines_of(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    lines = [f"pool: {result['pictures']} pictures, {result['questions_in_pool']} questions by their words"]
    lines += [f"  {option}: lists {count} of the pictures" for option, count in result.get("listed", {}).items()]
    lines += [f"  left out: {count} {reason}" for reason, count in result.get("left_out", {}).items()]
    if "rejected" in result:
        lines.append(f"  refused: {result['rejected']} rows and pictures; rejected.jsonl names each")
    for name in ("train", "test"):
        if name in result:
            lines += _part_lines(name, result[name])
    return lines


def _part_lines(name: str, part: dict[str, Any]) -> list[str]:
    least, most = part["images_in_a_sample"]
    size = f"{least}" if least == most else f"{least} to {most}"
    answers = ", ".join(f"{answer} {count}" for answer, count in part["answers"].items())
    answers += f", others {part['other_answers']}" if part["other_answers"] else ""
    depths = " ".join(f"{count:g}" for count in part["needles_by_tenth_of_depth"])
    lines = [
        f"{name}: {part.get('folder', '(not written)')}",
        f"  {part['samples']} haystacks of {size} images from {part['pictures_to_draw_from']} pictures, {part['questions']} questions",
        f"  answers: {answers}",
        f"  needles by tenth of depth: {depths}",
        "  what can be answered without the needle   accuracy   chance   standard error   above chance by",
    ]
    return [*lines, *(shortcut_line(row) for row in part["shortcuts"])]


def shortcut_line(row: dict[str, Any]) -> str:
    """A baseline for people."""
    above = f"{row['errors_above_chance']:+.1f} standard errors"
    return f"    {row['baseline']:<38}  {row['accuracy']:>8.3f} {row['chance']:>8.3f} {row['error']:>16.4f}   {above}"
