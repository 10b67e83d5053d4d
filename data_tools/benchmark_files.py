"""Benchmarks as a whole: a data set becomes a benchmark's files, and answers in a benchmark's own form are scored."""

from pathlib import Path
from typing import Any

from data_tools.console import track
from data_tools.formats import mm_niah, mmlongbench, visual_haystacks
from data_tools.lmms_eval import export_task
from laid_ds.data.dataset import Dataset
from laid_ds.disk import whole_folder

WRITERS = {"vhs": visual_haystacks.write_files, "mm-niah": mm_niah.write_file}


def export(format: str, folder: str, out: Path) -> dict[str, Any]:
    """Write a data set as a benchmark's files, whole or not at all; never over what is there."""
    dataset = Dataset.open(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another folder")
    with whole_folder(out, f"the files of {format}") as place:
        place.mkdir()
        if format == "lmms-eval":
            told = export_task(dataset, place, out)
        else:
            told = WRITERS[format](track(dataset, "export", len(dataset)), place)
    return {"folder": str(out)} | told


def score(benchmark: str, results: Path, seed: int) -> dict[str, Any]:
    """Scores by the benchmark's rules. The seed is that of Visual Haystacks' resampling."""
    if not results.exists():
        raise ValueError(f"{results} does not exist")
    if benchmark == "vhs":
        return visual_haystacks.score(results, seed)
    return (mm_niah if benchmark == "mm-niah" else mmlongbench).score(results)
