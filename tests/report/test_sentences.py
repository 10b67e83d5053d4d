"""What is not there, half there or nonsense is a page or one sentence; numbers that do not exist are said in words."""

from __future__ import annotations

import json
import re

import pytest

from laid_ds import cli, config
from laid_ds.config import Run, as_tree
from laid_ds.report.recipe import as_toml
from laid_ds.report.write import write_report
from tests.report.report_world import recipe, write_evaluation, write_run


def run(*words) -> int:
    with pytest.raises(SystemExit) as exit_status:
        cli.main([str(word) for word in words])
    return exit_status.value.code or 0


def words_of(page) -> str:
    """The page as it is read, without its data URIs, style, script and pictures."""
    text = re.sub(r"<(style|script|svg)\b.*?</\1>|data:[\w/;,=+]+", "", page.read_text(), flags=re.S)
    return re.sub(r"<[^>]+>", " ", text)


def test_a_baseline_at_or_below_chance_has_no_window_and_no_number_is_infinite(tmp_path, capsys):
    write_evaluation(tmp_path, {"student": 0.0, "laid": 8.0})
    assert run("report", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["threshold"], found["models"]["laid"]["window"]) == (None, None)
    assert "student is at 0.000 with 1 image, not above chance (0.250)" in found["why_no_window"]
    assert run("report", tmp_path) == 0
    said = capsys.readouterr().out
    for text in (said, words_of(tmp_path / "report.html")):
        assert not re.search(r"\b(inf|nan|None)\b", text)
        assert "accuracy >=" not in text
        assert "o window: student is at 0.000 with 1 image" in text


def test_two_windows_beyond_what_was_asked_have_no_ratio(tmp_path):
    write_evaluation(tmp_path, {"student": 1e9, "laid": 1e9, "sft": 2.0})
    summary = write_report(tmp_path, "student")
    assert "no ratio: both reach beyond what was asked" in summary.as_text()
    assert re.search(r"sft .* <= 0\.\d\d x \[no bound, 0\.\d\d\]", summary.as_text())
    told = words_of(summary.path).replace("&#x27;", "'")
    assert re.search(r"sft sees \S+ images \[.*?\]: at most 0\.\d+ times student's window \[no bound, 0\.\d+\]\.", told)
    assert re.search(r"&lt;= 0\.\d\d x \[no bound, 0\.\d\d\]", told), "in the table, too"
    ratios = {name: model["against_baseline"] for name, model in summary.as_json()["models"].items()}
    assert [ratios[name]["at_least"] for name in ("student", "laid", "sft")] == [True, True, False]
    assert all(found["at_most"] for found in ratios.values())
    assert ratios["laid"]["times"] is None


def test_the_first_size_is_called_by_its_name(tmp_path):
    write_evaluation(tmp_path, {"student": 4.0})
    path = tmp_path / "evaluation.json"
    results = json.loads(path.read_text())
    results["setting"]["sizes"] = [4, 8]
    results["models"]["student"]["answers"] = {size: results["models"]["student"]["answers"]["1"] for size in ("4", "8")}
    path.write_text(json.dumps(results))
    page = words_of(write_report(tmp_path, "student").path)
    assert "skill at 4 images" in page
    assert "one-image" not in page


def test_a_run_that_goes_on_has_a_page_again_and_again(tmp_path):
    write_run(tmp_path / "run", 30, planned=100, half_a_line=True)
    first = words_of(write_report(tmp_path / "run", "student").path)
    assert "run: not finished, 30 of 100 steps: it goes on, or was killed" in first
    assert "run went on after step 15 on 4 ranks" in first
    assert "Its held-out window: 2.0 images after step 0, at least 3.0 images after step 30." in first
    write_run(tmp_path / "run", 100)
    assert "run: finished, 100 of 100 steps" in words_of(write_report(tmp_path / "run", "student").path)
    assert len(list((tmp_path / "run" / "report").glob("*.png"))) == len(list((tmp_path / "run" / "report").glob("*.csv"))) >= 10


def test_a_run_that_was_killed_before_its_first_step_has_a_page(tmp_path):
    write_run(tmp_path / "run", 2)
    for name in ("metrics.jsonl", "evaluation.jsonl", "done.json"):
        (tmp_path / "run" / name).unlink()
    assert "not finished, 0 of 2 steps" in words_of(write_report(tmp_path / "run", "student").path)


