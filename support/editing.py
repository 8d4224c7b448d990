"""What `sample.py --image` starts from: images and masks are read, encoded and noised.

Shapes: B images, H and W the sides of their latents, Z latent channels.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

import meng
from ppdd import add_noise
from support.base import Base
from support.captions import IMAGE_SUFFIXES, why
from support.cli import BadInput, require
from support.files import check_readable, expand
from support.images import fit, to_rgb

# ------------------------------------------------------------------------------- settings


def check(config) -> None:
    """Raises BadInput for settings of sample.py's --image and its companions that can't work
    together, and for files that can't be used: before hours of sampling."""
    alone = next((f"--{name}" for name in ("mask", "invert", "strength")
                  if getattr(config, name) and not config.image), "")
    from_noise, strength = config.mask or config.invert, _number(config.strength or "1")
    fits = 0 < strength < 1 or (from_noise and strength == 1)
    require(
        (alone, f"{alone} is for --image"),
        ((config.source_prompt or config.source_g or config.encode_weights) and not config.invert,
         "--source-prompt, --source-g and --encode-weights are for --invert"),
        (config.invert and config.mask, "--invert and --mask don't work together: leave one out"),
        (config.invert and config.sampler == "stochastic", "--invert encodes for the steps of ddim "
         "or plms, and the stochastic sampler takes others: leave one out"),
        (config.source_g and not abs(_number(config.source_g)) <= 1000,
         f"--source-g {config.source_g}: a number from -1000 to 1000"),
        (config.image and not config.prompt, "--image needs --prompt: what is to be painted"),
        (config.image and config.export, "--export samples nothing: leave out --image"),
        (config.image and not fits, f"--strength {config.strength}: a number above 0 and "
         f"{'at most' if from_noise else 'below'} 1; at 0 nothing would change"
         f"{'' if from_noise else ', and at 1 the image would not be used'}"),
    )
    if config.image:
        check_files(find_images(config.image), expand(config.mask) if config.mask else None)


def _number(text: str) -> float:
    """The number in a text; NaN, which no bound allows, where there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# ------------------------------------------------------------------------------- files


def find_images(given: str) -> list[Path]:
    """The image of that path, or all in the folder, by name. Raises BadInput or OSError."""
    path = expand(given)
    check_readable(path)
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    require((not files, f"--image {given}: no image in this folder"))
    return files


def open_image(path: Path, background: str = "white") -> Image.Image:
    """The image as it is seen, RGB: upright, on the background. Raises BadInput."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return to_rgb(image, background)
    except UnidentifiedImageError as error:
        raise BadInput(f"{path} is not an image that Pillow reads") from error
    except Exception as error:                          # on damaged files decoders raise anything
        raise BadInput(f"{path} can't be read as an image ({why(error)})") from error


def read_images(paths: Sequence[Path], width: int, height: int) -> Tensor:
    """(B, 3, 8 H, 8 W) in [−1, 1]: of each the middle, cut out and resized. Raises BadInput."""
    pixels = [fit(open_image(path), width, height) for path in paths]
    return torch.stack(pixels).float() / 127.5 - 1


def read_mask(path: Path, width: int, height: int) -> Tensor:
    """(1, 1, 8 H, 8 W) of 1 where a mask is white, or lighter than half, and 0 elsewhere.

    The same part is cut out as of an image. It is resized by nearest neighbour, so that an edge
    stays one. What is transparent is not white: it keeps the image. Raises BadInput where nothing
    in it is white enough to change a latent.
    """
    whole = open_image(path, "black").convert("L")
    w, h = whole.size
    cut = min(w, round(h * width / height)) or 1, min(h, round(w * height / width)) or 1
    middle = ImageOps.fit(whole, cut, Image.Resampling.NEAREST)
    mask = ImageOps.fit(whole, (width, height), Image.Resampling.NEAREST)
    white = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8) >= 128
    white = white.view(1, 1, height, width).float()
    require(
        (whole.getextrema()[1] < 128, f"--mask {path}: nothing in it is white, so nothing would be "
         "repainted"),
        (middle.getextrema()[1] < 128, f"--mask {path}: nothing is white in its middle, the part "
         f"that is used at {width} × {height}"),
        (not to_latent(white).any(), f"--mask {path}: what is white in it is too thin at "
         f"{width} × {height}, where a latent's pixels are 8 × 8"))
    return white


def to_latent(mask: Tensor) -> Tensor:
    """A mask (1, 1, 8 H, 8 W) by nearest neighbour at the latent's size, (1, 1, H, W)."""
    return mask[..., ::8, ::8]


def check_files(images: Sequence[Path], mask: Path | None) -> None:
    """Raises BadInput where a file is damaged, or a mask can't be meant for an image: its
    proportions are others."""
    width, height = open_image(mask).size if mask else (0, 0)
    for path in images:
        w, h = open_image(path).size
        if mask and abs(w * height / (h * width) - 1) > 0.01:
            raise BadInput(f"--mask {mask} is {width} × {height} and {path} {w} × {h}: the mask "
                           "must have the image's proportions")


# ------------------------------------------------------------------------------- latents


def start(base: Base, pixels: Tensor, mask: Tensor | None, strength: float, grid: list[int],
          noises: Iterator[Tensor], sampler: meng.Sampler) -> tuple[Tensor, meng.Sampler]:
    """Where image-to-image or inpainting begins, z (B, Z, H, W), and the sampler to go on with.

    pixels (B, 3, 8 H, 8 W) in [−1, 1], mask (1, 1, 8 H, 8 W). At strength 1 the start is noise
    alone. Noise is drawn in the order of diffusers' pipelines, so that a seed means the same:
    latents of the image, z, latents of the masked image.
    """
    x = None
    if strength < 1 or not base.inpaints:
        x = base.encode(pixels, next(noises))
    noise = next(noises)
    z = noise if strength == 1 else add_noise(x, noise, grid[0])
    if mask is None:
        return z, sampler
    mask = mask.to(pixels.device)
    small = to_latent(mask).expand(len(z), -1, -1, -1)                        # (B, 1, H, W)
    if not base.inpaints:
        return z, functools.partial(meng.inpaint, x=x, noise=noise, mask=small, sampler=sampler)
    masked = base.encode(pixels * (1 - mask), next(noises))                   # (B, Z, H, W)
    return z, functools.partial(meng.inpaint_by_channels, mask=small, masked=masked,
                                sampler=sampler)
