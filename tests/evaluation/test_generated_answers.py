"""`laid eval` on benchmarks: what is said is kept as text, the same by one process and by ranks, killed or not, and in linear memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.measure import added_peak_mb
from laid_ds import cli
from laid_ds.data.batch import collate_prompts
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import needle_at
from laid_ds.data.images import Pixels
from laid_ds.data.record import DataError, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation.answers import answers_file, read_answers
from laid_ds.evaluation.evaluate import How, evaluate_models
from laid_ds.evaluation.tasks import Wish
from laid_ds.models.attention import listen_to_windows
from laid_ds.models.generate import generate
from laid_ds.models.load import load_model
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.runtime import engine
from tests.support import benchmarks
from tests.support.processes import run_ranks, start_ranks, wait_until
from tests.support.world import ROOT

FAMILIES = ("qwen2_5_vl", "internvl")
SAID = How(max_new_tokens=5, tokens_per_batch=200)


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory) -> dict[str, Path]:
    """Imported files of three benchmarks: images in front, among words, to choose from, of documents."""
    folder = tmp_path_factory.mktemp("benchmarks")
    pictures = folder / "pictures"
    names = benchmarks.write_pictures(world.shards, pictures, 16)
    for i in range(4):
        shutil.copytree(pictures, pictures / f"doc-{i}", ignore=shutil.ignore_patterns("doc-*"))
    made = {
        "visual_haystack_5": ("vhs", benchmarks.visual_haystacks(names, 7, 5)),
        "visual_haystack_oracle": ("vhs", benchmarks.visual_haystacks(names, 3, 2, needles=2)),
        "reasoning-image": ("mm-niah", benchmarks.mm_niah(names, 5, "reasoning-image")),
        "counting-text": ("mm-niah", benchmarks.mm_niah(names, 4, "counting-text")),
        "retrieval-text": ("mm-niah", benchmarks.mm_niah(names, 4, "retrieval-text")),
        "slidevqa": ("mmlongbench", benchmarks.mmlongbench(names, 4, "slidevqa")),
        "infoseek": ("mmlongbench", benchmarks.mmlongbench(names, 3, "infoseek")),
    }
    return {name: benchmarks.import_shards(folder, kind, name, entries, pictures) for name, (kind, entries) in made.items()}


@pytest.fixture(scope="module")
def models(worlds, tmp_path_factory) -> dict[str, Path]:
    """A tiny Qwen2.5-VL and a tiny InternVL whose words depend on what they see: their weights are large."""
    return {family: sharpened(worlds(family).student, tmp_path_factory.mktemp(family) / "model") for family in FAMILIES}


def sharpened(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    model = load_model(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def answers_of(out: Path) -> list[dict]:
    return read_answers(answers_file(out))[1]


def asked_by_rank(folders, models, out, how) -> None:
    engine.start_processes()
    evaluate_models(folders, models, out, Wish(), how)


@pytest.fixture(scope="module")
def alone(shards, models, tmp_path_factory) -> list[dict]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "e.json"
    evaluate_models(list(shards.values()), models, out, how=SAID)
    return answers_of(out)


def test_every_answer_is_kept_with_what_was_asked_shown_and_expected(alone, shards, models):
    assert len(alone) == 2 * sum(len(Dataset.open(folder)) for folder in shards.values())
    assert len({answer["said"] for answer in alone}) > len(alone) / 3, "the models say the same whatever they see"
    found = {(answer["model"], answer["key"]): answer for answer in alone}
    entry = Dataset.open(shards["visual_haystack_5"]).read(1)
    answer = found["internvl", entry.key]
    assert (answer["benchmark"], answer["task"], answer["size"], answer["expected"]) == ("vhs", "visual_haystack_5", 5, ["no"])
    assert (answer["shown"], answer["choices"]) == (entry.meta["image_paths"], ["yes", "no"])
    assert answer["depth"] == entry.turns[0].needles[0] / 5
    assert answer["question"] == entry.turns[0].text
    of_documents = found["qwen2_5_vl", "infoseek-00000000"]
    assert (of_documents["expected"], of_documents["meta"]["mmlongbench"]["rule"]) == (["red", "the red one"], "contains")
    assert found["qwen2_5_vl", "retrieval-text-00000002"]["depth"] == 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_what_plain_greedy_decoding_says(alone, shards, models, family):
    """Without a cache, one whole forward pass for each token, by the stock processor's own chat template."""
    model, processor = load_model(models[family]), load_processor(models[family])
    renderer = Renderer(processor, Pixels())
    dataset = Dataset.open(shards["reasoning-image"])
    for i in range(3):
        sample = dataset.read(i)
        prompt = renderer.prompt(replace(sample, turns=sample.turns[:1]))
        said = []
        for _ in range(5):
            row = replace(prompt, tokens=extended(prompt.tokens, said), supervised=torch.zeros(len(prompt.supervised) + len(said)))
            inputs = collate_prompts([row], 0)
            said.append(int(model(**inputs).logits[0, -1].argmax()))
            if said[-1] == processor.tokenizer.eos_token_id:
                break
        (answer,) = [a for a in alone if a["model"] == family and a["key"] == sample.key]
        assert answer["said"] == processor.tokenizer.decode(said, skip_special_tokens=True)


