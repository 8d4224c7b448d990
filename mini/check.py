"""Is the bundled miniature good enough? `python mini/check.py` measures it into results/mini.json.

On fresh pictures and captions, all attributes said: how often every attribute comes out as asked
(read by the judge), without guidance and with CFG at g = 8, in 50 steps; and what the judge, in all
styles, and the autoencoder themselves are worth. The guides are measured by eval.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppdd  # noqa: E402
from mini import postcards  # noqa: E402
from mini.judge import World, judge_hash, load_judge  # noqa: E402
from unet import CheckpointError  # noqa: E402


@torch.no_grad()
def measure(path: Path, count: int, seed: int) -> dict:
    """What results/mini.json tells, of the miniature in a file."""
    base = ppdd.load_base(path)
    world = World(base, load_judge(), count, seed)
    moments = [base.vae.encode(x * 2 - 1) for x in world.real.split(100)]
    decoded = [base.vae.decode(base.vae.config.scale_factor * m[:, :4]) for m in moments]
    decoded = (torch.cat(decoded) / 2 + .5).clamp(0, 1)
    styled = {style: postcards.draw(world.attributes, style, torch.Generator().manual_seed(seed))
              for style in postcards.STYLES[1:]}
    return {
        "base hash": ppdd.fingerprint(path), "pictures": count, "seed": seed,
        "commit": ppdd.commit(), "torch": torch.__version__,
        "hardware": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "judge": judge_hash(),
        "judge on real pictures": world.right(world.real),
        "judge on real pictures of other styles": {
            style: world.right(real)["all"] for style, real in styled.items()},
        "judge on reconstructions": world.right(decoded),
        "reconstruction error, mean absolute": round((decoded - world.real).abs().mean().item(), 4),
        "no guidance": world.sampled("no guidance", 0., 50),
        "CFG": world.sampled("CFG", 8., 50, cfg=True),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of everything (%(default)s)")
    parser.add_argument("--out", help="default: results/mini.json, of the bundled one; else none")
    parser.add_argument("--weights", default="mini", help="another miniature; default: bundled")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count {options.count}: at least 1")
    path = ppdd.find_weights(options.weights)
    out = options.out or (ROOT / "results" / "mini.json" if path == ppdd.MINI else None)
    try:
        told = measure(path, options.count, options.seed)
    except (CheckpointError, OSError) as error:
        parser.exit(2, f"mini/check.py: {error}\n")
    text = json.dumps(told, indent=1) + "\n"
    if out:
        with ppdd.written(out) as temporary:
            temporary.write_text(text)
    print(text)
