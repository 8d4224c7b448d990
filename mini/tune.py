"""The comparisons behind the guides' settings: `python mini/tune.py`.

Each row is one short run of train.py on the miniature with one setting changed, compared by the
share of the correction that its last updates leave unexplained. With --remedies the rows change
what a guide is trained on or for, and also have a caption accuracy, at two values of g. With --few
the bundled guides for 8 steps are halved on, to 4 and 2, and compared with CFG and with themselves
in as few steps. Flags of train.py may follow; other flags make other rows. A row that is there is
kept, unless the judge, or the guide that it begins with, has changed. They go to runs/tuning.json,
which begins as a copy of results/tuning.json, or with --update-results to that file itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini.judge import Benchmark, judge_hash, load_judge  # noqa: E402
from support.base import MINI, load_base  # noqa: E402
from support.files import sha256, write_json  # noqa: E402
from support.guides import load_guide, read_guide  # noqa: E402
from support.machine import commit  # noqa: E402

STAGE_ONE = {"guide": "tiny", "end-steps": "64", "optimizer": "adamw"}
FULL = STAGE_ONE | {"guide": "full"}
ROWS = [
    STAGE_ONE | {"lr": "2e-3", "form": "sum"},
    *(STAGE_ONE | {"lr": lr} for lr in ("1e-3", "1e-2")),
    *(FULL | {"lr": lr} for lr in ("3e-4", "1e-3", "2e-3")),
    *(FULL | {"optimizer": "muon", "lr": lr} for lr in ("2e-3", "6e-3")),
]
TINY = STAGE_ONE | {"lr": "5e-3"}
REMEDIES = [
    TINY, TINY | {"loss": "root-snr"},
    TINY | {"form": "gated"}, TINY | {"form": "gated", "loss": "root-snr"},
    TINY | {"trajectories": "0.5"}, TINY | {"trajectories": "1"},
    TINY | {"trajectories": "0.5", "loss": "root-snr"},
]
# How the bundled tiny guides were halved, and the rows of --few.
HALVING = {"tiny": {"optimizer": "adamw", "halving-lr": "1e-3"}, "full": {}}
# Options that older rows name and train.py no longer has, at the value that is now the only one.
REMOVED = {"pool": "attention"}


def train(row: dict[str, str], updates: int, more: list[str], folder: str) -> float:
    """Runs train.py with these settings; the share that its last updates leave unexplained."""
    flags = [word for k, v in row.items() for word in ("--" + k, v)]
    command = [sys.executable, ROOT / "train.py", "--weights", "mini", "--run", folder,
               "--out", folder, "--updates", str(updates), "--halving-updates", str(updates),
               "--grid-every", "0", "--batch", "32", "--images", "6000", *flags, *more]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])["unexplained"]


def measure(path: Path | None, steps: int = 16, count: int = 384, seed: int = 5000) -> dict:
    """Caption accuracy at g = 2 and 8, of a guide's file or, without one, of CFG."""
    base = load_base(MINI)
    test = Benchmark(base, load_judge(), count, seed)
    guide = load_guide(path, base.unet.config) if path else None
    accuracy = {f"g = {g:g}": test.measure(f"g = {g:g}", g, steps, guide, cfg=not path)
                ["caption accuracy"] for g in (2., 8.)}
    return {"images": count, "seed": seed, "steps": steps, "judge": judge_hash(),
            "caption accuracy": accuracy}


# ------------------------------------------------------------------------------- the comparisons

def compare_training(out: Path, rows: list[dict], updates: int, more: list[str],
                     with_images: bool) -> None:
    """A run of train.py for each row that is not there yet."""
    for row in rows:
        settings = row | {"updates": updates}
        if not is_missing(out, settings, with_images, more):
            continue
        with tempfile.TemporaryDirectory() as folder:
            share = round(train(row, updates, more, folder), 4)
            guide = Path(folder) / "mini" / "tiny.safetensors"
            accuracy = measure(guide) if with_images else {}
        store(out, {"settings": settings, "flags": more, "unexplained": share, **accuracy})


