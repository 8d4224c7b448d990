"""sample.py --image: image-to-image, inpainting, encoding; and parity with diffusers."""

# ruff: noqa: F811 (the fixtures' names)

from __future__ import annotations

import functools
import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import disagreement, noise, randomised
from image_files import fill_folder, halves
from PIL import Image
from references import diffusers_pipeline, diffusers_unet, tokenizer  # noqa: F401 (fixtures)
from safetensors.torch import save_file
from test_sample import memory_gib
from toys import (  # noqa: F401 (fixtures)
    DEEP,
    TEXT,
    UNET,
    VAE_CONFIG,
    command,
    difference,
    here,
    pixels,
    refusal,
    toys,
    write_base,
    write_guide,
)

import eval as eval_script
import meng
import ppdd
import sample
import train
from clip_text import TextConfig
from mini import postcards
from support import editing, fast
from support.base import load_base
from support.batches import Batches
from support.checkpoint import load_unet, read_tensors
from support.cli import BadInput, flag_of
from support.data import CaptionedImages
from support.guides import load_guide
from support.images import to_image
from unet import UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).resolve().parent.parent
NINE = replace(UNET, in_channels=9)
PROMPT, PAINTED = "--prompt tree", "a big red boat on the sea"


@pytest.fixture(scope="session")
def painter(tmp_path_factory) -> Path:
    """An inpainting checkpoint, of nine input channels."""
    file = tmp_path_factory.mktemp("painter") / "painter.safetensors"
    return write_base(file, NINE, VAE_CONFIG, TEXT, torch.float32)


@pytest.fixture
def files(here) -> Path:
    """image.png, mask.png and a folder of images in here."""
    dots = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(dots.byte().numpy()).resize((16, 16)).resize((64, 64)).save("image.png")
    halves(upper=(255,) * 3, lower=(0,) * 3).save("mask.png")
    Path("many").mkdir()
    halves((90, 64)).save("many/a.jpg")
    halves((64, 200)).convert("RGBA").save("many/b.PNG")
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save("many/c.tif")
    halves().convert("P").save("many/d.gif")
    Path("many/notes.txt").write_text("no image")
    return here


WAYS = {"noise": "--sampler stochastic", "image": "--image image.png",
        "both": "--image image.png --strength 0.75 --sampler stochastic",
        "mask": "--image image.png --mask mask.png", "invert": "--image image.png --invert --g 2"}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# ----------------------------------------------------------------------- what a command gives

@each_way
@pytest.mark.parametrize("guide", ["tiny", "full", "cfg"])
def test_a_batch_size_never_changes_an_image(files, guide, way, capsys):
    line = f"{PROMPT} --n 3 --steps 4 --guide {guide} {way}"
    command(f"{line} --batch 3")
    assert ("the --n images of a prompt are the same" in capsys.readouterr().err) == (
        "--invert" in way)
    one_by_one = command(f"{line} --batch 1")
    for together, alone in zip(one_by_one[:3], one_by_one[3:]):
        assert difference(together, alone) <= 1
    assert difference(*one_by_one[:2]) > 5 or "--invert" in way        # no seed changes that


@each_way
def test_the_config_in_an_image_makes_it_again(files, way):
    first = command(f"{PROMPT} --n 2 --steps 4 {way}")[1]
    config = json.loads(Image.open(first).text["ppdd"])
    assert config["image"] == ("image.png" if "--image" in way else "")
    flags = [word for name, value in config.items() if value not in ("", [], False)
             for word in (flag_of(name), *(value if isinstance(value, list) else
                                           [] if value is True else [value]))]
    again = command("", *map(str, flags))[-1]
    assert difference(first, again) <= 1                    # alone, layers may round differently


def test_each_image_of_a_folder_meets_each_prompt(files):
    made = command("--prompt tree boat --n 2 --steps 2 --image many")
    assert len(made) == 4 * 2 * 2 and all(pixels(p).shape == (64, 64, 3) for p in made)
    config = json.loads(Image.open(made[4]).text["ppdd"])
    assert (config["image"], config["seed"], config["prompt"]) == ("many/b.PNG", 4, ["tree"])
    assert "Denoising strength: 0.6" in Image.open(made[0]).text["parameters"]