def test_values_that_are_no_numbers_and_an_older_run_have_a_page(tmp_path):
    write_run(tmp_path / "run", 4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [{"step": line["step"], "loss": float("nan"), "sft": 1.0, "seconds": 0.0} for line in lines]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({"run": record["run"] | {"key_of_old": 1}}))
    blind = {"step": 0, "accuracy": {"1": 0.0}, "threshold": 0.05, "window": 0.0, "censored": False}
    later = blind | {"step": 4, "accuracy": {"1": 0.125}, "window": 1.0, "censored": True}
    (tmp_path / "run" / "evaluation.jsonl").write_text(json.dumps(blind) + "\n" + json.dumps(later) + "\n")
    page = words_of(write_report(tmp_path / "run", "student").path)
    assert "No held-out window of run: the first measurement, whose skill sets the threshold, was not above chance" in page
    assert "held-out window;" not in page


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda results: results["models"]["laid"].pop("answers"), "the answers of laid are not as this version"),
        (lambda results: results["models"]["laid"].update(answers={"1": [1, 0]}), "the answers of laid are not as this version"),
        (lambda results: results["models"].update(laid="good"), "the answers of laid are not as this version"),
        (lambda results: results["models"]["laid"]["answers"]["16"].pop(), "the answers of laid are not as this version"),
        (lambda results: results["models"]["laid"]["answers"]["16"][0].append(None), "the answers of laid are not as this version"),
        (lambda results: results["setting"].pop("haystacks"), "the setting is not as this version"),
        (lambda results: results["setting"].update(sizes="1,2"), "the setting is not as this version"),
        (lambda results: results["setting"].update(unit=5), "the setting is not as this version"),
        (lambda results: results["setting"].update(choices=-4), "the setting is not as this version"),
        (lambda results: results.update(left_out=[5]), "the setting is not as this version"),
        (lambda results: results["models"].pop("student"), "no model 'student' in the results"),
    ],
)
def test_an_evaluation_of_another_version_is_a_sentence(tmp_path, capsys, spoil, sentence):
    write_evaluation(tmp_path, {"student": 2.0, "laid": 4.0})
    results = json.loads((tmp_path / "evaluation.json").read_text())
    spoil(results)
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    (tmp_path / "evaluation.jsonl").unlink()
    assert run("report", tmp_path) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "report.html").exists()


ODD = [("said", None), ("expected", "red"), ("size", "4"), ("depth", "deep"), ("benchmark", "other")]
ODD += [("expected", [5]), ("choices", 5), ("choices", [5, 6]), ("shown", 5), ("question", 5), ("unit", 5), ("benchmark", [])]


