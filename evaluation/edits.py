"""Meng et al.'s applications on postcards of the miniature: figures, and a table of inversion.

`eval.py edits` draws image-to-image at three strengths and inpainting, both with the tiny guide in
8, 4 and 2 steps. `eval.py restyle` encodes postcards to the noise that they come from, and decodes
them with fine-tuned bases. `eval.py inversion` decodes them with the same base, prompt and g, and
measures what that changed.

Shapes: B images, Z latent channels.
"""

from __future__ import annotations

import functools
import random

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import meng
import ppdd
from evaluation import sampling
from evaluation.figures import save_figure
from evaluation.report import markdown_table, protocol_list, result_file, write_result
from evaluation.sampling import Row
from mini import postcards
from support import editing, fast
from support.base import Base, find_weights
from support.cli import require
from support.images import labelled_grid, to_image
from support.machine import provenance, resolve_dtype

STRENGTHS = (0.4, 0.6, 0.8)
# A red boat at sunset and a white house in the snow, and what is painted over each, or into its
# middle.
ATTRIBUTES = torch.tensor([[0, 0, 0, 2, 1, 1], [1, 7, 3, 1, 1, 1]])
EDITS = (("a big red boat on the sea at night, in the middle",
          "a big yellow balloon on the sea at sunset, in the middle"),
         ("a big white house in the snow at night, in the middle",
          "a big green tree in the snow at noon, in the middle"))


def _load(config) -> tuple[object, Base]:
    base = sampling.load(config, find_weights(config.weights))
    require((not base.is_miniature, f"{config.command} edits postcards: it is for the miniature, "
             "--weights mini"))
    return sampling.resolve_defaults(config), base


# ------------------------------------------------------------------------------- the figures

def edits(config) -> None:
    """`edits`: image-to-image and inpainting, a row a postcard and a number of steps."""
    config, base = _load(config)
    real = postcards.draw(ATTRIBUTES, generator=torch.Generator().manual_seed(config.seed))
    pixels = real.to(base.device) * 2 - 1                                          # (B, 3, 64, 64)
    mask = torch.zeros(1, 1, postcards.SIZE, postcards.SIZE, device=base.device)
    mask[..., 8:56, 8:56] = 1
    labels, lines = [], []
    for i, (over, inside) in enumerate(EDITS):
        for steps in (8, 4, 2):
            row = sampling.guide_row(config, base, f"tiny-{steps}")
            images = [edit(config, base, row, pixels[i:i + 1], over, strength)
                      for strength in STRENGTHS]
            images.append(edit(config, base, row, pixels[i:i + 1], inside, 1.0, mask))
            prompt = {8: f"\n“{over}”", 4: f"\ninpainted: “{inside}”", 2: ""}[steps]
            labels.append(f"{steps} steps{prompt}")
            shown, left_out = (to_image((255 * real[i] * kept).round().byte())
                               for kept in (1, 1 - mask[0].cpu()))
            lines.append([shown, *images[:-1], left_out, images[-1]])
    headings = ["a postcard", *(f"strength {s:g}" for s in STRENGTHS), "its middle\nleft out",
                "inpainted"]
    note = (f"The tiny guide, g = {config.g[-1]:g}, on postcards that were drawn, not sampled. "
            "At the left of each three rows: the prompt for image-to-image, and below it the one "
            "for inpainting.")
    save_figure(config, labelled_grid(headings, labels, lines, note, 128))


def edit(config, base: Base, row: Row, pixels: Tensor, prompt: str, strength: float,
         mask: Tensor | None = None) -> Image.Image:
    """An image (1, 3, S, S) in [−1, 1], painted over or, where a mask is 1, anew."""
    grid, side = meng.edit_grid(row.steps, strength), pixels.shape[-1] // 8
    noises = meng.noise_stream([config.seed], (base.unet.config.out_channels, side, side),
                               base.device)
    z, sampler = editing.start(base, pixels, mask, strength, grid, noises, ppdd.ddim)
    z = fast.sample(base.unet, z, base.embed([prompt]), config.g[-1], row.steps, row.guide,
                    sampler=sampler, grid=grid)
    return to_image(base.decode(z)[0].cpu())


