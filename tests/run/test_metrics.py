"""metrics.jsonl: one object per step, whatever was killed and resumed; loggers that are missing are named."""

from __future__ import annotations

import json
import sys

import pytest

from laid_ds.config import Logging
from laid_ds.run.metrics import Reporter, keep_until

VALUES = {"loss": 1.5, "sft": 1.5, "tokens": 10.0, "samples": 2.0, "images": 4.0, "gradient_norm": 0.5, "keys": ["a"]}


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_continuation_replaces_the_lines_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reporter = Reporter(tmp_path, 9, Logging(), True, {})
    reporter.start(0)
    for step in (1, 2, 3, 4):
        reporter.step(step, VALUES)
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while it wrote
    again = Reporter(tmp_path, 9, Logging(), True, {})
    again.start(2)
    again.step(3, VALUES)
    assert steps(path) == [1, 2, 3]


def test_a_file_that_ends_in_the_middle_of_a_line_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    keep_until(path, 5)
    assert steps(path) == [1, 2]


def test_other_ranks_say_and_write_nothing(tmp_path, capsys):
    reporter = Reporter(tmp_path, 9, Logging(), False, {})
    reporter.start(0)
    reporter.step(1, VALUES)
    reporter.say("words")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    reporter = Reporter(tmp_path, 9, Logging(every_steps=2), True, {})
    reporter.start(0)
    for step in (1, 2, 9):
        reporter.step(step, VALUES)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/9", "step 9/9"]
    assert "loss 1.5  ce 1.5  |g| 0.5" in lines[0]


def test_a_minute_after_the_last_line_there_is_another(tmp_path, capsys):
    reporter = Reporter(tmp_path, 9, Logging(every_steps=100), True, {})
    reporter.start(0)
    reporter.step(1, VALUES)
    assert capsys.readouterr().out == ""
    reporter.told -= 60.0
    reporter.step(2, VALUES)
    reporter.step(3, VALUES)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 2/9"]


def computed(samples, tokens, taught):
    return samples * (tokens if taught is None else taught) * 1e10


def test_memory_and_the_share_of_the_peak_are_said(tmp_path, capsys):
    reporter = Reporter(tmp_path, 9, Logging(peak_tflops=2), True, {}, flops=computed)
    reporter.start(0)
    reporter.last -= 4.0  # a step of four seconds
    reporter.step(1, VALUES)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["mfu"] == pytest.approx(2 * 10 * 1e10 / 4 / 2e12, rel=0.01)
    assert 1e7 < record["peak_bytes"] < 1e11
    line = capsys.readouterr().out
    assert f"{record['peak_bytes'] / 2**30:.2f} GiB  MFU 2.5%" in line
    reporter.last -= 4.0
    reporter.step(2, VALUES | {"teacher_tokens": 5})
    fewer = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert fewer["mfu"] == pytest.approx(2 * 5 * 1e10 / 4 / 2e12, rel=0.01), "a teacher that reads less computes less"


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_logger_is_named_with_its_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"laid-ds\[{name}\]"):
        Reporter(tmp_path, 9, Logging(**{name: True}), True, {"name": "x"})