def test_strength_0_6_is_the_default_and_a_mask_s_is_1(files):
    made = [command(f"{PROMPT} --steps 8 {way}")[-1] for way in (
        WAYS["image"], WAYS["image"] + " --strength 0.6", WAYS["image"] + " --strength 0.3",
        WAYS["mask"], WAYS["mask"] + " --strength 1")]
    assert difference(*made[:2]) == difference(*made[3:]) == 0 < difference(*made[1:3])


def test_what_keeps_little_of_an_image_is_warned_of(files, capsys):
    for line, is_warned in (("--steps 1", True), ("--steps 2 --strength 0.8", True),
                            ("--steps 2", False), (f"--steps 1 {WAYS['mask']}", False)):
        command(f"{PROMPT} --image image.png {line}")
        assert ("so little of the image is kept" in capsys.readouterr().err) == is_warned, line


@pytest.mark.parametrize("channels", [4, 9])
def test_a_mask_goes_to_the_device_of_the_image(channels):
    """The meta device stands for a GPU: it too refuses to compute with tensors of a CPU."""
    pixels, noise = (torch.zeros(1, c, s, s, device="meta") for c, s in ((3, 64), (4, 8)))
    base = SimpleNamespace(inpaints=channels == 9, encode=lambda pixels, noise: noise)
    mask = torch.ones(1, 1, 64, 64)
    z, sampler = editing.start(base, pixels, mask, 1.0, [999, -1], iter([noise] * 3), ppdd.ddim)
    given = sampler.keywords["mask"]
    assert given.device == z.device and given.shape == (1, 1, 8, 8)


def test_a_comparison_starts_every_column_from_the_image(files):
    command(f"{PROMPT} --compare --steps 2 --image image.png")
    assert list(json.loads(Image.open("out/compare.png").text["milliseconds"])) == [
        "no guidance", "CFG", "full guide", "tiny guide"]


def test_a_guide_for_steps_as_long_as_the_stochastic_ones_is_taken(files, capsys):
    command(f"{PROMPT} --steps 16 --sampler stochastic")
    assert "tiny-8.safetensors" in capsys.readouterr().out
    command(f"{PROMPT} --steps 8 --sampler stochastic --guide guides/toy/tiny-8.safetensors")
    assert "8 stochastic ones, of twice the length, are fewer" in capsys.readouterr().err


@pytest.mark.parametrize("guide", ["cfg", "tiny"])
def test_an_inversion_goes_up_with_its_own_base_prompt_and_g(files, toys, guide, capsys):
    """Written out: up with the source's base, prompt and g, and down with those of the image."""
    other = write_base(files / "other.safetensors", UNET, replace(VAE_CONFIG, scale_factor=0.5),
                       TEXT, torch.float32, seed=5)
    line = f"{PROMPT} {WAYS['invert']} --steps 8 --guide {guide}"
    made = command(f"{line} --source-prompt boat --source-g 4 --encode-weights {other}")[-1]
    assert "up to t = 999, encoded by other" in capsys.readouterr().out
    command(f"{line} --source-prompt", "boat " * 200)
    assert "1 of 2 prompts cut after 75 tokens" in capsys.readouterr().out
    base, source = (load_base(path) for path in (toys / "toy.safetensors", other))
    module = None
    if guide == "tiny":
        module = load_guide(Path("guides/toy/tiny-8.safetensors"), UNET)
    z = source.encode(editing.read_images([Path("image.png")], 64, 64), 0)
    grid = ppdd.step_grid(8)
    up = functools.partial(meng.invert, at_end=guide == "tiny")
    for where, prompt, g, sampler, steps in ((source, "boat", 4.0, up, grid[::-1]),
                                             (base, "tree", 2.0, ppdd.ddim, grid)):
        empty = where.embed([""]) if guide == "cfg" else None
        z = fast.sample(where.unet, z, where.embed([prompt]), g, 8, module, empty, sampler,
                        grid=steps)
    expected = base.decode(z)[0].permute(1, 2, 0).float().numpy()
    assert abs(pixels(made) - expected).max() <= 2
    unguided = command(f"{line} --source-g 0")[-1]
    assert "trained for g" not in capsys.readouterr().err
    z = editing.read_images([Path("image.png")], 64, 64)
    z = fast.sample(base.unet, base.encode(z, 0), base.embed([""]), 0.0, 8, grid=grid[::-1],
                    sampler=meng.invert)
    z = fast.sample(base.unet, z, base.embed(["tree"]), 2.0, 8, module,
                    base.embed([""]) if guide == "cfg" else None)
    expected = base.decode(z)[0].permute(1, 2, 0).float().numpy()
    assert abs(pixels(unguided) - expected).max() <= 2
    for less in ("--source-prompt boat", "--source-g 4", f"--encode-weights {other}"):
        words = f"--source-prompt boat --source-g 4 --encode-weights {other}".replace(less, "")
        assert difference(command(f"{line} {words}")[-1], made) > 5, less


