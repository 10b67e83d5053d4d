"""The data layer's small samples, and a runner of the command line as a user sees it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import json
from dataclasses import dataclass

import pytest

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
