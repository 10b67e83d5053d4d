"""What a checkpoint's files promise: damage is named and never passed over, and only what was asked to be kept is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laid_ds import cli
from laid_ds.config import Checkpoint
from laid_ds.runtime import checkpoint


class Engine:
    """Saves two files, as DeepSpeed does for one rank."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "model_states.pt").write_bytes(b"model" * 1000)
        (Path(folder) / tag / "optim_states.pt").write_bytes(tag.encode() * 1000)


def save(output: Path, *steps: int, **options) -> None:
    for step in steps:
        checkpoint.save(Engine(), output, {"step": step}, Checkpoint(**options))


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step_*"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def command(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["checkpoint", *map(str, words)])
    said = capsys.readouterr()
    return exit_status.value.code or 0, said.out, said.err


def test_the_newest_and_every_so_many_steps_are_kept(tmp_path):
    save(tmp_path, *range(5, 55, 5), keep_last=2, keep_every=20)
    assert names(tmp_path) == ["step_000020", "step_000040", "step_000045", "step_000050"]
    assert checkpoint.latest(tmp_path).name == "step_000050"


def test_steps_are_ordered_as_numbers(tmp_path):
    save(tmp_path, 999_999, 1_000_000, keep_last=1)
    assert names(tmp_path) == ["step_1000000"]


def test_an_abandoned_continuation_goes(tmp_path):
    save(tmp_path, 10, 20, 30, keep_last=3)
    checkpoint.write_durably(tmp_path / "checkpoints" / "latest", "step_000010")
    save(tmp_path, 15, keep_last=3)
    assert names(tmp_path) == ["step_000010", "step_000015"]


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / "step_000020").mkdir()
    (tmp_path / "checkpoints" / "step_000020" / "model_states.pt").write_bytes(b"x")
    assert checkpoint.latest(tmp_path).name == "step_000010"
    assert [saved.step for saved in checkpoint.all_saved(tmp_path)] == [10]


@pytest.mark.parametrize("victim", ["model_states.pt", "optim_states.pt", "random_rank0.pt"])
def test_one_flipped_bit_is_refused_by_name_with_the_way_on(tmp_path, capsys, victim):
    save(tmp_path, 10, 20, 30, keep_last=3)
    flip_a_bit(tmp_path / "checkpoints" / "step_000030" / victim)
    flip_a_bit(tmp_path / "checkpoints" / "step_000020" / victim)
    with pytest.raises(ValueError, match=f"{victim} is damaged .*; step_000010 is whole: `laid checkpoint prune .* --damaged`"):
        checkpoint.latest(tmp_path)
    status, _, said = command(capsys, "prune", tmp_path, "--damaged")
    assert status == 0, said
    assert names(tmp_path) == ["step_000010"]
    assert checkpoint.latest(tmp_path).name == "step_000010"


def test_cut_and_missing_files_are_refused_by_name(tmp_path):
    save(tmp_path, 10)
    victim = tmp_path / "checkpoints" / "step_000010" / "optim_states.pt"
    victim.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"optim_states.pt has 100 bytes, 11000 were saved; no older one is whole"):
        checkpoint.latest(tmp_path)
    victim.unlink()
    with pytest.raises(ValueError, match=r"optim_states.pt has None bytes"):
        checkpoint.latest(tmp_path)
    (tmp_path / "checkpoints" / "step_000010" / "manifest.json").write_text('{"state"')
    with pytest.raises(ValueError, match=r"manifest.json is missing or damaged"):
        checkpoint.latest(tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint; nothing was removed"):
        checkpoint.go_back(tmp_path)
    assert names(tmp_path) == ["step_000010"]


def test_list_verify_and_prune_as_commands(tmp_path, capsys):
    save(tmp_path, 10, 20, keep_last=2)
    (tmp_path / "run.json").write_text(json.dumps({"run": {"checkpoint": {"keep_last": 2, "keep_every": None}}}))
    status, said, _ = command(capsys, "list", tmp_path, "--json")
    assert status == 0
    assert [(row["name"], row["step"], row["ranks"], row["latest"]) for row in json.loads(said)] == [
        ("step_000010", 10, 1, False),
        ("step_000020", 20, 1, True),
    ]
    assert "step_000020" in command(capsys, "list", tmp_path)[1]
    assert command(capsys, "verify", tmp_path)[0] == 0
    flip_a_bit(tmp_path / "checkpoints" / "step_000010" / "optim_states.pt")
    status, said, _ = command(capsys, "verify", tmp_path, "--json")
    assert status == 1
    assert [bool(row["damage"]) for row in json.loads(said)] == [True, False]
    status, said, _ = command(capsys, "prune", tmp_path, "--keep-last", "1", "--json")
    assert (status, json.loads(said)) == (0, {"removed": ["step_000010"]})
    assert names(tmp_path) == ["step_000020"]


def test_a_folder_without_checkpoints(tmp_path, capsys):
    status, _, said = command(capsys, "list", tmp_path)
    assert status == 2
    assert said.strip() == f"laid: no checkpoint in {tmp_path}; give the folder of a run (its recipe's `output`)"