@pytest.mark.parametrize("sampler, guide", [
    ("stochastic", "none"), ("plms", "none"), ("stochastic", "whole-2.safetensors")])
def test_an_image_is_painted_over_with_the_sampler_that_was_asked_for(files, toys, sampler, guide):
    """Written out; the stochastic one takes new noise, not that of the start."""
    write_guide(files / "whole-2.safetensors", UNET, "whole", 2)
    made = command(f"{PROMPT} --steps 4 --guide {guide} --image image.png --strength 0.75 --seed 3 "
                   f"--sampler {sampler}")[-1]
    base = load_base(toys / "toy.safetensors")
    noises = meng.noise_stream([3], (4, 8, 8), base.device)
    x = base.encode(editing.read_images([Path("image.png")], 64, 64), next(noises))
    grid = ppdd.step_grid(4)[1:]
    z = ppdd.add_noise(x, next(noises), grid[0])
    run = ppdd.plms if sampler == "plms" else functools.partial(meng.stochastic, noises=noises)
    c = base.embed(["tree"])
    net, more = base.unet, ()
    if guide != "none":
        net, more = load_guide(Path(guide), UNET), (torch.tensor([8.0]),)
    z = run(lambda z, t: net(z, torch.tensor([t]), c, *more), z, grid)
    expected = base.decode(z)[0].permute(1, 2, 0).float().numpy()
    assert abs(pixels(made) - expected).max() <= 2


@pytest.mark.parametrize("guide, steps, at_end", [
    ("cfg", 8, False), ("guides/toy/tiny.safetensors", 8, False),
    *(("guides/toy/tiny-8.safetensors", steps, steps != 3) for steps in (8, 4, 3))])
def test_a_guide_on_its_own_grid_is_asked_where_a_step_up_ends(files, monkeypatch, guide, steps,
                                                               at_end):
    invert, asked = meng.invert, []
    monkeypatch.setattr(sample.meng, "invert", lambda *args, **how: (
        asked.append(how) or invert(*args, **how)))
    command(f"{PROMPT} {WAYS['invert']} --steps {steps} --guide {guide}")
    assert asked == [{"at_end": at_end}]


def test_an_image_comes_back_from_its_inversion(files):
    """With the miniature itself: random networks are too rough for it."""
    generator = torch.Generator().manual_seed(1)
    attributes = postcards.sample_attributes(1, generator)
    to_image((255 * postcards.draw(attributes, generator=generator)[0]).byte()).save("card.png")
    caption = postcards.caption(attributes[0], random.Random(0))
    made = command(f"--image card.png --invert --guide none --steps 20 --weights {ROOT}/mini/"
                   "mini.safetensors", "--source-prompt", caption, "--prompt", caption)
    base = load_base(ROOT / "mini/mini.safetensors")
    through_vae = base.decode(base.encode(editing.read_images([Path("card.png")], 64, 64), 0))
    assert abs(pixels(made[0]) - through_vae[0].permute(1, 2, 0).numpy()).mean() < 5


