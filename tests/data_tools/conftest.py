"""The data layer's small samples, and a runner of the command line as a user sees it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import json
from dataclasses import dataclass

import pytest
from data_samples import picture

from data_tools import cli


@dataclass
class Outcome:
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def laid_data(monkeypatch, capsys):
    """Run `laid-data ARGS`."""

    def run(*args) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["laid-data", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A root with p0.jpg .. p5.jpg and deep/p6.png, and a file beside the root that nobody may reach."""
    root = tmp_path_factory.mktemp("files") / "root"
    (root / "deep").mkdir(parents=True)
    for number in range(6):
        (root / f"p{number}.jpg").write_bytes(picture(number))
    (root / "deep" / "p6.png").write_bytes(picture(6, "PNG"))
    (root.parent / "secret.jpg").write_bytes(picture(7))
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    return root
