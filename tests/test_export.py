"""The model card of an exported student: how it was made, and what the run folder holds of results up to its checkpoint."""

from __future__ import annotations

import json

from laid_ds.export import model_card, results


def lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_results_are_those_up_to_the_checkpoint(tmp_path):
    assert results(tmp_path, "step_000004") == ""
    longest = {2: (7, 900), 3: (12, 600), 8: (99, 9999)}  # images and tokens of the longest samples; one step is after the checkpoint
    seen = [dict(zip(("most_images", "longest_tokens"), longest.get(step, (1, 1)), strict=True)) for step in range(1, 9)]
    lines(
        tmp_path / "metrics.jsonl",
        [{"step": step, "loss": step / 7, "kl": 0.5, "sft": 2.0} | more for step, more in enumerate(seen, 1)],
    )
    held_out = {"accuracy": {"1": 1.0, "8": 0.25}, "threshold": 0.7, "window": 2.3, "censored": False}
    lines(tmp_path / "evaluation.jsonl", [held_out | {"step": 0}, held_out | {"step": 4, "censored": True}, held_out | {"step": 8}])
    answers = {"2": [[1, 0], [1, 1]]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {"laid": {"answers": answers}}}))
    found = results(tmp_path, "step_000004")
    assert "Trained on windows of at most 12 images, and of at most 900 tokens." in found
    assert "after step 4 of the run: loss 0.5714, kl 0.5, sft 2." in found
    assert "Held out after step 4, accuracy by number of images: 1: 1.00, 8: 0.25. Window: at least 2.3 images" in found
    assert "Evaluated, laid, accuracy by number of images: 2: 0.75." in found


def test_a_card_holds_the_run_and_its_results(world, tmp_path):
    run = world.run(tmp_path / "run")
    card = model_card(run, {"torch": "2"}, "step_000004", "Good.")
    assert "## Results\n\nGood.\n\n## The run" in card
    assert json.loads(card.split("```json\n")[1].split("\n```")[0]) == run.model_dump(mode="json")
    assert "Images were shown in the sizes that its stock processor chose" in card
    limited = world.run(tmp_path / "run", data={"image_pixels": [1024, 4096]})
    assert "Images were shown at an area of 1,024 to 4,096 pixels;" in model_card(limited, {}, "step_000004", "")
    assert "## Results" not in model_card(run, {"torch": "2"}, "step_000004", "")