def extended(tokens, said):
    more = {"input_ids": torch.tensor(said, dtype=torch.long)}
    return {name: torch.cat([row, more.get(name, torch.zeros(len(said), dtype=row.dtype))]) for name, row in tokens.items()}


def test_prompt_is_that_of_stock_chat_templates(world, shards):
    processor, sample = load_processor(world.student), Dataset.open(shards["counting-text"]).read(0)
    turn = sample.turns[0]
    content = [{"type": "text", "text": s} if isinstance(s, str) else {"type": "image"} for s in turn.segments]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    ids = Renderer(processor, Pixels()).prompt(replace(sample, turns=(turn,))).tokens["input_ids"]
    assert processor.tokenizer.decode(ids) == text  # an image takes one token here


def test_generation_and_teacher_forcing_agree_on_haystacks(world, tmp_path):
    """Where an answer is exactly right, and only there: both with several questions in a window."""
    model = taught(world, tmp_path / "taught")
    found = {}
    for mode in ("teacher-forced", "generate"):
        evaluate_models([world.shards], {"m": model}, tmp_path / f"{mode}.json", Wish([2, 4], 12, 2, mode=mode), How(max_new_tokens=8))
        found[mode] = answers_of(tmp_path / f"{mode}.json")
    forced, generated = found.values()
    assert [answer["right"] for answer in forced] == [answer["right"] for answer in generated]
    assert 0 < sum(answer["right"] for answer in forced) < len(forced) == 12 * 2 * 2
    for one, other in zip(forced, generated, strict=True):
        assert (one["key"], one["question"], one["shown"], one["expected"]) == tuple(
            other[name] for name in ("key", "question", "shown", "expected")
        )
        if one["right"]:
            assert one["said"] == other["said"] == one["expected"][0]
            assert one["choices"][one["said_choice"]] == one["expected"][0]


def test_selfextend_over_everything_says_what_the_model_says(world, tmp_path):
    """With a cache that forgets: the world's models have a layer with a sliding window."""
    model, how = taught(world, tmp_path / "taught"), How(max_new_tokens=8, extended={"wide": (4, 10_000), "narrow": (4, 2)})
    models = dict.fromkeys(("plain", "wide", "narrow"), model)
    evaluate_models([world.shards], models, tmp_path / "e.json", Wish([4], 12, 2, mode="generate"), how)
    said = {name: [answer["said"] for answer in answers_of(tmp_path / "e.json") if answer["model"] == name] for name in models}
    assert said["wide"] == said["plain"] != said["narrow"]


