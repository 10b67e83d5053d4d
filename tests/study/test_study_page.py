"""The page follows from the lines: the committed one is what the command makes of the committed lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from laid_ds import cli
from laid_ds.report.figures import WIDE
from laid_ds.report.palette import styles
from laid_ds.study.file import read_study
from laid_ds.study.page import _curves, write_page
from tests.study.study_world import made_up, write_study
from tests.support.world import ROOT

STUDIES = sorted((ROOT / "recipes" / "study").glob("*.toml"))


def test_the_committed_page_is_what_the_command_makes(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["study", *map(str, STUDIES), "--report", str(tmp_path / "study.md"), "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "study.md").read_text() == (ROOT / "docs" / "study.md").read_text()
    committed = {path.name for path in (ROOT / "docs" / "study").iterdir()} if found["figures"] else set()
    assert committed == {f"{name}.{ending}" for name in found["figures"] for ending in ("png", "csv")}
    for name in found["figures"]:
        assert (tmp_path / "study" / f"{name}.csv").read_text() == (ROOT / "docs" / "study" / f"{name}.csv").read_text()


@pytest.mark.parametrize(("arms", "letters"), [(1, 5), (12, 26), (35, 19), (4, 60)])
def test_a_legend_lies_within_its_picture_above_axes_of_one_height(arms, letters):
    names = [f"{i}".rjust(letters, "e") for i in range(arms)]
    figure = Figure(WIDE)
    axes = figure.add_subplot()
    _curves(axes, {name: [(1, 0), (2, 1)] for name in names}, styles(names))
    (left, bottom), (right, top) = axes.get_legend().get_window_extent().get_points()
    assert left >= 0
    assert right <= figure.bbox.x1
    assert top <= figure.bbox.y1
    assert bottom >= axes.get_window_extent().y1 - 1  # one pixel is its own margin
    assert axes.get_window_extent().height / figure.dpi == pytest.approx(0.69 * WIDE[1])


QUOTED = re.compile(r"The (?:made|real) world(?:, with pictures)?: (\w+)")
"""Titles of the sections that README quotes, with the world's name."""


def page_of(world, folder: Path, lines: list[dict], **changes) -> str:
    path = write_study(world, folder, **changes)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page([(read_study(path), path, path.with_suffix(".jsonl"))], folder / "page.md")
    return (folder / "page.md").read_text()


def trained(arm: str, seed: int, ends: float, **values) -> dict:
    steps = {"step": [10, 20, 30], "align": [0.9, 0.5, 0.2], "sft": [1.0, 0.5, 0.25]}
    held = [{"step": 0, "window": 2.0, "censored": False}, {"step": 30, "window": 20.0, "censored": False}]
    return made_up(arm, seed, ends, losses={"align": 0.2, "sft": 0.25}, steps=steps, held_out=held, **values)


def cells(page: str, arm: str) -> list[str]:
    row = next(line for line in page.splitlines() if line.startswith(f"| {arm} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_an_arm_has_its_window_and_is_compared_with_the_student_before_and_the_baseline(world, tmp_path):
    lines = [made_up("before", seed, 4) for seed in (1, 2)]
    lines += [trained(arm, seed, ends, teacher="one") for arm, ends in (("kl+sft", 15), ("align", 60)) for seed in (1, 2)]
    page = page_of(world, tmp_path, lines)
    *_, window, against_before, against_baseline = cells(page, "align")
    assert 40 < float(window.split()[0]) < 80
    assert against_before.startswith("**")
    assert 2.5 < float(against_baseline.strip("*").split()[0]) < 6
    assert cells(page, "kl+sft")[-1] == "1"
    assert cells(page, "before")[-2] == "1"
    assert "sft" not in {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")}, (
        "an arm without lines has no row"
    )
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert names == {f"tiny-w-{name}.{ending}" for name in ("accuracy", "align", "held_out") for ending in ("png", "csv")}
    assert "align,30,0.2" in (tmp_path / "page" / "tiny-w-align.csv").read_text()
    assert "align,30,20" in (tmp_path / "page" / "tiny-w-held_out.csv").read_text()


def test_an_arm_may_be_divided_by_another_that_it_names(world, tmp_path):
    arms = {"before": {"model": "{world}/student"}, "kl+sft": {}, "sft": {}, "align": {"against": "sft"}}
    ends = {"before": 4, "kl+sft": 15, "sft": 30, "align": 60}
    lines = [trained(arm, seed, end) for arm, end in ends.items() for seed in (1, 2)]
    page = page_of(world, tmp_path, lines, arms=arms)
    assert cells(page, "arm")[-1] == "x another"
    assert cells(page, "sft")[-1] == ""
    assert cells(page, "align")[-1].startswith("sft: ")
    as_baseline = page_of(world, tmp_path, lines, arms=arms, baseline="sft")
    assert cells(page, "align")[-1] == f"sft: {cells(as_baseline, 'align')[-2]}"
    only = page_of(world, tmp_path, [line for line in lines if line["arm"] != "sft"], arms=arms)
    assert cells(only, "align")[-1] == "", "without its lines there is nothing to divide by"


def test_a_student_before_that_knows_no_more_than_chance_gives_no_window(world, tmp_path):
    page = page_of(world, tmp_path, [made_up("before", 1, 1e-6), trained("sft", 1, 10)])
    assert cells(page, "sft")[-3:] == ["no window", "", ""]


def test_lines_that_cannot_stand_together_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="lines of the arm 'laid', which"):
        page_of(world, tmp_path, [made_up("laid", 1, 9)])
    with pytest.raises(ValueError, match="arms of w were asked different test haystacks"):
        page_of(world, tmp_path, [made_up("before", 1, 9), made_up("sft", 1, 9, fingerprint="g" * 64)])
    with pytest.raises(ValueError, match="line 1: no result of `laid study`"):
        page_of(world, tmp_path, [{"arm": "sft"}])
    for line in ([], 5, made_up("sft", 1, 9) | {"seed": "1"}, made_up("sft", 1, 9, right=5)):
        with pytest.raises(ValueError, match="line 1: no result of `laid study`"):
            page_of(world, tmp_path, [line])
    path = write_study(world, tmp_path)
    path.with_suffix(".jsonl").write_text(json.dumps(made_up("before", 1, 9)) + "\n")
    with pytest.raises(ValueError, match="two studies are called 'tiny'"):
        write_page([(read_study(path), path, path.with_suffix(".jsonl"))] * 2, tmp_path / "page.md")


def test_the_readme_says_what_the_page_says():
    """Rows that begin with a world and an arm in code type have the page's window and ratios."""
    texts = (ROOT / "docs" / "study.md").read_text().split("\n## ")
    sections = {title[1]: text for text in texts if (title := QUOTED.fullmatch(text.splitlines()[0]))}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (ROOT / "README.md").read_text().splitlines()]
    quoted = [row for row in rows if row[0].strip("`") in sections and row[1].startswith("`")]
    assert {row[0].strip("`") for row in quoted} == set(sections)
    for row in quoted:
        section, arm = sections[row[0].strip("`")], row[1].strip("`")
        page = dict(zip(cells(section, "arm"), cells(section, arm if f"\n| {arm} |" in section else f"{arm}, one"), strict=True))
        window = next(cell for head, cell in page.items() if head.startswith("window in"))
        assert row[-4:] == [page["seeds"], window, page["x before"], page["x kl+sft"]], f"README says of {arm} in {row[0]}: {row[-4:]}"
