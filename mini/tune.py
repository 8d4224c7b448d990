"""The comparisons behind the guides' settings: `python mini/tune.py` writes results/tuning.json.

Each row is one short run of train.py on the miniature with one setting changed, judged by the share
of the correction that its last updates leave unexplained. Rows that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE_ONE = {"guide": "tiny", "end-steps": "64", "optimizer": "adamw"}
FULL = STAGE_ONE | {"guide": "full"}
ROWS = [
    *(STAGE_ONE | {"lr": "2e-3", "pool": pool, "form": form}
      for form in ("sum", "product") for pool in ("mean", "end", "attention")),
    *(STAGE_ONE | {"lr": lr} for lr in ("1e-3", "1e-2")),
    *(FULL | {"lr": lr} for lr in ("3e-4", "1e-3", "2e-3")),
    *(FULL | {"optimizer": "muon", "lr": lr} for lr in ("2e-3", "6e-3")),
]
HALVING = [{"init": f"mini/guides/{kind}.safetensors", "guide": kind, "start-steps": "16",
            "loss": loss} for kind in ("tiny", "full") for loss in ("eps", "snr")]


def unexplained(row: dict[str, str], updates: int, more: list[str]) -> float:
    """The last log line of a run with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [word for k, v in row.items() for word in ("--" + k, v)]
        command = [sys.executable, ROOT / "train.py", "--weights", "mini", "--run", folder,
                   "--out", folder, "--updates", str(updates), "--halving-updates",
                   str(updates), "--grid-every", "0", *flags, *more]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])["unexplained"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=300, help="of every run (%(default)s)")
    parser.add_argument("--halving", action="store_true", help="compare the halving's loss instead")
    parser.add_argument("--out", default=str(ROOT / "results" / "tuning.json"))
    options, more = parser.parse_known_args()
    out = Path(options.out)
    done = json.loads(out.read_text()) if out.exists() else []
    for row in HALVING if options.halving else ROWS:
        settings = row | {"updates": options.updates}
        if all(entry["settings"] != settings for entry in done):
            share = round(unexplained(row, options.updates, more), 4)
            done.append({"settings": settings, "unexplained": share})
            print(done[-1], flush=True)
            out.parent.mkdir(exist_ok=True)
            temporary = out.with_suffix(".tmp")
            temporary.write_text(json.dumps(done, indent=1) + "\n")
            temporary.replace(out)


if __name__ == "__main__":
    main()