def taught(world, folder: Path) -> Path:
    """A model fitted to the answers of some windows."""
    from laid_ds.data.batch import collate
    from laid_ds.evaluation.haystack import window_of_size

    shutil.copytree(world.student, folder)
    model, renderer, dataset = load_model(folder).train(), Renderer(load_processor(folder), Pixels()), Dataset.open(world.shards)
    windows = [window_of_size(dataset.read(i), 2, 2) for i in range(4)]
    batch = collate([renderer(window) for window in windows], ["k"] * 4, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state[batch.supervised]
        torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.labels[batch.supervised]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_ranks_under_zero3_killed_twice_say_the_same(alone, shards, models, tmp_path):
    """Half of the answers each; rank 1, then rank 0 is killed in the middle of its work; what was answered is not asked again."""
    out, how = tmp_path / "e.json", replace(SAID, zero3=True, tokens_per_batch=1)
    folders = list(shards.values())
    kept: set[str] = set()
    for number, killed in enumerate((1, 0), 1):
        processes, _ = start_ranks(2, asked_by_rank, folders, models, out, how)
        wait_until(lambda number=number: lines_of(out) >= 8 * number, "some answers")
        os.kill(processes[killed].pid, signal.SIGKILL)
        for process in processes:
            process.kill() if process.pid != processes[killed].pid else None
            process.join()
        found = {json.dumps(answer) for answer in answers_of(out)}
        assert kept <= found
        assert 0 < len(found) < len(alone)
        kept = found
    run_ranks(2, asked_by_rank, folders, models, out, how)
    assert answers_of(out) == alone
    assert not list(tmp_path.glob("*.rank-*"))


def lines_of(out: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in out.parent.glob("e.answers.jsonl*"))


def test_whole_replicas_and_workers_say_the_same(alone, shards, models, tmp_path):
    run_ranks(2, asked_by_rank, list(shards.values()), models, tmp_path / "e.json", replace(SAID, zero3=False, workers=1))
    assert answers_of(tmp_path / "e.json") == alone


def test_a_cut_line_is_asked_again_and_nothing_else(alone, shards, models, tmp_path, monkeypatch):
    out = tmp_path / "e.json"
    evaluate_models(list(shards.values()), models, out, how=SAID)
    path = answers_file(out)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    results = json.loads(out.read_text())
    del results["models"]["internvl"]
    out.write_text(json.dumps(results))
    from laid_ds.evaluation import evaluate

    asked = []
    ask = evaluate.ask_items

    def counted(asker, tasks, items, spare):
        asked.extend(items)
        return ask(asker, tasks, items, spare)

    monkeypatch.setattr(evaluate, "ask_items", counted)
    evaluate_models(list(shards.values()), models, out, how=SAID)
    assert (len(asked), path.read_bytes()) == (3, whole)


def prompt_of(folder: Path, images: int):
    """A window with words between the images, about a hundred tokens each; the model in a fresh process."""
    torch.manual_seed(0)
    from data_tools.synth import haystacks

    model, renderer = load_model(folder), Renderer(load_processor(folder), Pixels())
    listen_to_windows(model)
    (sample,) = haystacks("train", 1, images, 1, ("colour",), seed=0, num_scenes=576)
    segments = [part for s in sample.turns[0].segments for part in ((s, "word " * 20) if isinstance(s, int) else (s,))]
    question = replace(sample, turns=(replace(sample.turns[0], segments=tuple(segments)),))
    return model, renderer.processor.tokenizer, collate_prompts([renderer.prompt(question)], 0)


def said_by(prepared) -> None:
    model, tokenizer, inputs = prepared
    generate(model, tokenizer, inputs, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_grows_with_the_images_and_not_with_their_square(worlds, family):
    few, many = (added_peak_mb(prompt_of, said_by, worlds(family).student, images) for images in (32, 64))
    assert many <= 2.3 * few


def test_the_needle_is_placed_at_each_tenth(shards, models, tmp_path):
    """One import; position 0, then every n // 10 images, as the benchmark's own sweep has it."""
    out, task = tmp_path / "e.json", shards["visual_haystack_5"]
    evaluate_models([task], {"m": models["internvl"]}, out, Wish(depths=10, haystacks=2), SAID)
    answers, dataset = answers_of(out), Dataset.open(task)
    assert [answer["depth"] for answer in answers] == [depth for depth in (0.0, 0.2, 0.4, 0.6, 0.8) for _ in range(2)]
    for answer in answers:
        needle = answer["meta"]["vhs"]["pos_image"][0]
        assert answer["shown"].index(needle) == round(answer["depth"] * 5)
        others = dataset.read(dataset.find(answer["key"])).meta["image_paths"]
        assert [name for name in answer["shown"] if name != needle] == [name for name in others if name != needle]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: replace(s, turns=(replace(s.turns[0], needles=(0, 1)), *s.turns[1:])),
            "has 1 questions with 2 needles, not",
        ),
        (lambda s: replace(s, turns=(replace(s.turns[0], needles=()), *s.turns[1:])), "records no needles"),
        (lambda s: replace(s, turns=(replace(s.turns[0], segments=("See", 0, 1, 2, 3, 4, "?")), *s.turns[1:])), "among its words"),
    ],
)
def test_a_needle_that_cannot_be_placed_is_refused(shards, change, message):
    with pytest.raises(DataError, match=message):
        needle_at(change(Dataset.open(shards["visual_haystack_5"]).read(0)), 1)


