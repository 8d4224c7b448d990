"""Guides trained side by side on the miniature: `python mini/study.py batches`.

All guides of a group see the same postcards, noise, t and g in the same order: only their settings
differ. The base makes its passes once for the whole group; each guide then costs a decoder pass and
its gradient, a student a whole pass. There are five studies:

    batches   kinds of guide × batch sizes × learning rates, at equal numbers of training states
    longer    two kinds of guide × batch sizes, at the better rates of `batches`
    looking   the seeing guide with one thing changed
    seeds     three trainings of each tiny guide, and the images they make
    student   a distilled copy of the whole UNet beside the full guide

Each row has the share of the correction that its guide leaves unexplained on fresh postcards. Rows
that exist already are kept. They go to runs/study.json, which begins as a copy of
results/study.json, or with --update-results to that file itself. A group that was cut short begins
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import meng  # noqa: E402
import ppdd  # noqa: E402
from mini.dataset import Postcards  # noqa: E402
from mini.judge import Benchmark, judge_hash, load_judge  # noqa: E402
from ppdd import GuideConfig, SeeingGuide  # noqa: E402
from support.base import MINI, Base, load_base  # noqa: E402
from support.batches import Batches  # noqa: E402
from support.files import write_json  # noqa: E402
from support.machine import commit, hardware  # noqa: E402
from support.muon import Muon  # noqa: E402
from support.training_state import lr_schedule  # noqa: E402
from unet import UNetConfig, injection_channels  # noqa: E402

IMAGES = 6000                   # to train on
G_RANGE = (2.0, 9.0)
OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}
TINY = {"guide": "tiny", "form": "sum", "optimizer": "muon", "batch": 128, "lr": 2e-2, "seed": 0}
FORMS = ("sum", "gated", "seeing")


def batches_study() -> Iterator[list[dict]]:
    """Two rates for each kind and batch, twice as large where the batch is four times as large; and
    AdamW, at one batch."""
    for batch, lr in ((128, 2e-2), (32, 1e-2), (512, 4e-2)):
        shared = TINY | {"batch": batch}
        tiny = [shared | {"form": form, "lr": rate}
                for form in ("gated", "seeing") for rate in (lr, 2 * lr)]
        full = [shared | {"guide": "full", "lr": rate} for rate in (0.3 * lr, 0.6 * lr)]
        adamw = {"form": "gated", "optimizer": "adamw", "lr": 5e-3}
        yield [*tiny, *full, *([shared | adamw] if batch == 128 else [])]


def longer_study() -> Iterator[list[dict]]:
    """The rates that did better in `batches_study`. Where two were level, the lower one."""
    for batch, lr in ((128, 2e-2), (32, 1e-2), (512, 4e-2)):
        shared = TINY | {"batch": batch, "lr": lr}
        full_lr = (0.3 if batch == 32 else 0.6) * lr
        yield [shared | {"form": "seeing"}, shared | {"guide": "full", "lr": full_lr}]


def looking_study() -> Iterator[list[dict]]:
    seeing = TINY | {"form": "seeing"}
    yield [TINY | {"form": "gated"}, seeing, *(seeing | {"variant": name} for name in VARIANTS)]


def seeds_study() -> Iterator[list[dict]]:
    """At the batch size and rate of `batches_study` that did best of those tried."""
    for seed in range(3):
        shared = TINY | {"batch": 32, "lr": 1e-2, "seed": seed}
        yield [*(shared | {"form": form} for form in FORMS), shared | {"g": 8.0}]


def student_study() -> Iterator[list[dict]]:
    full, whole = TINY | {"guide": "full"}, TINY | {"guide": "whole"}
    yield [full | {"lr": 6e-3}, full | {"lr": 1.2e-2},
           whole | {"lr": 2e-3}, whole | {"optimizer": "adamw", "lr": 1e-3}]


STUDIES = {"batches": batches_study, "longer": longer_study, "looking": looking_study,
           "seeds": seeds_study, "student": student_study}


# ------------------------------------------------------------------------------- variants


class Variant(SeeingGuide):
    """A seeing guide with one thing changed. Variants that brought little exist only here."""

    def __init__(self, base: UNetConfig, name: str):
        self.name = name
        width = base.model_channels * (2 if name in ("twice as wide", "scale and shift") else 1)
        width //= 2 if name == "half as wide" else 1
        super().__init__(base, GuideConfig(form="seeing", width=width))
        channels = injection_channels(base)
        if name == "depthwise 3×3":
            self.near = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width)
                                      for _ in channels)
        if name == "shared among equal widths":
            first = {ch: layer for ch, layer in reversed([*zip(channels, self.look)])}
            self.look = nn.ModuleList(first[ch] for ch in channels)
        if name == "scale and shift":
            self.look = nn.ModuleList(nn.Linear(ch, width // 2, bias=False) for ch in channels)
            self.theta_z3 = nn.ModuleList(nn.Linear(width // 2, ch, bias=False) for ch in channels)
            for layer in self.theta_z3:
                nn.init.zeros_(layer.weight)

    def add_sight(self, v: Tensor, features: list[Tensor]) -> list[Tensor]:
        v = v[:, None, None]                                                  # (B, 1, 1, C)
        return [theta(self.act(i, v, self.see(i, s))).movedim(-1, 1)
                for i, (s, theta) in enumerate(zip(features, self.theta_z3, strict=True))]

    def see(self, i: int, s: Tensor) -> Tensor:
        groups = 1 if self.name == "one group to normalise" else self.config.norm_groups
        return self.look[i](F.group_norm(s, groups).movedim(1, -1))           # (B, H, W, C)

    def act(self, i: int, v: Tensor, seen: Tensor) -> Tensor:
        if self.name == "scale and shift":
            scale, shift = v.chunk(2, dim=-1)
            return (1 + scale) * seen + shift
        if self.name == "depthwise 3×3":
            seen = seen + self.near[i](seen.movedim(-1, 1)).movedim(1, -1)
        h = v * (1 + seen)
        return F.silu(h) if self.name == "SiLU after the product" else h


VARIANTS = ("SiLU after the product", "depthwise 3×3", "shared among equal widths",
            "scale and shift", "one group to normalise", "half as wide", "twice as wide")


def build(base: UNetConfig, row: dict) -> nn.Module:
    if "variant" in row:
        return Variant(base, row["variant"])
    if row["guide"] == "whole":
        return meng.Student(base)
    return ppdd.build_guide(base, GuideConfig(kind=row["guide"], form=row["form"]))


# ------------------------------------------------------------------------------- training


def train_together(base: Base, data: Postcards, rows: list[dict], states: int) -> list[nn.Module]:
    """The guides of these rows, of one batch size and seed, after so many training states."""
    batch, seed = rows[0]["batch"], rows[0]["seed"]
    updates = states // batch
    config = SimpleNamespace(batch=batch, seed=seed, g_range=G_RANGE, trajectories=0, accumulate=1)
    batches = Batches(config, base, data, stage=0, steps=0, updates=updates)
    guides, optimizers = [], []
    for row in rows:
        torch.manual_seed(seed)
        guides.append(build(base.unet.config, row))
        guides[-1].start_from(base.unet)
        optimizers.append(OPTIMIZERS[row["optimizer"]](guides[-1].parameters(), weight_decay=0.0))
    for update in tqdm(range(updates), desc=f"{len(rows)} guides, batch {batch}, seed {seed}"):
        part, = batches.gather(batches.draw(batches.generator(update)), update)
        z = ppdd.add_noise(base.vae.sample(part.moments, part.noise[0]), part.noise[1], part.t)
        for row, optimizer, error in zip(rows, optimizers, errors(base, rows, guides, z, part)):
            for group in optimizer.param_groups:
                group["lr"] = row["lr"] * lr_schedule(update, updates)
            optimizer.zero_grad(set_to_none=True)
            error.mean().backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
    return [guide.eval().requires_grad_(False) for guide in guides]


def errors(base: Base, rows: list[dict], guides: list[nn.Module], z: Tensor, part
           ) -> Iterator[Tensor]:
    """(B,) ‖e − e_teacher‖² of each guide, one after another, as in `ppdd.cfg_distillation`."""
    unet, c = base.unet, part.c
    with torch.no_grad():
        emb = unet.embed_time(part.t)
        emb_twice, both = torch.cat([emb, emb]), torch.cat([c, base.embed([""]).expand_as(c)])
        features = unet.encode(torch.cat([z, z]), emb_twice, both)
        eps_c, eps_empty = unet.decode(features, emb_twice, both).chunk(2)
        features = [feature[:len(z)] for feature in features]
    for row, guide in zip(rows, guides):
        g = torch.full_like(part.g, row["g"]) if "g" in row else part.g
        e_teacher = ppdd.cfg(eps_c, eps_empty, g)
        if row["guide"] == "whole":
            e = guide(z, part.t, c, g)
        else:
            e = unet.decode(features, emb, c, guide(g, emb, c, z, part.t, features))
        yield (e - e_teacher).square().mean((1, 2, 3))


@torch.no_grad()
def unexplained(base: Base, rows: list[dict], guides: list[nn.Module], count: int = 1024) -> list:
    """The share of the correction that each guide leaves on `count` fresh postcards, all the same.
    """
    data = Postcards(base, count, seed=6000)
    generator, sums = torch.Generator().manual_seed(6000), torch.zeros(2, len(rows))
    (low, high), empty = G_RANGE, base.embed([""])
    for places in torch.arange(count).split(128):
        n = len(places)
        noise = torch.randn(2, n, 4, data.side, data.side, generator=generator)
        t = torch.randint(ppdd.TIMESTEPS, (n,), generator=generator)
        drawn = low + (high - low) * torch.rand(n, generator=generator)
        z = ppdd.add_noise(base.vae.sample(data.moments(places), noise[0]), noise[1], t)
        c = data.prompt_states(places.tolist())
        for k, (row, guide) in enumerate(zip(rows, guides)):
            g = torch.full_like(drawn, row["g"]) if "g" in row else drawn
            paper = meng if row["guide"] == "whole" else ppdd
            found = paper.cfg_distillation(base.unet, guide, z, t, c, empty.expand_as(c), g)
            sums[:, k] += torch.stack([found.error.sum(), found.correction.sum()])
    return [round(share.item(), 4) for share in sums[0] / sums[1]]


def accuracies(base: Base, row: dict, guide: nn.Module) -> dict:
    """Caption accuracy at g = 2 (but not of a guide for one g) and 8, in 16 and 8 steps."""
    test = Benchmark(base, load_judge(), count=300, seed=7000)
    return {"judge": judge_hash(), "images": 300, "caption accuracy": {
        f"g = {g:g}, {steps} steps":
            test.measure("images", g, steps, guide)["caption accuracy"]["all"]
        for g in (2.0, 8.0) if row.get("g", g) == g for steps in (16, 8)}}


# ------------------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--states", type=int, default=60_000,
                        help="training states of each guide (%(default)s)")
    parser.add_argument("--update-results", action="store_true",
                        help="write to results/study.json, over the project's own")
    options = parser.parse_args()
    shown, out = ROOT / "results" / "study.json", ROOT / "runs" / "study.json"
    if options.update_results:
        out = shown
    elif shown.exists() and not out.exists():
        out.parent.mkdir(exist_ok=True)
        shutil.copy(shown, out)
    base, data = load_base(MINI), None
    for group in STUDIES[options.study]():
        known = read_rows(out)
        rows = [row for row in group if not any(
            entry["settings"] == row and entry["states"] == options.states and
            (options.study != "seeds" or "judge" in entry) for entry in known)]
        if rows:
            data = data or Postcards(base, IMAGES, seed=0)
            run_group(base, data, rows, options, out)
    print(f"rows in {out}")


def run_group(base: Base, data: Postcards, rows: list[dict], options, out: Path) -> None:
    guides = train_together(base, data, rows, options.states)
    for row, guide, share in zip(rows, guides, unexplained(base, rows, guides)):
        measured = accuracies(base, row, guide) if options.study == "seeds" else {}
        entry = {"settings": row, "states": options.states, "unexplained": share, **measured,
                 "parameters": sum(p.numel() for p in guide.parameters()), "commit": commit(),
                 "hardware": hardware(base.device), "torch": torch.__version__}
        print(json.dumps(entry, ensure_ascii=False), flush=True)
        write_json(out, [*(e for e in read_rows(out) if
                           (e["settings"], e["states"]) != (row, options.states)), entry])


def read_rows(out: Path) -> list[dict]:
    return json.loads(out.read_text()) if out.exists() else []


if __name__ == "__main__":
    main()
