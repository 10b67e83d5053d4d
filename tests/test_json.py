"""With --json a command prints one value that any parser takes, and nothing else; a command that has the option and no case here fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from data_tools import cli as data_cli
from laid_ds import cli as laid_cli
from laid_ds.config import Checkpoint
from laid_ds.data.record import describe
from laid_ds.runtime import checkpoint
from laid_ds.terminal import print_json
from launch import cli as launch_cli
from tests.support.recipes import write_recipe

APPS = {"laid": laid_cli, "laid-data": data_cli, "laid-launch": launch_cli}
CASES = {
    "laid checkpoint list": ("{run}",),
    "laid checkpoint prune": ("{run}", "--keep-last", "1"),
    "laid checkpoint verify": ("{run}",),
    "laid compare": ("{run}", "{results}", "--out", "{new}"),
    "laid eval": ("{shards}", "student={world}/student", "--out", "{new}.json", "--sizes", "1,2", "--haystacks", "2"),
    "laid models": ("{world}/student",),
    "laid new": ("{new}.toml", "--student", "{world}/student", "--teacher", "{world}/teacher", "--data", "{shards}"),
    "laid plan": ("{recipe}",),
    "laid probe": ("{world}/teacher", "{shards}", "--images=2", "--haystacks=2", "--student={world}/student", "--out={new}.json"),
    "laid report": ("{results}",),
    "laid study": ("recipes/study/small.toml", "--report", "{new}.md"),
    "laid-data build": ("folder", "{lines}", "{new}", "--images", "{images}"),
    "laid-data cat": ("{shards}", "train-0-000000"),
    "laid-data export": ("mm-niah", "{shards}", "{new}"),
    "laid-data import": ("llava", "{chat}", "{new}", "--images", "{images}"),
    "laid-data index": ("{shards}",),
    "laid-data info": ("{shards}",),
    "laid-data merge": ("{shards}", "--out", "{new}"),
    "laid-data plan": ("{shards}",),
    "laid-data preview": ("{shards}",),
    "laid-data repair": ("{shards}",),
    "laid-data reshard": ("{shards}", "{new}"),
    "laid-data score": ("vhs", "{scored}"),
    "laid-data shuffle": ("{shards}", "{new}"),
    "laid-data split": ("{shards}", "{new}", "--shares", "a=0.5,b=0.5"),
    "laid-data stats": ("{shards}",),
    "laid-data synth facts": ("{new}", "--samples", "2", "--facts", "2", "--questions", "1"),
    "laid-data synth haystack": ("{new}", "--samples", "2", "--images", "2", "--questions", "1"),
    "laid-data verify": ("{shards}", "--deep"),
    "laid-launch status": ("{run}",),
}
ELSEWHERE = {
    "laid doctor",  # starts ranks and writes below Python's stdout: tests/doctor reads its JSON
    "laid-data compose",  # wants many pictures: every test of tests/data_tools/test_compose.py reads its JSON
}


def commands_with_json() -> Iterator[str]:
    def below(name: str, command) -> Iterator[str]:
        if any("--json" in parameter.opts for parameter in command.params):
            yield name
        for word, inner in getattr(command, "commands", {}).items():
            yield from below(f"{name} {word}", inner)

    for name, module in APPS.items():
        yield from below(name, get_command(module.app))


def test_every_command_with_json_has_a_case():
    assert sorted({*CASES, *ELSEWHERE}) == sorted(commands_with_json())


class Engine:
    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "model_states.pt").write_bytes(b"x" * 99)


@pytest.fixture
def places(world, tmp_path) -> dict[str, Path]:
    """Something of everything that a command can be asked about."""
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoint.save(Engine(), run, {"step": step}, Checkpoint())
    (run / "run.json").write_text(json.dumps({"run": {"checkpoint": {"keep_last": 2}}}))
    shards, images, results, scored = (tmp_path / name for name in ("shards", "images", "results", "scored/2_images"))
    for folder in (shards, images, results, scored):
        folder.mkdir(parents=True)
    for file in world.shards.iterdir():
        os.link(file, shards / file.name)
    picture = a_picture(world)
    (images / f"p.{describe(picture).fmt}").write_bytes(picture)
    name = next(images.iterdir()).name
    (tmp_path / "lines.jsonl").write_text(json.dumps({"images": [name], "question": "Same?", "answer": "no"}))
    said = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"image": name, "conversations": said}]))
    entry = {"conversations": [{"value": "Cat?"}, {"value": "yes"}], "pos_image": [name], "neg_image": [name]}
    (scored / "000.json").write_text(json.dumps({**entry, "result": {"response": "Yes."}}))
    setting = {"fingerprint": "f", "sizes": [1, 4], "haystacks": 2, "questions": 1, "choices": 2, "dtype": "float32", "shards": "s"}
    blind = {"1": [[0], [0]], "4": [[0], [0]]}  # no window, so that ratios to it are no numbers
    models = {name: {"answers": answers} for name, answers in (("student", blind), ("laid", {"1": [[1], [1]], "4": [[1], [1]]}))}
    (results / "evaluation.json").write_text(json.dumps({"setting": setting, "versions": {}, "models": models}))
    return {
        "run": run,
        "world": world.folder,
        "recipe": write_recipe(world.run(tmp_path / "trained"), tmp_path / "recipe.toml"),
        "shards": shards,
        "images": images,
        "lines": tmp_path / "lines.jsonl",
        "chat": tmp_path / "chat.json",
        "results": results,
        "scored": scored.parent,
        "new": tmp_path / "new",
    }


def a_picture(world) -> bytes:
    from laid_ds.data.dataset import Dataset

    return Dataset.open(world.shards).read(0).images[0]


def no_constant(name: str):
    pytest.fail(f"{name} is no JSON")


def json_of(capsys, command: str, places: dict[str, Path]):
    name, *verb = command.split()
    words = [word.format(**places) for word in CASES[command]]
    with pytest.raises(SystemExit) as stopped:
        APPS[name].main([*verb, *words, "--json"])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return json.loads(said.out, parse_constant=no_constant)


@pytest.mark.parametrize("command", CASES)
def test_stdout_is_one_json_value(command, places, capsys):
    assert isinstance(json_of(capsys, command, places), dict | list)


def test_a_number_that_json_has_no_word_for_is_null(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), (1.5, {"c": -float("inf")})], "d": "NaN"})
    assert json.loads(capsys.readouterr().out, parse_constant=no_constant) == {"a": None, "b": [None, [1.5, {"c": None}]], "d": "NaN"}
