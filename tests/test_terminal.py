"""What holds for every command: version, completion, one sentence for a mistake, documented statuses, progress, and imports that wait."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from data_tools import cli as data_cli
from laid_ds import cli as laid_cli
from laid_ds import terminal
from laid_ds.evaluation import telling
from launch import cli as launch_cli
from tests.support.recipes import write_recipe
from tests.test_json import APPS, CASES, json_of, places  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"laid": "laid_ds.cli", "laid-data": "data_tools.cli", "laid-launch": "launch.cli"}
HEAVY = ("torch", "transformers", "deepspeed", "numpy", "PIL", "webdataset", "matplotlib")
SHORT = {  # what they read is an index or some samples
    *("laid checkpoint list", "laid checkpoint prune", "laid-launch status"),
    *("laid-data info", "laid-data cat", "laid-data preview"),
}


def run(capsys, name: str, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        APPS[name].main([str(word) for word in words])
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


@pytest.mark.parametrize("name", MODULES)
def test_a_command_says_its_version(name, capsys):
    assert run(capsys, name, "--version") == (0, f"{name} {version('laid-ds')}\n", "")


@pytest.mark.parametrize(
    "name, word, whole", [("laid", "tra", "train"), ("laid-data", "resh", "reshard"), ("laid-launch", "req", "requeue")]
)
def test_a_shell_completes_the_name_of_a_command(name, word, whole):
    asked = {f"_{name.upper().replace('-', '_')}_COMPLETE": "complete_bash", "COMP_WORDS": f"{name} {word}", "COMP_CWORD": "1"}
    found = subprocess.run([sys.executable, "-m", MODULES[name]], env=os.environ | asked, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == [whole], found.stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["laid", "trian"], "laid: no such command 'trian'. Did you mean 'train'? (`laid --help`)"),
        (["laid", "checkpoint", "lst"], "laid: no such command 'lst'. Did you mean 'list'? (`laid checkpoint --help`)"),
        (["laid", "train"], "laid: missing argument 'recipe' (`laid train --help`)"),
        (["laid", "train", "r.toml", "--rank", "2"], "laid: no such option: --rank (Possible options: --ranks) (`laid train --help`)"),
        (
            ["laid", "train", "r.toml", "--ranks", "two"],
            "laid: invalid value for '--ranks': ",
        ),
        (["laid", "train", "none.toml"], "laid: no recipe at none.toml"),
        (
            ["laid", "models", "Qwen/Qwen2.5-VL-7B-Instruct"],
            "laid: no model at Qwen/Qwen2.5-VL-7B-Instruct: it is no folder here, and nothing",
        ),
        (["laid-data", "biuld"], "laid-data: no such command 'biuld'. Did you mean 'build'? (`laid-data --help`)"),
        (["laid-data", "build", "csv", "x", "y", "--images", "z"], "laid-data: invalid value for"),
        (["laid-data", "build", "llava", "x", "y", "--images", "z"], "laid-data: image root z is no folder"),
        (["laid-launch", "status", "nowhere"], "laid-launch: no run folder at nowhere"),
        (["laid-launch", "local", "none.toml"], "laid-launch: no recipe at none.toml"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(words, sentence, capsys):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith(sentence)
    assert len(err.splitlines()) == 1


HUB = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.mark.parametrize(
    "command",
    [
        "laid models HUB",
        "laid yarn HUB out --factor 2",
        "laid probe HUB {shards}",
        "laid probe {world}/teacher {shards} --student HUB",
        "laid eval {shards} student=HUB --out {new}",
        "laid train {recipe} student.path=HUB",
        "laid train {recipe} teacher.path=HUB --dry-run",
        "laid-data build folder {lines} {new} --images {images} --processor HUB",
        "laid-data verify {shards} --deep --processor HUB",
        "laid-launch local {recipe} student.path=HUB",
        "laid-launch slurm {recipe} teacher.path=HUB",
    ],
)
def test_a_name_on_the_hub_is_answered_with_what_to_do(command, places, capsys):  # noqa: F811
    name, *words = command.format(**places).replace("HUB", HUB).split()
    status, _, err = run(capsys, name, *words)
    assert status == 2
    assert err.splitlines() == [
        f"{name}: no model at {HUB}: it is no folder here, and nothing is downloaded on the way; if it is a name on the hub,"
        f" `hf download {HUB} --local-dir models/Qwen2.5-VL-7B-Instruct` first, then give models/Qwen2.5-VL-7B-Instruct"
    ]


def test_a_folder_that_is_not_there_is_no_name_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert run(capsys, "laid", "models", "models/student")[2].startswith("laid: no model at models/student (no config.json); give")


def test_a_group_without_a_command_shows_its_help(capsys):
    for words in (["laid"], ["laid", "checkpoint"], ["laid-data"], ["laid-launch"]):
        status, out, err = run(capsys, *words)
        assert status == 2
        assert "Usage: " in out + err


@pytest.mark.parametrize(
    "word, expanded",
    [
        ("~", "HOME"),
        ("~/x", "HOME/x"),
        ("~/x y", "~/x y"),
        ("output=~/run", "output=HOME/run"),
        ("--out=~/e.json", "--out=HOME/e.json"),
        ("a-1=~/m", "a-1=HOME/m"),
        ("~other/x", "~other/x"),
        ("x~/y", "x~/y"),
        ("data.shards=['~/x']", "data.shards=['~/x']"),
        ("export A=~/x", "export A=~/x"),
        ("a=b=~/x", "a=b=~/x"),
    ],
)
def test_home_is_expanded_as_a_shell_would(word, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert terminal.expand_home(word) == expanded.replace("HOME", "/home/me")


def statuses() -> dict[str, str]:
    """Status -> what docs/operations.md says of it."""
    page = (ROOT / "docs" / "operations.md").read_text()
    return dict(re.findall(r"^\| `(\d+)` \| (.*?) \|", page, re.M))


def test_the_documented_statuses_are_those_that_are_tested_here():
    assert set(statuses()) == {"0", "1", "2", "130", "143"}


def test_status_0_and_1_of_what_was_looked_for(places, capsys):  # noqa: F811
    assert run(capsys, "laid-data", "verify", places["shards"])[0] == 0
    assert run(capsys, "laid", "checkpoint", "verify", places["run"])[0] == 0
    shard = sorted(places["shards"].glob("*.tar"))[0]
    data = shard.read_bytes()
    shard.unlink()  # a link of the session's own
    shard.write_bytes(data[:-3000])
    assert run(capsys, "laid-data", "verify", places["shards"])[0] == 1
    assert run(capsys, "laid-data", "repair", places["shards"])[0] == 1
    next(places["run"].glob("checkpoints/*/model_states.pt")).write_bytes(b"y" * 99)
    assert run(capsys, "laid", "checkpoint", "verify", places["run"])[0] == 1


def opened(pipe: Path, process: subprocess.Popen) -> int:
    """The writing end of a pipe, once the process reads."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # nobody reads yet
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    pytest.fail(process.communicate()[1])


