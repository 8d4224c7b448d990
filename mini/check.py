"""Measure the bundled miniature and its guides: `python mini/check.py` writes results/mini.json.

On fresh pictures and captions, all attributes said: how often every attribute comes out as asked
(read by the judge), without guidance, with CFG, and with each guide; how much of the CFG correction
each stage-one guide explains; and what the judge and the autoencoder themselves are worth.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppdd  # noqa: E402
from mini import postcards  # noqa: E402
from mini.judge import Judge, load_judge  # noqa: E402


class World:
    """Fresh pictures with their attributes and full captions, and a base that should know them."""

    def __init__(self, base: ppdd.Base, judge: Judge, count: int, seed: int):
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.base, self.judge, self.seed = base, judge, seed
        self.attributes = postcards.sample_attributes(count, generator)
        self.real = postcards.draw(self.attributes, generator=generator)
        self.c = base.embed([postcards.caption(a, rng, left_out=False) for a in self.attributes])
        self.empty = base.embed([""])

    def right(self, pictures: Tensor) -> dict[str, float]:
        """Shares of pictures in which every attribute, and each attribute, is as asked."""
        hit = self.judge.read(pictures) == self.attributes                     # (B, 6)
        shares = {"all": hit.all(1)} | dict(zip(postcards.ATTRIBUTES, hit.T))
        return {k: round(v.float().mean().item(), 4) for k, v in shares.items()}

    def sampled(self, name: str, g: float, steps: int, guide=None, cfg: bool = False) -> dict:
        """Accuracy and seconds a picture of one way of sampling, in batches of 100."""
        parts, start = [], time.perf_counter()
        for k in tqdm(range(0, len(self.c), 100), desc=name):
            c = self.c[k:k + 100]
            z = ppdd.noise(range(self.seed + k, self.seed + k + len(c)), (4, 8, 8))
            empty = self.empty.expand(len(c), -1, -1) if cfg else None
            parts.append(ppdd.sample(self.base.unet, z, c, g, steps, guide, empty))
        seconds = (time.perf_counter() - start) / len(self.c)
        pictures = torch.cat([self.base.decode(z) for z in parts]).float() / 255
        passes = steps * (2 if cfg else 1)
        return {"g": g, "steps": steps, "UNet passes": passes,
                "ms a picture, without decoding": round(1000 * seconds, 2),
                "right": self.right(pictures)}

    @torch.no_grad()
    def unexplained(self, guide) -> dict[str, float]:
        """‖e − e_teacher‖² / ‖ε_c − e_teacher‖² on the real pictures: all, by quarter of t."""
        generator, errors, corrections = torch.Generator().manual_seed(self.seed), [], []
        quarters = []
        for k in range(0, len(self.c), 100):
            c, moments = self.c[k:k + 100], self.base.vae.encode(self.real[k:k + 100] * 2 - 1)
            n = len(c)
            eps = torch.randn(2, n, 4, 8, 8, generator=generator)
            t = torch.randint(ppdd.TIMESTEPS, (n,), generator=generator)
            g = 2 + 7 * torch.rand(n, generator=generator)
            z = ppdd.add_noise(self.base.vae.sample(moments, eps[0]), eps[1], t)
            result = ppdd.cfg_distillation(self.base.unet, guide, z, t, c,
                                           self.empty.expand(n, -1, -1), g)
            errors.append(result.error)
            corrections.append(result.correction)
            quarters.append(t // 250)
        error, correction, quarter = (torch.cat(v) for v in (errors, corrections, quarters))
        shares = {"all": error.sum() / correction.sum()}
        for q in range(4):
            rows = quarter == q
            shares[f"t {250 * q} to {250 * q + 249}"] = error[rows].sum() / correction[rows].sum()
        return {k: round(v.item(), 4) for k, v in shares.items()}


@torch.no_grad()
def measure(count: int, seed: int) -> dict:
    base = ppdd.load_base(ppdd.MINI)
    world = World(base, load_judge(ROOT / "mini" / "judge.safetensors"), count, seed)
    moments = [base.vae.encode(x * 2 - 1) for x in world.real.split(100)]
    decoded = [base.vae.decode(base.vae.config.scale_factor * m[:, :4]) for m in moments]
    decoded = (torch.cat(decoded) / 2 + .5).clamp(0, 1)
    result = {
        "pictures": count, "seed": seed, "commit": commit(), "torch": torch.__version__,
        "hardware": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "judge on real pictures": world.right(world.real),
        "judge on reconstructions": world.right(decoded),
        "reconstruction error, mean absolute": round((decoded - world.real).abs().mean().item(), 4),
        "no guidance": world.sampled("no guidance", 0., 50),
    }
    for steps in (50, 16, 8):
        result[f"CFG {steps}"] = world.sampled(f"CFG {steps}", 8., steps, cfg=True)
    for file in sorted((ROOT / "mini" / "guides").glob("*.safetensors")):
        _, about = ppdd.read_about(file)
        guide, steps = ppdd.load_guide(file, base.unet.config), about["steps"] or 50
        result[file.stem] = world.sampled(file.stem, 8., steps, guide)
        if not about["steps"]:
            result[file.stem]["unexplained"] = world.unexplained(guide)
    return result


ROWS = {"no guidance": "no guidance, 50 steps", "CFG 50": "CFG, 50 steps", "full": "full guide, 50",
        "tiny": "tiny guide, 50", "CFG 16": "CFG, 16 steps", "full-16": "full guide, 16",
        "tiny-16": "tiny guide, 16", "CFG 8": "CFG, 8 steps", "full-8": "full guide, 8",
        "tiny-8": "tiny guide, 8", "tiny-8-g8": "tiny guide, 8, trained at g = 8 only"}


def table(result: dict) -> str:
    """The README's table of a result file, in Markdown."""
    names = list(postcards.ATTRIBUTES)
    lines = [f"| g = 8 | UNet passes | all right | {' | '.join(names)} | unexplained |",
             "|---" * (len(names) + 4) + "|"]
    for key, title in ROWS.items():
        row = result[key]
        shares = [f"{100 * row['right'][k]:.1f}" for k in ("all", *names)]
        left = f"{100 * row['unexplained']['all']:.1f}" if "unexplained" in row else ""
        lines.append(f"| {title} | {row['UNet passes']} | {' | '.join(shares)} | {left} |")
    return "\n".join(lines)


def commit() -> str:
    asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT,
                           capture_output=True, text=True)
    return asked.stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of everything (%(default)s)")
    parser.add_argument("--out", default=str(ROOT / "results" / "mini.json"), help="(%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    if options.table:
        raise SystemExit(print(table(json.loads(Path(options.out).read_text()))))
    text = json.dumps(measure(options.count, options.seed), indent=1) + "\n"
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(options.out).with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(options.out)
    print(text)