# ----------------------------------------------------------------------- images and masks

def test_images_are_seen_upright_on_white_and_cut_to_the_middle(files):
    wide, tall, grey, palette = editing.read_images(editing.find_images("many"), 64, 32)
    assert wide.shape == (3, 32, 64) and wide.min() >= -1 and wide.max() <= 1
    assert (wide[0, :14] > 0.9).all() and (wide[2, -14:] > 0.9).all()     # red above blue
    assert grey.unique().numel() == 1 and abs(grey.mean() - (2 * 40_000 / 65_535 - 1)) < 0.01
    assert torch.equal(palette, editing.read_images([Path("many/d.gif")], 64, 32)[0])


def test_what_is_transparent_in_a_mask_keeps_the_image(files):
    shape = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    shape.paste((255, 255, 255, 255), (8, 16, 32, 48))
    shape.save("shape.png")
    mask = editing.read_mask(Path("shape.png"), 64, 64)
    assert mask[..., 16:48, 8:32].all() and mask.sum() == 24 * 32


def test_a_mask_is_resized_by_nearest_neighbour(files):
    mask = editing.read_mask(Path("mask.png"), 64, 64)
    assert mask.shape == (1, 1, 64, 64) and mask[..., :32, :].all() and not mask[..., 32:, :].any()
    assert editing.to_latent(mask).shape == (1, 1, 8, 8)
    halves((640, 640), (255,) * 3, (120,) * 3).save("big.png")
    assert torch.equal(editing.read_mask(Path("big.png"), 64, 64), mask)
    editing.check_files([Path("image.png")], Path("big.png"))
    halves((96, 64), (255,) * 3, (0,) * 3).save("wide.png")         # cut as an image is
    assert torch.equal(editing.read_mask(Path("wide.png"), 64, 64), mask)
    with pytest.raises(BadInput, match="wide.png is 96 × 64 and image.png 64 × 64"):
        editing.check_files([Path("image.png")], Path("wide.png"))


# ----------------------------------------------------------------------- nine channels

def test_an_inpainting_model_takes_image_mask_and_its_own_guides(files, painter, capsys):
    line = f"--weights {painter} {PROMPT} --steps 4 {WAYS['mask']}"
    for config, name in ((NINE, "nine"), (UNET, "four")):
        write_guide(files / f"{name}.safetensors", config, "full", 8)
    made = [command(f"{line} --guide {guide}")[-1] for guide in ("cfg", "none", "nine.safetensors")]
    assert min(difference(a, b) for a in made for b in made if a != b) > 5
    capsys.readouterr()
    message = refusal(capsys, *line.split(), "--guide", "four.safetensors")
    assert "in_channels 4 and not 9" in message
    assert "no tiny guide for painter" in refusal(capsys, *line.split())
    silent = write_guide(files / "guides/painter/tiny-8.safetensors", UNET, "tiny", 8)
    tensors, metadata = read_tensors(silent)
    del metadata["unet_config"]                     # older files don't note their base
    save_file(tensors, silent, metadata)
    assert "no tiny guide for painter" in refusal(capsys, *line.split())
    assert "for a base of 4 input channels, and this one has 9" in refusal(
        capsys, *line.split(), "--guide", str(silent))
    for flags in ("", WAYS["image"], WAYS["invert"]):
        message = refusal(capsys, "--weights", str(painter), *PROMPT.split(), *flags.split())
        assert "painter.safetensors is an inpainting model, with 9 input channels" in message
        assert "--image and --mask" in message