def ended_by(number: int, process: subprocess.Popen) -> tuple[str, str]:
    """(stdout, stderr). Python looks for signals between its own steps: one that comes just before a read waits for the next one."""
    while True:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=20)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_status_130_and_143_of_what_was_interrupted(number, status, tmp_path):
    """A build that waits for its source, which is a pipe; -15 is what a shell calls 143."""
    os.mkfifo(tmp_path / "entries.json")
    command = [sys.executable, "-m", "data_tools.cli", "build", "llava", tmp_path / "entries.json", tmp_path / "out", "--images", tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pipe = opened(tmp_path / "entries.json", process)
    out, err = ended_by(number, process)
    os.close(pipe)
    assert (process.returncode, out, err) == (status, "", "")


class Still(io.StringIO):
    def wait_for(self, text: str) -> None:
        for _ in range(3000):
            if text in self.getvalue():
                return
            time.sleep(0.01)
        pytest.fail(f"{text!r} never came, but {self.getvalue()!r}")


def still(monkeypatch, seconds: float) -> Still:
    """stderr from here on, and the seconds between its lines; not as a fixture, after which pytest puts its own stderr back."""
    monkeypatch.setattr(terminal, "SECONDS_PER_LINE", seconds)
    monkeypatch.setattr(sys, "stderr", Still())
    return sys.stderr


def test_what_lasts_tells_of_itself_without_a_terminal(monkeypatch):
    stderr = still(monkeypatch, 0.01)
    with terminal.working("loading"):
        stderr.wait_for("loading: still at it, 0 s\n")
    assert list(terminal.track((stderr.wait_for(f"reading: {i} of 3") or i for i in range(3)), "reading", 3)) == [0, 1, 2]
    with terminal.working("counting") as advance:
        advance(1200)
        stderr.wait_for("counting: 1,200")


def test_a_bar_on_a_terminal_takes_nothing_from_stdout(monkeypatch):
    """stderr is a terminal here, stdout a file."""
    stdout = io.StringIO()
    leader, follower = pty.openpty()
    with open(follower, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(sys, "stdout", stdout)
        for _ in terminal.track([1, 2, 3], "counting"):
            print("{}")
    shown = b""
    with suppress(OSError):  # the other side is closed, and all is read
        while part := os.read(leader, 10_000):
            shown += part
    os.close(leader)
    assert stdout.getvalue() == "{}\n{}\n{}\n"
    assert b"counting" in shown
    assert b"{}" not in shown


def test_other_ranks_and_what_is_short_say_nothing(monkeypatch):
    stderr = still(monkeypatch, 1000)
    with terminal.working("elsewhere", active=False) as advance:
        advance(1)
    assert list(terminal.track([1, 2], "quick")) == [1, 2]
    assert stderr.getvalue() == ""


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """The labels of what tells of itself."""
    labels, lines = [], terminal._lines

    def recorded(label, total):
        labels.append(label)
        return lines(label, total)

    def asking(name, *rest):
        labels.append(name)
        return asking_lines(name, *rest)

    asking_lines = telling._lines
    monkeypatch.setattr(terminal, "_lines", recorded)
    monkeypatch.setattr(telling, "_lines", asking)
    return labels


@pytest.mark.parametrize("command", sorted(CASES.keys() - SHORT))
def test_every_command_that_may_last_tells_of_itself(command, places, told, capsys):  # noqa: F811
    json_of(capsys, command, places)
    assert told


def test_training_and_init_and_yarn_tell_of_themselves_and_of_what_comes_next(world, told, tmp_path, capsys):
    recipe = write_recipe(world.run(tmp_path / "run"), tmp_path / "recipe.toml")
    assert run(capsys, "laid", "train", recipe, "--dry-run")[0] == 0
    assert run(capsys, "laid", "yarn", world.student, tmp_path / "yarn", "--factor", "2")[0] == 0
    words = (world.folder / "student.json", tmp_path / "new model", "--corpus", world.shards)
    status, out, _ = run(capsys, "laid", "init", *words)
    assert status == 0
    assert out.splitlines()[-1] == f"next: laid train RECIPE 'student.path={tmp_path / 'new model'}'"
    assert told == ["looking at models, data and disk", f"copying {world.student}", "reading samples", "making the model and its tokenizer"]


@pytest.mark.parametrize(
    "command, expected",
    [
        ("laid plan", "next: laid train {recipe} --dry-run"),
        ("laid report", "next: open {results}/report.html in a browser"),
        ("laid-data build", "next: laid-data verify {new} --deep"),
        ("laid-data import", "next: laid-data verify {new} --deep"),
    ],
)
def test_a_command_says_what_comes_next(command, expected, places, capsys):  # noqa: F811
    name, *verb = command.split()
    status, out, _ = run(capsys, name, *verb, *(word.format(**places) for word in CASES[command]))
    assert status == 0
    assert out.splitlines()[-1] == expected.format(**places)


def imported(code: str) -> set[str]:
    """The modules that a process holds after it ran this."""
    tell = "\nimport sys\nprint('MODULES', *sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code + tell], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(found.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize("name", MODULES)
def test_help_imports_nothing_heavy(name):
    words = "['--help']" if name != "laid-data" else "['info', '--help']"
    modules = imported(f"from {MODULES[name]} import main\ntry:\n    main({words})\nexcept SystemExit:\n    pass")
    assert MODULES[name] in modules
    assert not {"torch", "transformers", "deepspeed", "matplotlib"} & modules
    if name != "laid-data":  # whose verb `synth` makes pictures
        assert not set(HEAVY) & modules


@pytest.mark.parametrize("name, words", [("laid", ["train"]), ("laid-launch", ["local"])])
def test_the_first_line_of_training_comes_before_the_heavy_imports(name, words, world, tmp_path):
    recipe = write_recipe(world.run(tmp_path / "run"), tmp_path / "recipe.toml")
    watch = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            print("HEAVY", name, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
from {MODULES[name]} import main
main({[*words, str(recipe)]!r})
"""
    found = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, cwd=ROOT)
    lines = found.stdout.splitlines()
    terms = "1 sft + 1 kl + 1 align + 1 match"
    assert lines[0] == f"tiny: 4 steps of {terms} into {tmp_path / 'run'}; first a look at its models, data and disk", found.stderr
    assert lines[1].startswith("HEAVY ")


def test_a_table_is_plain_where_no_terminal_is(capsys):
    terminal.print_table([{"name": "[b]x[/b]", "bytes": 1234567, "latest": True}, {"name": "y" * 200, "bytes": 5, "latest": None}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "bytes", "latest"]
    assert lines[1].split() == ["[b]x[/b]", "1,234,567", "yes"]
    assert lines[2].split() == ["y" * 200, "5", "-"]
    terminal.print_table([])
    assert capsys.readouterr().out == ""


def test_an_error_that_is_ours_keeps_its_traceback():
    app = typer.Typer()

    @app.command()
    def fails() -> None:
        raise OSError("of no file")

    with pytest.raises(OSError, match="of no file"):
        terminal.run_app(app, "fails", [])


def test_the_commands_are_these_three():
    assert {laid_cli, data_cli, launch_cli} == set(APPS.values())
    scripts = (ROOT / "pyproject.toml").read_text()
    assert all(f'{name} = "{module}:main"' in scripts for name, module in MODULES.items())