def compare_few_steps(out: Path, updates: int, more: list[str]) -> None:
    """CFG in 4 and 2 steps, the guides for 8 halved on to that, and those guides as they are."""
    for steps in (4, 2):
        settings = {"guide": "cfg", "steps": steps}
        if is_missing(out, settings, True):
            store(out, {"settings": settings, **measure(None, steps)})
    for kind in ("tiny", "full"):
        init = f"mini/guides/{kind}-8.safetensors"
        row = {"guide": kind, "init": init, "start-steps": "8", "end-steps": "2"}
        wanted = [row | {"updates": updates, "steps": steps, "sampled": which}
                  for steps in (4, 2) for which in ("made", "init")]
        wanted = [settings for settings in wanted if is_missing(out, settings, True, more)]
        with tempfile.TemporaryDirectory() as folder:
            if any(settings["sampled"] == "made" for settings in wanted):
                train(row | HALVING[kind], updates, more, folder)
            for settings in wanted:
                made = Path(folder) / "mini" / f"{kind}-{settings['steps']}.safetensors"
                guide = made if settings["sampled"] == "made" else ROOT / init
                accuracy = measure(guide, settings["steps"])
                store(out, {"settings": settings, "flags": more, **accuracy})


def measure_bundled(out: Path) -> None:
    """The bundled guides of stage one, which were trained for longer than the rows beside them."""
    for name in ("tiny", "tiny-gated"):
        init = f"mini/guides/{name}.safetensors"
        about = read_guide(ROOT / init).about
        settings = {"guide": "tiny", "init": init, "sampled": "init", "updates": about["updates"],
                    "form": about["settings"]["form"], "loss": about["settings"]["loss"]}
        if is_missing(out, settings, True):
            store(out, {"settings": settings, **measure(ROOT / init)})


# ------------------------------------------------------------------------------- the file of rows

def is_missing(out: Path, settings: dict, with_images: bool, flags: list[str] = ()) -> bool:
    """Whether the file has no such row, or one of another judge, or of another guide to begin with.
    """
    now = init_hash(settings) | ({"judge": judge_hash()} if with_images else {})
    return not any(is_same(entry, settings, with_images, flags) and
                   all(entry.get(k) == v for k, v in now.items()) for entry in read_rows(out))


def is_same(entry: dict, settings: dict, with_images: bool, flags: list[str]) -> bool:
    """Whether an entry has these settings and flags, wherever it ran.

    Flags make a difference only where something was trained.
    """
    before, now = (re.sub(r"--device \S+ ?", "", " ".join(words)).strip()
                   for words in (entry.get("flags", ()), flags))
    stored = {k: v for k, v in entry["settings"].items() if REMOVED.get(k) != v}
    same_flags = before == now or settings.get("sampled") == "init"
    return same_flags and stored == settings and ("images" in entry) == with_images


def init_hash(settings: dict) -> dict:
    """The hash of the guide that a row begins with."""
    init = settings.get("init")
    return {"init SHA-256": sha256(ROOT / init)[:12]} if init else {}


def read_rows(out: Path) -> list[dict]:
    return json.loads(out.read_text()) if out.exists() else []


def store(out: Path, row: dict) -> None:
    """Puts a row into the file, which another process may have changed meanwhile."""
    row |= init_hash(row["settings"]) | {"commit": commit(), "hardware": platform.machine()}
    print(row, flush=True)
    kept = [entry for entry in read_rows(out)
            if not is_same(entry, row["settings"], "images" in row, row.get("flags", []))]
    write_json(out, [*kept, row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=300, help="of every run (%(default)s)")
    parser.add_argument("--remedies", action="store_true",
                        help="compare what guides are trained on and for, also by their images")
    parser.add_argument("--few", action="store_true",
                        help="halve the bundled guides on, to 4 and 2 steps")
    parser.add_argument("--out", type=Path, help="the file of rows; default: runs/tuning.json")
    parser.add_argument("--update-results", action="store_true",
                        help="write to results/tuning.json, over the project's own")
    options, more = parser.parse_known_args()
    shown = ROOT / "results" / "tuning.json"
    out = options.out or (shown if options.update_results else ROOT / "runs" / "tuning.json")
    if not options.out and not out.exists():
        write_json(out, read_rows(shown))
    print(f"rows in {out}", flush=True)
    if options.few:
        return compare_few_steps(out, options.updates, more)
    if options.remedies:
        measure_bundled(out)
    rows = REMEDIES if options.remedies else ROWS
    compare_training(out, rows, options.updates, more, options.remedies)


if __name__ == "__main__":
    main()
