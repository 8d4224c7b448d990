"""How well images show what their prompts say: the CLIP score, and `eval.py clip`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from clip_text import Tokenizer
from evaluation.features import VIT_G, Clip, load_clip
from evaluation.folders import has_miniature_size, image_files, images_in, read_image
from evaluation.report import result_file, write_result
from support.captions import notes_on, read_examples, read_prompts
from support.cli import require
from support.distributed import print_once
from support.files import expand
from support.images import prompt_in_image, prompt_of
from support.machine import provenance


def clip_cosines(clip: Clip, images: Tensor, texts: list[str]) -> Tensor:
    """(B,) cosine between each of B images (B, 3, H, W) uint8 and its text."""
    return (clip.images(images) * clip.texts(texts)).sum(1)


def clip_score(config) -> None:
    """`clip DIR`: 100 × the mean cosine between each image and its prompt."""
    require((len(config.paths) != 1, "clip takes one folder of images"))
    folder = expand(config.paths[0])
    prompts = prompts_of_file(config, folder) if config.prompts else prompts_of_images(folder)
    print_once(*notes_on(list(prompts.values()), Tokenizer()))
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


def prompts_of_file(config, folder: Path) -> dict[Path, str]:
    """Each image's prompt from --prompts, in the images' natural order: 9.png before 10.png.

    Raises BadInput where the file has more or fewer than there are images.
    """
    files = image_files(folder)
    prompts = read_prompts(config.prompts, 0, config.seed)
    require((len(prompts) != len(files),
             f"--prompts {config.prompts} has {len(prompts)} prompts, and there are {len(files)} "
             "images: prompt k belongs to the k-th image"))
    return dict(zip(files, prompts))


def prompts_of_images(folder: Path) -> dict[Path, str]:
    """Each image's prompt: the caption that train.py would read with it, else its own.

    Captions are in .txt files beside the images, or in a metadata file; images say their prompt
    where sample.py or a web interface wrote them. Raises BadInput where one has neither.
    """
    captions: dict[Path, str] = {}
    for example in read_examples([str(folder)], lambda *_: None):
        text = example.caption          # web interfaces can save their settings as a .txt, too
        text = prompt_of(text) if "\nSteps: " in text else text
        captions.setdefault(Path(example.file), text)
    prompts = {path: captions.get(path) or prompt_in_image(path) for path in image_files(folder)}
    # A file that can't be read at all is reported with the others of its kind, later.
    without = next((path for path, prompt in prompts.items()
                    if not prompt and read_image(path) is not None), None)
    require((without, f"{without} does not say its prompt: write {without and without.stem}.txt "
                      "beside it, or pass --prompts FILE, one a line"))
    beside = sum(bool(captions.get(path)) for path in prompts)
    print(f"prompts: {beside} from captions beside the images, {len(prompts) - beside} from the "
          "images themselves")
    return prompts