@pytest.mark.parametrize("name, value", ODD)
def test_answers_of_another_version_are_a_sentence(tmp_path, capsys, name, value):
    write_evaluation(tmp_path, {"student": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    lines[3][name] = value
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("report", tmp_path) == 2
    said = capsys.readouterr().err
    assert name in said
    assert len(said.strip().splitlines()) == 1


ACCURACY = {"step": 0, "accuracy": {"1": 0.5}, "threshold": 0.3, "window": 1.0, "censored": False}
NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "name, line, sentence",
    [
        ("metrics.jsonl", NESTED, "is nested too deeply to be read"),
        ("metrics.jsonl", json.dumps({"step": 1, "loss": "x"}), "loss is 'x', where a number must stand"),
        ("metrics.jsonl", json.dumps({"step": 1, "seconds": [1]}), "seconds is [1], where a number must stand"),
        *(
            ("evaluation.jsonl", json.dumps(ACCURACY | change), "not a measurement as a run writes it")
            for change in (
                {"accuracy": 5},
                {"accuracy": {}},
                {"accuracy": {"one": 0.5}},
                {"accuracy": {"1": "x"}},
                {"step": "0"},
                {"threshold": "x"},
            )
        ),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_line_that_a_hand_has_changed_is_a_sentence(tmp_path, capsys, name, line, sentence, last):
    write_run(tmp_path / "run", 4)
    path = tmp_path / "run" / name
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{one}\n" for one in ([*lines, line] if last else [line, *lines])))
    assert run("report", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"{path}, line {len(lines) + 1 if last else 1}" in said
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_half_an_answer_at_the_end_is_left_out(tmp_path):
    write_evaluation(tmp_path, {"student": 2.0})
    text = (tmp_path / "evaluation.jsonl").read_text()
    (tmp_path / "evaluation.jsonl").write_text(text[:-40])
    assert write_report(tmp_path, "student").scores["test"]["student"]["answers"] == text.count("\n") - 2


def test_attention_of_another_version_is_left_out(tmp_path):
    write_evaluation(tmp_path, {"student": 2.0, "laid": 4.0}, attention=(2, 2))
    results = json.loads((tmp_path / "evaluation.json").read_text())
    results["models"]["laid"]["attention"] = {"16": {"first": [1, 2]}, "all": 3}
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    write_report(tmp_path, "student")
    maps = {path.stem for path in (tmp_path / "report").glob("attention-*-*.png")}
    assert maps == {f"attention-{kind}-student" for kind in ("needle", "far", "entropy", "distance")}


def test_the_needle_is_shown_by_distance_where_a_head_retrieves_and_was_looked_at_so(tmp_path):
    write_evaluation(tmp_path, {"student": 2.0, "laid": 4.0, "older": 5.0}, attention=(3, 4))
    results = json.loads((tmp_path / "evaluation.json").read_text())
    attention = {name: model["attention"]["16"] for name, model in results["models"].items()}
    for layer in attention["older"].values():
        del layer["needle_mass"]
    attention["laid"]["2"]["marked_mass"] = [0.9, 0.02, 0.5, 0.44]
    attention["laid"]["2"]["needle_mass"] = [[0.0] * 4 + masses for masses in ([0.8, 1.0, 0.9], [1, 1, 1], [0.2, 0.4, 0.8], [1, 1, 1])]
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    write_report(tmp_path, "student")
    rows = (tmp_path / "report" / "needle-by-distance.csv").read_text().splitlines()
    assert rows[0] == "model,from distance,haystacks,mass"
    assert [row.rsplit(",", 1)[0] for row in rows[1:]] == ["laid,8,6", "laid,16,10", "laid,32,8"], "no head of the student retrieves"
    assert [float(row.rsplit(",", 1)[1]) for row in rows[1:]] == pytest.approx([0.5, 0.7, 0.85])
    assert (tmp_path / "report" / "needle-by-distance.png").stat().st_size > 0


def test_compare_shows_where_recipes_differ_and_joins_evaluations_that_asked_the_same(tmp_path, capsys):
    write_run(tmp_path / "a", 10)
    write_run(tmp_path / "b", 10, losses={"kl": 0.0})
    write_evaluation(tmp_path / "a", {"student": 2.0, "laid": 4.0})
    write_evaluation(tmp_path / "b", {"student": 2.0, "laid": 9.0})
    assert run("compare", tmp_path / "a", tmp_path / "b", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["models"]) == {"student", "laid", "b/laid"}
    page = (tmp_path / "compare" / "report.html").read_text()
    differing = page[page.index("Where the recipes differ") : page.index("keys that are alike")]
    assert re.findall(r"<tr><td[^>]*>([\w.]+)</td>", differing) == ["name", "output", "losses.kl"]
    assert run("compare", tmp_path / "a") == 2
    assert "give at least two runs" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_folder_that_gives_nothing_or_stands_twice_is_a_sentence(tmp_path, capsys, command):
    write_run(tmp_path / "a", 10)
    (tmp_path / "pictures").mkdir()
    for second, sentence in (("pictures", f"no results at {tmp_path / 'pictures'}, and no run"), ("./a", "a is given twice")):
        assert run(command, tmp_path / "a", f"{tmp_path}/{second}", "--out", tmp_path / "page") == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "page").exists()


def test_an_evaluation_that_asked_something_else_has_its_own_part_and_is_named(tmp_path, capsys):
    write_evaluation(tmp_path / "a", {"student": 2.0})
    write_evaluation(tmp_path / "b", {"student": 2.0}, haystacks=7)
    assert run("report", tmp_path) == 0
    assert f"on the page alone, since it asked something else: {tmp_path / 'b'}" in capsys.readouterr().out
    assert words_of(tmp_path / "report.html").count("Scores by rule") == 2


def test_another_s_files_stay_and_those_of_the_page_before_go(tmp_path):
    write_run(tmp_path / "run", 5)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.png").write_text("mine")
    write_report(tmp_path, "student")
    assert (tmp_path / "report" / "held-out-run.png").is_file()
    (tmp_path / "run" / "evaluation.jsonl").unlink()
    write_report(tmp_path, "student")
    assert not (tmp_path / "report" / "held-out-run.png").exists()
    assert not (tmp_path / "report" / "held-out-run.csv").exists()
    assert (tmp_path / "report" / "mine.png").read_text() == "mine"


def test_the_recipe_on_the_page_is_the_run(tmp_path):
    tree = recipe(tmp_path, 10, losses={"kl": 0.5}, gain={"enabled": False})
    (tmp_path / "again.toml").write_text(as_toml(tree))
    assert as_tree(config.load(tmp_path / "again.toml")) == tree == as_tree(Run.model_validate(tree))


def test_names_are_text_on_the_page(tmp_path):
    write_evaluation(tmp_path, {"student": 2.0, "<script>$x^$": 4.0})
    page = write_report(tmp_path, "student").path.read_text()
    assert "<script>$x" not in page
    assert "&lt;script&gt;$x^$" in page
