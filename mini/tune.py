"""The comparisons behind the guides' settings: `python mini/tune.py` writes results/tuning.json.

Each row is one short run of train.py on the miniature with one setting changed, judged by the share
of the correction that its last updates leave unexplained. With --remedies the rows change what a
guide is trained on or for, and are judged by their pictures too: how many have every attribute as
asked, at two values of g. With --few the bundled guides for 8 steps are halved on, to 4 and 2, and
set beside what CFG and they themselves do in as few. Flags of train.py may follow; rows of other
flags are other rows. A row that is there already is kept, unless the judge or the guide that it
begins with has changed.
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

import ppdd  # noqa: E402
from mini.judge import World, judge_hash, load_judge  # noqa: E402

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

TINY = STAGE_ONE | {"lr": "5e-3"}
REMEDIES = [TINY, *(TINY | {"loss": loss} for loss in ("root-snr", "snr")),
            TINY | {"form": "product"}, TINY | {"form": "product", "loss": "root-snr"},
            TINY | {"form": "gated"}, TINY | {"form": "gated", "loss": "root-snr"},
            TINY | {"trajectories": "0.5"}, TINY | {"trajectories": "1"},
            TINY | {"trajectories": "0.5", "loss": "root-snr"}, TINY | {"ema": "0.99"}]


def train(row: dict[str, str], updates: int, more: list[str], folder: str) -> float:
    """Runs train.py with these settings; the share that its last updates leave unexplained."""
    flags = [word for k, v in row.items() for word in ("--" + k, v)]
    command = [sys.executable, ROOT / "train.py", "--weights", "mini", "--run", folder,
               "--out", folder, "--updates", str(updates), "--halving-updates",
               str(updates), "--grid-every", "0", *flags, *more]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])["unexplained"]


def judged(path: Path | None, steps: int = 16, count: int = 384, seed: int = 5000) -> dict:
    """Shares of pictures with all attributes right, at g = 2 and 8, of a guide's file or of CFG."""
    base = ppdd.load_base(ppdd.MINI)
    world = World(base, load_judge(), count, seed)
    guide = ppdd.load_guide(path, base.unet.config) if path else None
    right = {f"g = {g:g}": world.sampled(f"g = {g:g}", g, steps, guide, cfg=not path)["right"]
             for g in (2., 8.)}
    return {"pictures": count, "seed": seed, "steps": steps, "judge": judge_hash(),
            "right": right}


def few(out: Path, updates: int, more: list[str]) -> None:
    """From 8 steps to 4 and 2; and the same steps without."""
    for steps in (4, 2):
        settings = {"guide": "cfg", "steps": steps}
        if lacking(out, settings, True):
            keep(out, {"settings": settings, **judged(None, steps)})
    for kind in ("tiny", "full"):
        path = f"mini/guides/{kind}-8.safetensors"
        row = {"guide": kind, "init": path, "start-steps": "8", "end-steps": "2"}
        wanted = [row | {"updates": updates, "steps": steps, "sampled": name}
                  for steps in (4, 2) for name in ("made", "init")]
        wanted = [settings for settings in wanted if lacking(out, settings, True, more)]
        with tempfile.TemporaryDirectory() as folder:
            if any(settings["sampled"] == "made" for settings in wanted):
                train(row, updates, more, folder)
            for settings in wanted:
                steps = settings["steps"]
                file = Path(folder) / "mini" / f"{kind}-{steps}.safetensors"
                keep(out, {"settings": settings, "flags": more, **judged(
                    file if settings["sampled"] == "made" else ROOT / path, steps)})


def bundled(out: Path) -> None:
    """The bundled guides of stage one, which were trained longer than the remedies."""
    for name in ("tiny", "tiny-gated"):
        path = f"mini/guides/{name}.safetensors"
        _, about = ppdd.read_about(ROOT / path)
        row = {"guide": "tiny", "init": path, "sampled": "init", "updates": about["updates"]}
        row |= {k: about["settings"][k] for k in ("form", "loss")}
        if lacking(out, row, True):
            keep(out, {"settings": row, **judged(ROOT / path)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=300, help="of every run (%(default)s)")
    parser.add_argument("--halving", action="store_true", help="compare the halving's loss instead")
    parser.add_argument("--remedies", action="store_true", help="compare what guides are trained on"
                                                                " and for, by their pictures")
    parser.add_argument("--few", action="store_true", help="halve bundled guides on, to 4 and 2")
    parser.add_argument("--out", default=str(ROOT / "results" / "tuning.json"))
    options, more = parser.parse_known_args()
    out = Path(options.out)
    if options.few:
        return few(out, options.updates, more)
    if options.remedies:
        bundled(out)
    rows = HALVING if options.halving else REMEDIES if options.remedies else ROWS
    for row in rows:
        settings = row | {"updates": options.updates}
        if lacking(out, settings, options.remedies, more):
            with tempfile.TemporaryDirectory() as folder:
                share = round(train(row, options.updates, more, folder), 4)
                pictures = judged(Path(folder) / "mini" / "tiny.safetensors") \
                    if options.remedies else {}
            keep(out, {"settings": settings, "flags": more, "unexplained": share, **pictures})


def lacking(out: Path, settings: dict, with_pictures: bool, flags: list[str] = ()) -> bool:
    """Whether the file has no such row, or one of another judge, or of another guide to begin with.
    """
    done = json.loads(out.read_text()) if out.exists() else []
    now = start_of(settings) | ({"judge": judge_hash()} if with_pictures else {})
    return not any(same(entry, settings, with_pictures, flags) and
                   all(entry.get(k) == v for k, v in now.items()) for entry in done)


def same(entry: dict, settings: dict, with_pictures: bool, flags: list[str]) -> bool:
    """Flags matter where something was trained, and the device is told as hardware."""
    before, now = (re.sub(r"--device \S+ ?", "", " ".join(told)).strip()
                   for told in (entry.get("flags", ()), flags))
    alike = before == now or settings.get("sampled") == "init"
    return alike and entry["settings"] == settings and ("pictures" in entry) == with_pictures


def start_of(settings: dict) -> dict:
    """The hash of the guide that a row begins with."""
    init = settings.get("init")
    return {"init SHA-256": ppdd.fingerprint(ROOT / init)[:12]} if init else {}


def keep(out: Path, row: dict) -> None:
    """Puts a row into the file, which another process may have changed meanwhile."""
    row |= start_of(row["settings"]) | {"commit": ppdd.commit(), "hardware": platform.machine()}
    print(row, flush=True)
    done = json.loads(out.read_text()) if out.exists() else []
    kept = [entry for entry in done
            if not same(entry, row["settings"], "pictures" in row, row.get("flags", []))]
    with ppdd.written(out) as temporary:
        temporary.write_text(json.dumps([*kept, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
