"""How well images show what their prompts say: the CLIP score, and `eval.py clip`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from evaluation.features import VIT_G, Clip, load_clip
from evaluation.folders import has_miniature_size, image_files, images_in, read_image
from evaluation.report import result_file, write_result
from support.captions import read_prompts
from support.cli import BadInput, require
from support.files import expand
from support.images import prompt_in_png
from support.machine import provenance


def clip_cosines(clip: Clip, images: Tensor, texts: list[str]) -> Tensor:
    """(B,) cosine between each of B images (B, 3, H, W) uint8 and its text."""
    return (clip.images(images) * clip.texts(texts)).sum(1)


def clip_score(config) -> None:
    """`clip DIR --prompts FILE`: 100 × the mean cosine; prompt k belongs to the k-th image."""
    require((len(config.paths) != 1, "clip takes one folder of images, and --prompts FILE"))
    folder = expand(config.paths[0])
    prompts = image_prompts(config, image_files(folder))
    name = config.clip_model or ("mini" if has_miniature_size(folder) else VIT_G)
    clip = load_clip(name, config.device)
    cosines: list[float] = []
    with tqdm(total=len(prompts), unit="image", leave=False) as bar:
        for paths, images in images_in(folder, config.batch, config.skip_bad):
            cosines += clip_cosines(clip, images, [prompts[path] for path in paths]).tolist()
            bar.update(len(paths))
    cosine = float(np.mean(cosines))
    deviation = float(np.std(cosines, ddof=1)) if len(cosines) > 1 else 0.0
    print(f"CLIP score ({clip.name}): {100 * cosine:.3f}, cosine {cosine:.5f} ± {deviation:.5f} "
          f"over the images\nof {len(cosines):,} images of {folder}")
    write_result(result_file(config), {
        "score": f"CLIP score ({clip.name}), 100 cos", "value": 100 * cosine, "cosine": cosine,
        "deviation": deviation, "images": len(cosines), "left out": len(prompts) - len(cosines),
        "network": clip.protocol} | provenance(config))


def image_prompts(config, files: list[Path]) -> dict[Path, str]:
    """Each image's prompt: from --prompts, else from the PNG itself, where sample.py wrote it.

    Raises BadInput where an image has none, or the file of prompts has more or fewer than there
    are images.
    """
    if not config.prompts:
        prompts = {path: prompt_in_png(path) for path in files}
        # A file that can't be read at all is reported with the others of its kind, later.
        without = next((path for path, prompt in prompts.items()
                        if not prompt and read_image(path) is not None), None)
        if without:
            raise BadInput(f"{without} does not say its prompt: pass --prompts FILE, one a line")
        return prompts
    prompts = read_prompts(config.prompts, 0, config.seed)
    if len(prompts) != len(files):
        raise BadInput(f"--prompts {config.prompts} has {len(prompts)} prompts, and there are "
                       f"{len(files)} images: prompt k belongs to the k-th image")
    return dict(zip(files, prompts))
