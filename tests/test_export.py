"""The model card of an exported student: how it was made, and what the run folder holds of results up to its checkpoint."""

from __future__ import annotations

import json

from laid_ds.export import model_card, results


def lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_results_are_those_up_to_the_checkpoint(tmp_path):
    assert results(tmp_path, "step_000004") == ""
    lines(tmp_path / "metrics.jsonl", [{"step": step, "loss": step / 7, "kl": 0.5, "sft": 2.0} for step in range(1, 9)])
    held_out = {"accuracy": {"1": 1.0, "8": 0.25}, "threshold": 0.7, "window": 2.3, "censored": False}
    lines(tmp_path / "evaluation.jsonl", [held_out | {"step": 0}, held_out | {"step": 4, "censored": True}, held_out | {"step": 8}])
    answers = {"2": [[1, 0], [1, 1]]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {"laid": {"answers": answers}}}))
    found = results(tmp_path, "step_000004")
    assert "after step 4 of the run: loss 0.5714, kl 0.5, sft 2." in found
    assert "Held out after step 4, accuracy by number of images: 1: 1.00, 8: 0.25. Window: at least 2.3 images" in found
    assert "Evaluated, laid, accuracy by number of images: 2: 0.75." in found


def test_a_card_holds_the_run_and_its_results(world, tmp_path):
    run = world.run(tmp_path / "run")
    card = model_card(run, {"torch": "2"}, "step_000004", "Good.")
    assert "## Results\n\nGood.\n\n## The run" in card
    assert json.loads(card.split("```json\n")[1].split("\n```")[0]) == run.model_dump(mode="json")
    assert "## Results" not in model_card(run, {"torch": "2"}, "step_000004", "")