def restyle(config) -> None:
    """`restyle`: postcards in another style. The plain base encodes them, fine-tunes decode."""
    files = sampling.style_files(config)
    config, base = _load(config)
    styles = [sampling.load(config, file) for file in files]
    real = postcards.draw(ATTRIBUTES, generator=torch.Generator().manual_seed(config.seed))
    prompts = [postcards.caption(a, random.Random(config.seed), left_out=False)
               for a in ATTRIBUTES]
    x, c, g = base.encode(real.to(base.device) * 2 - 1, 0), base.embed(prompts), config.g[-1]
    texts = [other.embed(prompts) for other in styles]
    guides = (sampling.guide_row(config, base, name) for name in ("tiny", "tiny-16", "tiny-8"))
    labels, lines = [], []
    for row in (sampling.WITHOUT_GUIDE[1], *guides):
        noise = to_noise(base, row, x, c, g)
        images = [other.decode(sampling.run(other, row, noise, text, g)).cpu()
                  for other, text in zip(styles, texts)]
        for i, prompt in enumerate(prompts):
            labels.append(f"{row.title}\n“{prompt}”")
            lines.append([to_image((255 * real[i]).round().byte()),
                          *(to_image(image[i]) for image in images)])
    note = ("Postcards that were drawn, encoded by the plain base and decoded by others, both at "
            f"g = {g:g} under the prompt at the left.")
    headings = ["a postcard", *(other.name for other in styles)]
    save_figure(config, labelled_grid(headings, labels, lines, note, 128))


# ------------------------------------------------------------------------------- the table

def inversion(config) -> None:
    """`inversion`: what encoding and decoding changes, by method, steps and g."""
    config, base = _load(config)
    rows = [row for row in sampling.make_rows(config, base)
            if row.sampler == "ddim" and not row.guided and row.kind != "none"]
    # CFG is measured both ways, so that the comparison does not depend on where it is asked.
    cfg = [row for row in rows if row.kind == "cfg"]
    at_end = [row._replace(name=f"{row.name}-end", title=f"{row.title}, asked where a step ends",
                           halved=True) for row in cfg]
    rows = [*cfg, *at_end, *(row for row in rows if row.guide)]
    prompts = sampling.Prompts(config, base)
    texts, attributes = prompts.of(config.seed)
    generator = torch.Generator().manual_seed(prompts.first_noise(config.seed))
    real = postcards.draw(attributes, generator=generator).to(base.device)
    x, c = base.encode(real * 2 - 1, 0), base.embed(texts)                         # (B, Z, 8, 8)
    errors = {row.name: {"title": row.title, "guide": row.source, "by g": {
        f"{g:g}": reconstruction_error(base, row, x, c, g) for g in row.g_values(config.g)}}
        for row in tqdm(rows, desc="inversion", unit="row")}
    result = {"protocol": {
        "base": base.name, "base hash": base.sha256, "images": config.count,
        "error": "mean absolute difference of a pixel, of 255, from the VAE's own reconstruction",
        "dtype": str(resolve_dtype(config.dtype, config.device)), **provenance(config)},
        "rows": errors}
    write_result(result_file(config), result, inversion_page(result))


def to_noise(base: Base, row: Row, x: Tensor, c: Tensor, g: float) -> Tensor:
    """Latents x (B, Z, H, W) encoded under c (B, L, D) and g: the noise that a row makes x from."""
    return sampling.run(base, row, x, c, g, grid=ppdd.step_grid(row.steps)[::-1],
                        sampler=functools.partial(meng.invert, at_end=row.halved))


def reconstruction_error(base: Base, row: Row, x: Tensor, c: Tensor, g: float) -> float:
    """How far encoding latents x (B, Z, H, W) to noise and decoding them again, under c (B, L, D)
    and g, moves a pixel: the mean absolute difference, of 255."""
    z = sampling.run(base, row, to_noise(base, row, x, c, g), c, g)
    return round((base.decode(z).float() - base.decode(x).float()).abs().mean().item(), 2)


def inversion_page(result: dict) -> str:
    """The table by g, and the protocol, in Markdown."""
    gs = sorted({g for row in result["rows"].values() for g in row["by g"]}, key=float)
    cells = ([row["title"], *(row["by g"].get(g, "") for g in gs)]
             for row in result["rows"].values())
    return "\n".join([
        "# Inversion: what encoding to noise and decoding again changes", "",
        "Mean absolute difference of a pixel, of 255.", "",
        *markdown_table(["", *(f"g = {g}" for g in gs)], cells), "",
        *protocol_list(result["protocol"])]) + "\n"