@pytest.mark.parametrize("kind", ["tiny", "full", "whole"])
def test_a_guide_is_trained_for_an_inpainting_model_and_used(files, painter, kind, capsys):
    fill_folder(files / "data", ["a tree", "a boat"])
    train.main(["--weights", str(painter), "--data", "data", "--guide", kind,
                "--max-updates", "2", "--batch", "2", "--size", "64", "--start-steps", "2",
                "--end-steps", "1", "--device", "cpu", "--run", "run", "--out", "mine",
                "--grid-every", "1"])
    assert (f"python sample.py --guide mine/painter/{kind}-1.safetensors --steps 1 --g 8 --weights "
            f"{painter} --image FILE --mask FILE --prompt TEXT\n") in capsys.readouterr().out
    assert len(list(Path("run").glob("*.png"))) >= 2
    line = f"--weights {painter} {PROMPT} --steps 1 {WAYS['mask']}"
    made = [command(f"{line} {more}")[-1] for more in (
        "--guide none", f"--guide mine/painter/{kind}-1.safetensors")]
    assert difference(*made) > 0


def test_the_masks_of_training_are_drawn_anew_and_hide_what_they_cover(files, painter):
    fill_folder(files / "data", ["a tree"])
    base = load_base(painter, inpainting=True)
    config = train.Config(batch=64, data=("data",), trajectories=0.0)
    batches = Batches(config, base, CaptionedImages(base, ["data"], 64), 0, 0, 5)
    batch, other = (batches.draw(batches.generator(k)) for k in (0, 1))
    assert batch.masks.shape == (64, 1, 8, 8) and not torch.equal(batch.masks, other.masks)
    assert 0.05 < batch.masks.mean() < 0.25 and batch.masks.unique().tolist() == [0, 1]
    [part] = batches.gather(batch, 0)
    masks, latents = part.beside[:, :1], part.beside[:, 1:]
    assert torch.equal(masks, batch.masks) and latents.shape == (64, 4, 8, 8)
    image = editing.read_images([Path("data/000.png")], 64, 64)
    pixels = masks[3:4].repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = base.encode(image * (1 - pixels), batch.noise[2, 3:4])
    assert disagreement(latents[3:4], expected) < 1e-4


def test_each_latent_of_a_batch_is_trained_beside_its_own_mask(painter):
    base = load_base(painter, inpainting=True)
    guide = randomised(lambda: ppdd.build_guide(NINE, ppdd.GuideConfig(kind="full")))
    trainer = SimpleNamespace(base=base, run_guide=guide, teacher=None, paper=ppdd,
                              config=train.Config(loss="eps"), empty=base.embed([""]),
                              current_stage=SimpleNamespace(steps=0))
    z, beside, c = noise(3, 4, 8, 8), noise(3, 5, 8, 8), base.embed(["a tree", "a boat", ""])
    t, g = torch.tensor([900, 500, 100]), torch.tensor([2.0, 5.0, 9.0])
    whole, *alone = (train.Trainer.distill(trainer, *(x[part] for x in (z, t, c, g, beside))).error
                     for part in (slice(3), slice(1), slice(1, 2), slice(2, 3)))
    assert torch.allclose(whole, torch.cat(alone), rtol=1e-3)


@pytest.mark.parametrize("more", ["", "--cache cache", "--trajectories 0.5"])
def test_training_for_an_inpainting_model_needs_images_to_mask(files, painter, capsys, more):
    fill_folder(files / "data", ["a tree"])
    data = "--data data" * bool(more)
    with pytest.raises(SystemExit) as exit:
        train.main(["--weights", str(painter), "--device", "cpu", *f"{data} {more}".split()])
    assert exit.value.code == 2 and "neither --cache nor --traj" in capsys.readouterr().err


def test_evaluation_refuses_an_inpainting_model(here, painter, capsys):
    with pytest.raises(SystemExit) as exit:
        eval_script.main(["table2", "--weights", str(painter), "--device", "cpu"])
    assert exit.value.code == 2 and "is an inpainting model" in capsys.readouterr().err


def test_the_channels_of_an_inpainting_model_are_read_off_its_weights(painter, tmp_path):
    tensors, metadata = read_tensors(painter)
    metadata["unet_config"] = json.dumps(asdict(UNET))                  # official files say nothing
    save_file(tensors, tmp_path / "silent.safetensors", metadata)
    diffusers_unet(NINE).save_pretrained(tmp_path / "unet")
    base = load_base(tmp_path / "silent.safetensors", inpainting=True)
    assert base.inpaints and base.unet.config == load_unet(tmp_path).config == NINE


