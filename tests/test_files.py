"""A file that cannot be read as what it should be is one sentence: which file, which line, what stands there."""

from __future__ import annotations

import json

import pytest

from laid_ds import config
from laid_ds.files import read_json, read_json_lines, read_toml
from laid_ds.models.load import load_config
from laid_ds.models.processor import load_processor
from laid_ds.run.folder import check_output
from laid_ds.runtime.engine import read_deepspeed
from launch.job import read_job

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "data, said",
    [
        (b'{\n "a": 1,\n "b" 2\n}', "FILE is not valid JSON, line 3: '\"b\" 2' (expecting ':' delimiter)"),
        (b'{\n "a": 1,\n "b": {"c', 'FILE is not valid JSON, line 3: \'"b": {"c\' (the file ends too early)'),
        (b'{\n "a": 1,\n', "FILE is not valid JSON, line 3: '' (the file ends too early)"),
        (b'{"a": 1}}', "FILE is not valid JSON, line 1: '{\"a\": 1}}' (extra data)"),
        (b"[1]", "FILE, line 1: '[1]': an object in braces must stand there"),
        (b'{\n "a": 1,\n "a": 2}', "FILE, line 3: '\"a\": 2}': 'a' stands twice"),
        (b'{\n "a": "caf\xe9"}', "FILE, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "FILE, line 1: the file begins as UTF-16; save it as UTF-8"),
        (b" \n", "FILE is empty"),
        (b'{"a":' * 100_000, "FILE is nested too deeply to be read"),
    ],
)
def test_what_is_no_json_is_said_with_its_line(tmp_path, data, said):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert str(error.value) == said.replace("FILE", str(path))


@pytest.mark.parametrize(
    "data, said",
    [
        (
            b'name = "x"\nsteps = 1O\n',
            "FILE is not valid TOML, line 2: 'steps = 1O' (expected newline or end of document after a statement)",
        ),
        (b'name = "x"\n[data\n', "FILE is not valid TOML, line 2: '[data' (expected ']' at the end of a table declaration)"),
        (b'name = "x"\nsteps =', "FILE is not valid TOML, line 2: 'steps =' (invalid value)"),
        (b'name = "x"\nname = "y"\n', "FILE is not valid TOML, line 2: 'name = \"y\"' (cannot overwrite a value)"),
        (b'name = "\xff"\n', "FILE, line 1: byte 0xff is not UTF-8; save the file as UTF-8"),
    ],
)
def test_what_is_no_toml_is_said_with_its_line(tmp_path, data, said):
    path = tmp_path / "x.toml"
    path.write_bytes(data)
    for read in (read_toml, config.load, lambda path: read_job(path, {})):
        with pytest.raises(ValueError) as error:
            read(path)
        assert str(error.value) == said.replace("FILE", str(path))


def test_a_byte_order_mark_is_no_error_where_nobody_else_reads_the_file(tmp_path):
    (tmp_path / "x.json").write_bytes(MARK + b'{"a": 1}')
    (tmp_path / "x.toml").write_bytes(MARK + b"a = 1")
    assert read_json(tmp_path / "x.json") == read_toml(tmp_path / "x.toml") == {"a": 1}


def test_a_folder_in_a_files_place_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        read_json(tmp_path)


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Not what Unicode calls the end of a line or paragraph, which may stand in any answer."""
    path, said = tmp_path / "answers.jsonl", {"said": "a\u2028b\u2029c\x85d\x0ce"}
    path.write_text(json.dumps(said, ensure_ascii=False) + "\n" + json.dumps({"step": 2}) + "\n", encoding="utf-8")
    assert read_json_lines(path) == [said, {"step": 2}]


def test_a_line_that_was_cut_by_a_kill_is_left_out_and_another_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_json_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not valid JSON, line 2: '\{\"step'"):
        read_json_lines(path)


@pytest.mark.parametrize("key", ["stage", "reduce_bucket_size"])
def test_deepspeeds_auto_is_refused_with_its_line(world, tmp_path, key):
    run, path = world.run(tmp_path / "run"), tmp_path / "engine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | {key: "auto"}}, indent=1))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if key in text)
    with pytest.raises(ValueError, match=f"engine.json, line {line}: '{key}' is \"auto\", which transformers' Trainer alone fills in"):
        read_deepspeed(path, "float32", run, trains=True)


@pytest.mark.parametrize("read", [load_config, load_processor])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", [MARK + b"{}", b'{"model_type": ', b"\xff\xfe{\0}\0"])
def test_a_models_files_are_named_too(tmp_path, data, name, read):
    for other in ("config.json", "tokenizer_config.json"):
        (tmp_path / other).write_bytes(data if other == name else b"{}")
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name}.*, line 1: "):
        read(tmp_path)


@pytest.mark.parametrize("data, said", [(b'{"run": {', "line 1: .*the file ends too early"), (b"{}", "holds no run"), (b"", "is empty")])
def test_a_damaged_record_of_a_run_is_one_sentence(world, tmp_path, data, said):
    run = world.run(tmp_path / "run")
    run.output.mkdir()
    (run.output / "run.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"run\.json.*{said}"):
        check_output(run)
