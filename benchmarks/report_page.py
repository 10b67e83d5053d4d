"""How long `laid report` takes, and how large its page is: a run of 20,000 steps beside an evaluation of 8 models, drawn for the purpose.

python -m benchmarks.report_page [--json]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from laid_ds.report.write import write_report
from tests.report.report_world import write_evaluation, write_run, write_shards

STEPS, MODELS, HAYSTACKS, LAYERS, HEADS, KEYS = 20_000, 8, 100, 28, 28, 64


def main(as_json: bool) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place) / "e"
        write_shards(Path(place) / "shards", HAYSTACKS)
        ends = {("student", "teacher")[i] if i < 2 else f"model{i}": 2.0 + 4 * i for i in range(MODELS)}
        write_evaluation(folder, ends, Path(place) / "shards", HAYSTACKS, attention=(LAYERS, HEADS))
        learned = {"layers": LAYERS, "heads": HEADS, "teacher_heads": 40, "planes": 64}
        write_run(folder / "model2", STEPS, attention=True, keys=KEYS, learned=learned)
        began = time.perf_counter()
        summary = write_report(folder, "student")
        seconds = time.perf_counter() - began
        found = {"seconds": round(seconds, 2), "page_bytes": summary.path.stat().st_size}
        found |= {
            "figures": len(list((folder / "report").glob("*.png"))),
            "metrics_bytes": (folder / "model2" / "metrics.jsonl").stat().st_size,
        }
    print(json.dumps(found) if as_json else "  ".join(f"{name} {value:,}" for name, value in found.items()))


if __name__ == "__main__":
    main("--json" in sys.argv[1:])