# ----------------------------------------------------------------------- bad input

@pytest.mark.parametrize("line, part", [
    ("--image no.png", "no.png: No such file"), ("--image empty", "no image in this folder"),
    ("--image many/notes.txt", "is not an image that Pillow reads"),
    ("--image cut.png", "cut.png can't be read as an image"),
    ("--image image.png --strength 0", "--strength 0: a number above 0"),
    ("--image image.png --strength 1", "--strength 1: a number"),
    ("--image image.png --strength 1.5", "--strength 1.5"),
    ("--image image.png --strength nan", "--strength nan"),
    ("--image image.png --strength half", "--strength half"),
    ("--image image.png --mask mask.png --strength 1.1", "--strength 1.1"),
    ("--strength 0.5", "--strength is for --image"), ("--mask mask.png", "--mask is for --image"),
    ("--invert", "--invert is for --image"), ("--source-prompt boat", "are for --invert"),
    ("--image image.png --encode-weights mini", "are for --invert"),
    ("--image image.png --invert --mask mask.png", "leave one out"),
    ("--image image.png --export x", "leave out --image"),
    ("--image image.png --mask black.png", "nothing in it is white"),
    ("--image side.png --mask side.png", "nothing is white in its middle"),
    ("--image image.png --mask thin.png", "too thin at 64 × 64"),
    ("--image image.png --mask fine.png", "too thin at 64 × 64"),
    ("--image image.png --invert --sampler stochastic", "leave one out"),
    ("--image image.png --invert --source-g many", "--source-g many: a number"),
    ("--image image.png --source-g 2", "are for --invert"),
    ("--image image.png --invert --source-g 4 --g 0", "--source-g is for guidance"),
    ("--image image.png --invert --source-prompt \udcff", "bytes that are not text"),
    ("--image image.png --mask wide.png", "wide.png is 96 × 64 and image.png 64 × 64"),
    ("--image many --mask mask.png", "many/a.jpg 90 × 64"),
    ("--image image.png --mask no.png", "no.png"),
    ("--image image.png --invert --encode-weights deep.safetensors", "other sizes than that of"),
    ("--image image.png --invert --encode-weights no.safetensors", "does not exist"),
])
def test_bad_input_is_answered_with_one_sentence(files, toys, capsys, line, part):
    Path("empty").mkdir()
    Path("cut.png").write_bytes(Path("image.png").read_bytes()[:-200])
    Image.new("L", (64, 64)).save("black.png")
    Image.new("L", (96, 64), 255).save("wide.png")
    side, thin = Image.new("L", (192, 64)), Image.new("L", (64, 64))
    side.paste(255, (0, 0, 40, 64)), thin.paste(255, (9, 9, 14, 14))
    side.save("side.png"), thin.save("thin.png")
    fine = Image.new("L", (640, 640))               # lost when it is resized
    fine.paste(255, (311, 0, 313, 640)), fine.save("fine.png")
    shutil.copy(toys / "deep.safetensors", "deep.safetensors")
    assert part in refusal(capsys, *PROMPT.split(), "--steps", "2", *line.split())
    assert not list(Path().glob("out/*"))


def test_an_image_needs_a_prompt(files, capsys):
    assert "--image needs --prompt" in refusal(capsys, "--image", "image.png")


# ----------------------------------------------------------------------- diffusers' own pipelines

def their_image(way: str, file: Path, tmp_path: Path, tokenizer, configs: tuple, **settings
                ) -> np.ndarray:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    plain = diffusers_pipeline(file, tmp_path, tokenizer, configs)
    plain.unet.register_to_config(sample_size=64)           # the pipelines want one
    kind = StableDiffusionImg2ImgPipeline if way == "image" else StableDiffusionInpaintPipeline
    pipe = kind(**plain.components, requires_safety_checker=False)
    image = pipe(PAINTED, guidance_scale=7.5,
                 generator=torch.Generator().manual_seed(3), **settings).images[0]
    return np.asarray(image).astype(int)


