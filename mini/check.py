"""Is the bundled miniature good enough? `python mini/check.py` measures it.

On fresh images and captions that name every attribute: caption accuracy without guidance and with
CFG at g = 8, in 50 steps, and how good the judge and the autoencoder themselves are. eval.py
measures the guides.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini import postcards  # noqa: E402
from mini.judge import Benchmark, judge_hash, load_judge  # noqa: E402
from support.base import MINI, find_weights, load_base  # noqa: E402
from support.cli import option, parse, require, run_command  # noqa: E402
from support.files import expand, write_json  # noqa: E402
from support.machine import commit, hardware  # noqa: E402


@dataclass(frozen=True)
class Config:
    """What to measure, and where the result goes."""

    weights: str = option("mini", "another miniature")
    count: int = option(1000, "images", low=1)
    seed: int = option(1000, "of everything that is drawn", low=0)
    out: str = option("", "the result; default: runs/mini.json")
    update_results: bool = option(False, "write to results/mini.json, over the project's own")


@torch.no_grad()
def measure(config: Config, path: Path) -> dict:
    """The result, of the miniature in a file."""
    base = load_base(path)
    test = Benchmark(base, load_judge(), config.count, config.seed)
    moments = [base.vae.encode(x * 2 - 1) for x in test.real.split(100)]
    means = [base.vae.config.scale_factor * m[:, :4] for m in moments]
    decoded = (torch.cat([base.vae.decode(z) for z in means]) / 2 + .5).clamp(0, 1)
    styled = {style: postcards.draw(test.attributes, style,
                                    torch.Generator().manual_seed(config.seed))
              for style in postcards.STYLES[1:]}
    return {
        "base SHA-256": base.sha256, "images": config.count, "seed": config.seed,
        "commit": commit(), "torch": torch.__version__, "hardware": hardware(),
        "judge": judge_hash(),
        "judge on real images": test.accuracy(test.real),
        "judge on real images of other styles": {
            style: test.accuracy(real)["all"] for style, real in styled.items()},
        "judge on reconstructions": test.accuracy(decoded),
        "reconstruction error, mean absolute": round((decoded - test.real).abs().mean().item(), 4),
        "no guidance": test.measure("no guidance", 0., 50),
        "CFG": test.measure("CFG", 8., 50, cfg=True),
    }


def main() -> None:
    config = parse(Config, "mini/check.py", __doc__.splitlines()[0])
    path = find_weights(config.weights)
    require((config.update_results and path != MINI,
             "--update-results: results/mini.json is of the bundled miniature; pass --out"))
    folder = "results" if config.update_results else "runs"
    out = expand(config.out) if config.out else ROOT / folder / "mini.json"
    result = measure(config, path)
    write_json(out, result)
    print(json.dumps(result, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    run_command("mini/check.py", main, "lower --count")
