"""Is the bundled miniature good enough? `python mini/check.py` measures it into results/mini.json.

On fresh pictures and captions, all attributes said: how often every attribute comes out as asked
(read by the judge), without guidance and with CFG at g = 8, in 50 steps; and what the judge, in all
styles, and the autoencoder themselves are worth. The guides are measured by eval.py.
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
from mini.judge import JUDGE, Judge, load_judge  # noqa: E402


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
def measure(count: int, seed: int) -> dict:
    base = ppdd.load_base(ppdd.MINI)
    world = World(base, load_judge(), count, seed)
    moments = [base.vae.encode(x * 2 - 1) for x in world.real.split(100)]
    decoded = [base.vae.decode(base.vae.config.scale_factor * m[:, :4]) for m in moments]
    decoded = (torch.cat(decoded) / 2 + .5).clamp(0, 1)
    styled = {style: postcards.draw(world.attributes, style, torch.Generator().manual_seed(seed))
              for style in postcards.STYLES[1:]}
    return {
        "pictures": count, "seed": seed, "commit": commit(), "torch": torch.__version__,
        "hardware": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "judge": ppdd.fingerprint(JUDGE)[:12],
        "judge on real pictures": world.right(world.real),
        "judge on real pictures of other styles": {
            style: world.right(real)["all"] for style, real in styled.items()},
        "judge on reconstructions": world.right(decoded),
        "reconstruction error, mean absolute": round((decoded - world.real).abs().mean().item(), 4),
        "no guidance": world.sampled("no guidance", 0., 50),
        "CFG": world.sampled("CFG", 8., 50, cfg=True),
    }


def commit() -> str:
    """As eval.py's: a script imports no script."""
    try:
        asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"],
                               cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of everything (%(default)s)")
    parser.add_argument("--out", default=str(ROOT / "results" / "mini.json"), help="(%(default)s)")
    options = parser.parse_args()
    text = json.dumps(measure(options.count, options.seed), indent=1) + "\n"
    with ppdd.written(options.out) as temporary:
        temporary.write_text(text)
    print(text)