def run(*words) -> int:
    with pytest.raises(SystemExit) as exit_status:
        cli.main([str(word) for word in words])
    return exit_status.value.code or 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["VHS", "a=nowhere"], "no model at nowhere"),
        (["VHS", "a=MODEL", "a=MODEL"], "the name 'a' is given to several models"),
        (["VHS", "VHS", "a=MODEL"], "two tasks are called 'visual_haystack_5'"),
        (["VHS"], "at least one model"),
        (["a=MODEL"], "at least one folder of shards"),
        (["NIAH", "a=MODEL", "--mode", "teacher-forced"], "offers no choices"),
        (["VHS", "a=MODEL", "--mode", "guess"], "--mode 'guess' is none of"),
        (["NIAH", "a=MODEL", "--depths", "3"], "the needle cannot be moved"),
        (["VHS", "a=MODEL", "--attention"], "teacher forcing, and visual_haystack_5 is not that"),
        (["nowhere", "a=MODEL"], "nowhere"),
        (["TEXT", "a=MODEL"], "questions that have answers"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(shards, models, tmp_path, capsys, words, message):
    with ShardWriter(tmp_path / "text") as writer:
        sample = Dataset.open(shards["counting-text"]).read(0)
        writer.write(replace(sample, turns=(*sample.turns, Turn("user", ("and?",)))))
    places = {"VHS": shards["visual_haystack_5"], "NIAH": shards["counting-text"], "MODEL": models["internvl"], "TEXT": tmp_path / "text"}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    out = tmp_path / "out" / "e.json"
    assert run("eval", *words, "--out", out, "--workers", "0") == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len([line for line in said.splitlines() if line.startswith("laid: ")]) == 1
    assert not out.exists()


def test_other_settings_under_the_same_out_are_refused_by_field(shards, models, tmp_path, capsys):
    words = ["eval", shards["infoseek"], f"a={models['internvl']}", "--out", tmp_path / "e.json", "--workers", "0"]
    assert run(*words, "--max-new-tokens", 2) == 0
    before = (tmp_path / "e.answers.jsonl").read_bytes()
    assert run(*words, "--max-new-tokens", 3) == 2
    assert "was made with other max_new_tokens;" in capsys.readouterr().err
    words[1] = shards["slidevqa"]
    assert run(*words, "--max-new-tokens", 2) == 2
    assert "was made with other task, fingerprint" in capsys.readouterr().err
    assert (tmp_path / "e.answers.jsonl").read_bytes() == before


HOLDING = """
import sys
from pathlib import Path
from laid_ds.evaluation.results import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_commands_do_not_write_one_file(shards, models, tmp_path, capsys):
    words = ["eval", shards["infoseek"], f"a={models['internvl']}", "--out", tmp_path / "e.json", "--workers", "0"]
    holding = [sys.executable, "-c", HOLDING, str(tmp_path / "e.json")]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        assert run(*words) == 2
        other.kill()
    assert "is being written by another `laid eval`" in capsys.readouterr().err
    assert run(*words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.answers.jsonl"}


def test_a_damaged_picture_stops_asking_by_key(shards, models, tmp_path, capsys):
    folder = shutil.copytree(shards["visual_haystack_5"], tmp_path / "damaged")
    shard = next(folder.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run("eval", folder, f"a={models['internvl']}", "--out", tmp_path / "e.json", "--workers", "1") == 2
    assert "do not match" in (said := capsys.readouterr().err)
    assert "key visual-haystack-5-" in said