def write_any_base(way: str, tmp_path: Path, configs: tuple) -> tuple[Path, tuple]:
    if way == "nine":
        configs = (replace(configs[0], in_channels=9), *configs[1:])
    return write_base(tmp_path / "base.safetensors", *configs, torch.float16), configs


def check_parity(way: str, strength: float, file: Path, tmp_path: Path, tokenizer, configs: tuple,
                 side: int) -> None:
    soft = noise(3, 4, 4).permute(1, 2, 0).mul(60).add(128).clamp(0, 255).byte().numpy()
    image = Image.fromarray(soft).resize((side, side), Image.Resampling.BICUBIC)
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 8, side // 4, side // 2 + 4, 3 * side // 4 + 4))
    image.save(tmp_path / "image.png"), mask.save(tmp_path / "mask.png")
    settings = {"image": image, "strength": strength, "num_inference_steps": 4}
    line = f"--guide cfg --steps 4 --g 6.5 --dtype fp32 --seed 3 --size {side} --device cpu"
    line += f" --image {tmp_path}/image.png --strength {strength} --weights {file}"
    if way != "image":
        settings |= {"mask_image": mask, "height": side, "width": side}
        line += f" --mask {tmp_path}/mask.png"
    sample.main([*line.split(), "--out", f"{tmp_path}/{way}", "--prompt", PAINTED])
    ours = pixels(tmp_path / way / "000-a-big-red-boat-on-the-sea.png")
    theirs = their_image(way, file, tmp_path, tokenizer, configs, **settings)
    assert ours.std() > 20 and (abs(ours - 127.5) < 127).mean() > 0.5      # an image, not a blot
    print("largest difference", abs(ours - theirs).max(), "mean", abs(ours - theirs).mean())
    assert abs(ours - theirs).max() <= 2


@pytest.mark.parametrize("way, strength", [("image", 0.5), ("image", 0.75), ("mask", 0.75),
                                           ("mask", 1.0), ("nine", 0.5), ("nine", 1.0)])
def test_small_parity(here, tmp_path, tokenizer, way, strength):
    file, configs = write_any_base(way, tmp_path, (UNET, VAE_CONFIG, TEXT))
    check_parity(way, strength, file, tmp_path, tokenizer, configs, 64)


@pytest.mark.full
@pytest.mark.skipif(memory_gib() < 12, reason="needs 12 GiB of memory")
@pytest.mark.parametrize("ways", [("image", "mask"), ("nine",)])
def test_full_size_parity(tmp_path, tokenizer, ways):
    """All of SD 1.5's sizes, at 256 × 256: minutes on two cores."""
    file, configs = write_any_base(ways[0], tmp_path,
                                   (UNetConfig(), VAEConfig(), TextConfig()))
    try:
        for way in ways:
            check_parity(way, 0.5, file, tmp_path, tokenizer, configs, 256)
        if "image" in ways:
            check_what_diffusers_lacks(file, tmp_path, configs[0])
    finally:
        file.unlink()


def check_what_diffusers_lacks(file: Path, tmp_path: Path, config: UNetConfig) -> None:
    """Encoding, noise between the steps, and a student: that they run at this size, and differ."""
    student = write_guide(tmp_path / "whole-2.safetensors", config, "whole", 2)
    line = f"--weights {file} --size 128 --steps 2 --g 2 --dtype fp32 --device cpu --prompt tree"
    shared, made = [*line.split(), "--out", f"{tmp_path}/more"], []
    for way in ("--guide cfg", "--guide cfg --sampler stochastic", f"--guide {student}",
                f"--guide cfg --invert --image {tmp_path}/image.png"):
        sample.main([*shared, *way.split()])
        made.append(pixels(sorted((tmp_path / "more").glob("[0-9]*.png"))[-1]))
    student.unlink()
    for k, image in enumerate(made):
        assert image.shape == (128, 128, 3) and image.std() > 10
        assert all(abs(image - other).mean() > 3 for other in made[:k])
