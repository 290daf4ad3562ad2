"""Write demonstrations of the embedded suite as JSONL: ten times the default ones are its upper control.

python scripts/write_mini_demonstrations.py 10 mini-x10.jsonl
python -m gsil_bench.compare --methods sft --demonstrations mini-x10.jsonl --set sft.epochs=1 --out runs/upper-control
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gsil_bench.data import mini
from gsil_bench.data.demonstrations import from_items


def write(multiple: int, path: Path) -> int:
    """Write `multiple` times the default demonstrations of all tasks; returns how many."""
    items = [item for name, task in mini.TASKS.items() for item in mini.train_items(name, multiple * task.sizes["train"])]
    rows = [{"prompt": list(item.messages), "completion": item.answer} for item in from_items(items)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    print(write(int(sys.argv[1]), Path(sys.argv[2])), "demonstrations")
