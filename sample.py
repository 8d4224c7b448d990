"""Text to images, or images to images: `python sample.py --steps 8 --g 8`.

Writes one PNG an image and a contact sheet; with --compare one sheet of no guidance, CFG and the
guides side by side, from the same noise. Image k of a run starts from noise of its own, that of
seed + k, so neither the batch size nor the device changes it. Its PNG holds the `Config` that
makes it again.
"""

from __future__ import annotations

from support import startup

if __name__ == "__main__":
    startup.begin()

import functools
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import meng
import mini
import ppdd
from support import distributed, editing, guides, images
from support.base import (
    Base,
    base_name,
    base_sha256,
    describe_base,
    find_weights,
    load_base,
    merge_loras,
)
from support.captions import notes_on, read_prompts
from support.capture import captured
from support.cli import BadInput, one_line, option, parse, require, run_command
from support.fast import compile_step, predict_step, prepack
from support.fast import sample as fast_sample
from support.files import check_readable, expand, writable_folder
from support.lora import parse_lora
from support.machine import (
    DTYPES,
    auto_dtype,
    find_device,
    hardware,
    resolve_dtype,
    use_few_threads,
)


@dataclass(frozen=True)
class Config:
    """Settings of a run. The command line is generated from them, and every image holds them."""

    prompt: tuple[str, ...] = option((), "one or several prompts; default: a few examples",
                                     group="what to draw")
    prompts: str = option("", "a file of prompts: a text with one a line, COCO's captions .json, "
                              "or a .csv or .tsv with a column caption, text or prompt")
    negative: str = option("", "a negative prompt in place of the empty one, with --guide cfg")
    n: int = option(1, "images a prompt", low=1, high=10_000)
    seed: int = option(0, "seed of the first image; each further image has the next",
                       low=0, high=2**53 - 1)
    size: str = option("", "one side or WIDTHxHEIGHT; default: 512, the miniature's 64")

    image: str = option("", "an image, or a folder of them, to paint --prompt over: image to image",
                        group="what to edit")
    strength: str = option("", "how much of an image gives way, above 0 and below 1, with --mask "
                               "or --invert up to 1; default: 0.6, with those 1")
    mask: str = option("", "an image that is white where --image is to be repainted; "
                           "transparent parts are kept; also for inpainting models")
    invert: bool = option(False, "run DDIM backwards from --image to its noise, and start there")
    source_prompt: str = option("", "what the image shows, for --invert; default: nothing")
    source_g: str = option("", "guidance number of the way to the noise, for --invert; default: "
                               "that of --g")
    encode_weights: str = option("", "the base that --invert encodes the image with, as it is; "
                                     "default: --weights with --vae and --lora")

    steps: int = option(8, "sampling steps", low=1, high=ppdd.TIMESTEPS, group="base and guide")
    g: float = option(8.0, "guidance number of Eq. 3: 0 is no guidance, 8 is strong; the guidance "
                           "scale elsewhere is 1 + g", low=-1000, high=1000)
    guide: str = option("tiny", "tiny, seeing or full: the guide distilled for the number of steps "
                                "nearest to --steps; whole: a student, a distilled copy of the "
                                "UNet; cfg: two passes a step; none; or the path of a guide")
    guides: str = option("", "folder to search for guides before guides/ and mini/guides/")
    transplant: str = option("", "the base that the student was distilled on: the difference "
                                 "between the two is added to --weights")
    sampler: str = option("ddim", "ddim, plms or stochastic: with noise, in steps of twice the "
                                  "length", choices=(*ppdd.SAMPLERS, "stochastic"))
    weights: str = option("", "Stable Diffusion 1.5: a file or a folder; default: ./weights and "
                              "the Hugging Face cache are searched, else the miniature is used")
    vae: str = option("", "a VAE in place of the checkpoint's: a file, a folder, or a checkpoint")
    lora: tuple[str, ...] = option((), "LoRA files to merge into the base: FILE or FILE:scale")

    out: str = option("out", "folder of the images; nothing in it is overwritten", group="output")
    compare: bool = option(False, "one sheet of no guidance, CFG and every kind of guide there is")
    export: str = option("", "folder to write the full guide to, as a ControlNet for other tools; "
                             "samples nothing")
    about: str = option("", "a guide file: prints its metadata; samples nothing")

    device: str = option("", "cuda or cpu; default: cuda where there is one", group="machine")
    dtype: str = option("auto", "auto: bf16 on CUDA, fp16 on GPUs older than Ampere, else fp32",
                        choices=("auto", *DTYPES))
    batch: int = option(8, "images sampled together", low=1, high=1024)
    compile: bool = option(False, "compile the step and the decoder: slow to start, then faster; "
                                  "needs a C++ compiler")


METHODS = {"none": "no guidance", "cfg": "CFG", "full": "full guide", "tiny": "tiny guide",
           "seeing": "seeing guide", "whole": "distilled UNet"}
KEPT = "the images of finished batches are kept"
MAX_ON_SHEET = 64               # images on a contact sheet
MAX_ROWS = 32                   # rows of a comparison
EXAMPLE_ROWS = 5                # of the examples below, where no prompt is given
MAX_NAMED = 16                  # paths on the screen

SD_PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a lighthouse on a cliff at sunset, oil painting, thick brush strokes",
    "close-up portrait of a red fox in the snow, soft morning light, 85mm photograph",
    "a cozy wooden cabin by a mountain lake, reflections in the water, watercolor",
)


class Shot(NamedTuple):
    """One image to make."""

    prompt: str
    seed: int
    image: Path | None = None                       # to start from


class Method(NamedTuple):
    """One way to be guided."""

    name: str                                       # stem of the guide's file, or cfg, or none
    kind: str                                       # tiny, full, whole, cfg or none
    guide: nn.Module | None = None
    step: Callable[..., Tensor] | None = None       # compiled, else `fast.sample`'s own
    on_grid: bool = False           # halved, to a grid that all of the run's timesteps are on


# ------------------------------------------------------------------------------- a run

def run(config: Config) -> None:
    """All that the command does. Raises BadInput or OSError with one sentence."""
    if config.about:
        return print(metadata(expand(config.about)))
    given, config = config, resolve_defaults(config)
    check(config)
    if config.guide != given.guide:
        warn("g = 0 is no guidance: sampling without the guide")
    if config.invert and config.n > 1:
        warn("--invert uses no new noise: the --n images of a prompt are the same")
    out = writable_folder(config.export or config.out)
    with distributed.init_distributed(config.device, advice=f"; {KEPT}") as device:
        path = find_weights(config.weights)
        dtype = resolve_dtype(config.dtype, device)
        base = load_base(path, dtype, device, config.vae, inpainting=bool(config.mask))
        if config.encode_weights:
            base.source = load_source(config, base)
        if base.is_miniature:
            use_few_threads(1)                  # eight small images took twice as long on two
        loras = merge_loras(base, config.lora)
        config = resolve_for_base(config, base)
        texts = (*config.prompt, *filter(None, (config.negative, config.source_prompt)))
        distributed.print_once(describe_base(path, config.weights, config.vae), *loras,
                               f"g = {config.g:g} (guidance scale {1 + config.g:g} elsewhere)")
        if config.image:
            grid = meng.edit_grid(config.steps, float(config.strength))
            encoded_by = f", encoded by {base.source.name}" if base.source else ""
            distributed.print_once(f"--image: {len(grid) - 1} of {config.steps} steps, "
                                   f"{'up to' if config.invert else 'from'} t = {grid[0]}"
                                   f"{encoded_by}")
            if grid[0] == ppdd.TIMESTEPS - 1 and not (config.mask or config.invert):
                warn(f"with --steps {config.steps}, --strength {config.strength} rounds to a start "
                     "from almost pure noise, so little of the image is kept: use more --steps, or "
                     "less strength")
        if config.export:
            return export(config, base, out)
        distributed.print_once(*notes_on(texts, base.tokenizer),
                               *(mini.notes_on(texts) if base.is_miniature else ()))
        if config.compile:                           # packed convolutions can't be compiled
            distributed.print_once("compiling: the first batch may wait for a minute or two")
            base.vae.decode = compile_step(base.vae.decode)
        else:
            prepack(*(net for used in (base, base.source) if used for net in (used.unet, used.vae)))
        prompts = [prompt for prompt in config.prompt for _ in range(config.n)]
        sources = editing.find_images(config.image) if config.image else [None]
        pairs = [(prompt, source) for source in sources for prompt in prompts]
        shots = [Shot(prompt, config.seed + k, source) for k, (prompt, source) in enumerate(pairs)]
        (compare if config.compare else write_images)(config, base, shots, out)


def write_images(config: Config, base: Base, shots: list[Shot], out: Path) -> None:
    """One PNG a shot, each saved as soon as its batch is done, and a contact sheet."""
    method = find_method(config, base, config.guide)
    start = time.perf_counter()
    first = distributed.broadcast(images.next_number(out))   # before anyone has written a file
    paths = [out / f"{first + k:03d}{images.slug(shot.prompt)}.png" for k, shot in enumerate(shots)]
    own = own_share(zip(batches(config, shots), batches(config, paths)))
    with ThreadPoolExecutor(1) as pool, progress_bar(config, shots) as bar:
        sha256 = pool.submit(base_sha256, base.path)         # gigabytes, read while we sample
        for batch, files in own:
            made = sample_images(config, base, method, batch, bar.update)
            for shot, path, image in zip(batch, files, made):
                again = replace(config, prompt=(shot.prompt,), seed=shot.seed, n=1,
                                image=str(shot.image or ""))
                save(path, image, again, base, method.name, shot, sha256.result())
    distributed.barrier()                        # the sheet shows the other processes' images too
    if distributed.rank() > 0:
        return
    sheet = images.contact_sheet([Image.open(path) for path in paths[:MAX_ON_SHEET]],
                                 [shot.prompt for shot in shots[:MAX_ON_SHEET]])
    grid = images.free_name(out, "grid")
    save(grid, sheet, config, base, method.name, shots[0], sha256.result(), sheet="grid")
    more = [f"and {len(paths) - MAX_NAMED:,} more"] if len(paths) > MAX_NAMED else []
    print(*paths[:MAX_NAMED], *more, sep="\n")
    shown = f", with the first {MAX_ON_SHEET}" * (len(shots) > MAX_ON_SHEET)
    print(f"{len(shots)} images in {out}, contact sheet {grid}{shown} "
          f"({time.perf_counter() - start:.1f} s)")


def warn(*lines: str) -> None:
    distributed.print_once(*(f"warning: {line}" for line in lines), file=sys.stderr)


def sample_images(config: Config, base: Base, method: Method, shots: list[Shot],
                  progress: Callable[[], object] = lambda: None) -> list[Image.Image]:
    """The images of one batch of shots; progress() is called once a prediction."""
    width, height = sides(config.size)
    shape = (base.unet.config.out_channels, height // 8, width // 8)
    noises = meng.noise_stream([shot.seed for shot in shots], shape, base.device)   # (B, Z, H, W)
    sampler = ppdd.SAMPLERS.get(config.sampler, functools.partial(meng.stochastic, noises=noises))
    strength = float(config.strength or 1)
    grid = meng.edit_grid(config.steps, strength)
    if config.image:
        pixels = editing.read_images([shot.image for shot in shots], width, height).to(base.device)
    if config.invert:
        source = base.source or base
        prompts = [config.source_prompt] * len(shots)
        g, up = source_g(config), method
        if g == 0 and method.kind not in ("cfg", "whole"):          # a guide never learned g = 0
            up = Method("none", "none", None, method.step)
        upwards = functools.partial(meng.invert, at_end=up.on_grid)
        z = sample_latents(replace(config, g=g), source, up, prompts, source.encode(pixels, 0),
                           upwards, grid[::-1], progress)
    elif config.image:
        mask = editing.read_mask(expand(config.mask), width, height) if config.mask else None
        z, sampler = editing.start(base, pixels, mask, strength, grid, noises, sampler)
    else:
        z = next(noises)
    prompts = [shot.prompt for shot in shots]
    z = sample_latents(config, base, method, prompts, z, sampler, grid, progress)
    return [images.to_image(pixels) for pixels in base.decode(z)]                # (3, 8H, 8W) each


def sample_latents(config: Config, base: Base, method: Method, prompts: list[str], z: Tensor,
                   sampler: meng.Sampler, grid: list[int], progress: Callable[[], object]
                   ) -> Tensor:
    """Latents (B, Z, H, W) at the grid's other end, of those at its first."""
    c = base.embed(prompts)                                                         # (B, L, D)
    empty = base.embed([config.negative]).expand_as(c) if method.kind == "cfg" else None
    return fast_sample(base.unet, z, c, config.g, config.steps, method.guide, empty, sampler,
                       progress, method.step, grid)


def source_g(config: Config) -> float:
    """g of the way up, with --invert."""
    return float(config.source_g or config.g)


def batches(config: Config, shots: list) -> list[list]:
    return [shots[i:i + config.batch] for i in range(0, len(shots), config.batch)]


def own_share(work: Iterable) -> list:
    """What this process does of torchrun's; without torchrun, all."""
    return list(work)[distributed.rank()::distributed.world_size()]


def predictions(config: Config) -> int:
    """Of one image: PLMS takes its first step twice, and an inversion comes before."""
    steps = len(meng.edit_grid(config.steps, float(config.strength or 1))) - 1
    return steps + (config.sampler == "plms" and steps > 1) + steps * config.invert


def progress_bar(config: Config, shots: list[Shot], methods: int = 1) -> tqdm:
    total = methods * len(own_share(batches(config, shots))) * predictions(config)
    return tqdm(disable=distributed.rank() > 0, total=total, unit="prediction")


def save(path: Path, image: Image.Image, config: Config, base: Base, guide: str, shot: Shot,
         sha256: str, **text_chunks: str) -> None:
    """A PNG with its `Config`, which holds the prompt as is, and settings for other programs."""
    loras = ", ".join(f"{path.stem}:{scale:g}" for path, scale in base.loras)
    parameters = images.parameters_text(
        shot.prompt, config.negative, Steps=config.steps, Sampler=config.sampler.upper(),
        CFG_scale=f"{1 + config.g:g}", Seed=shot.seed, Size=config.size, Model_hash=sha256[:10],
        Model=base.name, **({"LoRA": loras} if loras else {}),
        **({"VAE": base.vae_path.name} if base.vae_path else {}),
        **({"Denoising_strength": config.strength} if config.strength else {}), Guide=guide,
        g=f"{config.g:g}", Version="ppdd")
    images.save_png(path, image, ppdd=json.dumps(asdict(config)), parameters=parameters,
                    **text_chunks)


# ------------------------------------------------------------------------------- settings

def resolve_defaults(config: Config) -> Config:
    """The configuration with its prompts read and every "auto" decided."""
    if config.export:                                # rounded once only, to the export's fp16
        config = replace(config, device="cpu", dtype="fp32")
    device = find_device(config.device)
    dtype = auto_dtype(device) if config.dtype == "auto" else config.dtype
    read = read_prompts(config.prompts) if config.prompts else ()
    guide, g = config.guide, config.g
    if not (config.compare or config.export):
        kept = ("cfg", "whole")                      # g = 0 is a value that a student knows
        guide = "none" if g == 0 and guide not in kept and not is_student(guide) else guide
        g = 0.0 if guide == "none" else g
    strength = config.strength
    if config.image and not strength:
        strength = "1" if config.mask or config.invert else "0.6"
    return replace(config, prompt=(*config.prompt, *read), prompts="", device=device, dtype=dtype,
                   guide=guide, g=g, strength=strength)


def check(config: Config) -> None:
    """Raises BadInput for settings that can work with no base, before anything is loaded."""
    text = "".join((config.negative, config.source_prompt, *config.prompt))
    path = None if config.guide in METHODS else expand(config.guide)
    if config.guides:
        check_readable(expand(config.guides))
    require(
        (path and path.suffix != ".safetensors", f"--guide {config.guide}: {', '.join(METHODS)} "
         "or the path of a .safetensors guide"),
        (config.source_g and config.guide == "none" and not config.compare, "--source-g is for "
         "guidance, and --guide none or --g 0 has none: leave it out"),
        (config.negative and (config.guide != "cfg" or config.compare), "--negative is for "
         "--guide cfg: a guide learns its negative prompt in training, from train.py --uncond"),
        (config.guides and not expand(config.guides).is_dir(),
         f"--guides {config.guides}: a file, not a folder"),
        (config.compare and config.export, "--export samples nothing: leave out --compare"),
        (config.compare and config.g == 0, "--compare: g = 0 is no guidance, and all columns would "
         "be the same"),
        ((config.compare or config.export) and distributed.world_size() > 1,
         "torchrun shares images between processes: run --compare and --export without it"),
        (config.compare and config.compile,
         "--compare times its columns, and --compile would be timed with them: leave one out"),
        (text != text.encode(errors="ignore").decode(), "a prompt holds bytes that are not text"),
    )
    for lora in config.lora:
        parse_lora(lora)
    editing.check(config)
    kind = guides.read_guide(path).config.kind if path else config.guide
    require((config.transplant and kind != "whole" and not config.compare, "--transplant is for a "
             "UNet distilled as a whole; a guide works on other bases as it is"),
            (config.encode_weights and (kind == "whole" or config.compare), "--encode-weights "
             "works with a guide or cfg, and without --compare: a student replaces the UNet of "
             "both bases"))
    sides(config.size or "512")


def is_student(guide: str) -> bool:
    """Whether --guide names the file of a student."""
    path = expand(guide)
    return (guide not in METHODS and path.suffix == ".safetensors" and path.is_file()
            and guides.read_guide(path).config.kind == "whole")


def sides(size: str) -> tuple[int, int]:
    """Width and height in pixels of "768x512" or "512"."""
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", size)
    if not match:
        raise BadInput(f"--size {size}: one side or WIDTHxHEIGHT, for example 768x512")
    return int(match[1]), int(match[2] or match[1])


def resolve_for_base(config: Config, base: Base) -> Config:
    """The configuration with the base's own prompts and size where none were given."""
    own = 64 if base.is_miniature else 512
    width, height = sides(config.size or f"{own}")
    unit = 8 * 2 ** (len(base.unet.config.channel_mult) - 1)
    if any(side % unit or not unit <= side <= 4096 for side in (width, height)):
        raise BadInput(f"--size {config.size}: sides are multiples of {unit} with {base.name}, "
                       "and at most 4096")
    far = not all(2 / 3 <= side / own <= 1.5 for side in (width, height))
    if far and not config.export:
        warn(f"--size {config.size}: the base was trained on images of {own} pixels, and is poor "
             "far from that")
    if config.mask:                                 # a bad one is refused before anything starts
        editing.read_mask(expand(config.mask), width, height)
    examples = mini.EXAMPLES if base.is_miniature else SD_PROMPTS
    if config.compare:
        examples = examples[:EXAMPLE_ROWS]
    return replace(config, prompt=config.prompt or examples, size=f"{width}x{height}")


def find_method(config: Config, base: Base, guide: str) -> Method:
    """The guide of that name or path, loaded and announced; raises BadInput where there is none."""
    step = None
    if config.compile:
        step = captured(compile_step(predict_step), base.device)
    if guide in ("cfg", "none"):
        return Method(guide, guide, None, step)
    path = expand(guide)
    if guide in METHODS:
        is_moved = guide == "whole" and config.transplant
        home = base_name(find_weights(config.transplant)) if is_moved else ""
        path = guides.find_guide(base, guide, step_length(config), config.guides, home)
    if path is None:
        raise BadInput(f"there is no {guide} guide for {base.name}: train one with "
                       f"`{training_command(config, base, guide)}`, or use --guide cfg, or the "
                       "miniature with its guides: --weights mini")
    file = guides.read_guide(path)
    kind = file.config.kind
    original = config.transplant if kind == "whole" else ""
    if original:
        module = guides.transplant(path, original, base)
        source = find_weights(original)
        warn(*guides.doubts_of_origin(path, file.about, source, base_sha256(source)))
    else:
        module = guides.load_guide(path, base.unet.config, DTYPES[config.dtype], base.device)
    if not (config.compile or config.export):
        prepack(module)
    distributed.print_once(guides.describe_guide(path, file.about, base, original))
    if not config.export:
        g_values = {config.g, source_g(config)} - (set() if kind == "whole" else {0.0})
        warn(*guides.doubts_about(path, file, g_values, config.steps, config.sampler))
    halved_to = file.about.get("steps") or 0
    on_grid = halved_to > 0 and halved_to % config.steps == 0
    return Method(path.stem, kind, module, step, on_grid)


def step_length(config: Config) -> int:
    """The number of steps as long as the sampler's: stochastic ones have twice the length."""
    return max(1, config.steps // 2) if config.sampler == "stochastic" else config.steps


def load_source(config: Config, base: Base) -> Base:
    """The other base that --invert reads images with."""
    source = load_base(find_weights(config.encode_weights), base.unet.dtype, base.device)
    if source.unet.config != base.unet.config:
        raise BadInput(f"--encode-weights {config.encode_weights}: its UNet has other sizes than "
                       f"that of {base.name}")
    return source


def training_command(config: Config, base: Base, kind: str) -> str:
    """The command that trains a guide for the base in use."""
    form = kind if kind in ppdd.FORMS else ""
    draws_data = base.is_miniature and not base.inpaints
    weights = kind == "whole" and config.transplant or config.weights
    flags = {"--guide": "tiny" if form else kind, "--form": form, "--weights": weights,
             "--vae": config.vae, "--data": "" if draws_data else "FOLDER"}
    given = [word for flag, value in flags.items() if value for word in (flag, value)]
    return shlex.join(["python", "train.py", *given])


def metadata(path: Path) -> str:
    """All that a guide file says of itself; no weights are read."""
    file = guides.read_guide(path)
    shape = file.base_config and asdict(file.base_config)
    whole = file.about | {"guide": asdict(file.config), "base_shape": shape}
    return json.dumps(whole, indent=1, sort_keys=True)


def export(config: Config, base: Base, folder: Path) -> None:
    """Writes a full guide as the ControlNet that it is."""
    method = find_method(config, base, config.guide)
    if method.kind != "full":
        raise BadInput(f"--export: {method.name} is not a full guide, and only that is a "
                       "ControlNet; for a tiny one see diffusers_residuals in support/guides.py")
    single = guides.save_controlnet(folder, method.guide, method.name)
    print(f"{folder}: a ControlNet in diffusers' layout; {single}: the same in one file; both fp16"
          "\nits image is plain grey, g / 10 of white: 204 of 255 for g = 8; guidance scale 1")


# ------------------------------------------------------------------------------- the comparison

def compare(config: Config, base: Base, shots: list[Shot], out: Path) -> None:
    """One sheet: a row a shot, a column a method, the same noise along a row."""
    require((len(shots) > MAX_ROWS,
             f"--compare has room for {MAX_ROWS} rows, and these are {len(shots)}"))
    if config.guide in METHODS and config.guide != Config.guide:
        warn(f"--guide {config.guide} is ignored: --compare shows every kind, and adds a guide "
             "that is given by its path")
    methods = {}
    optional = ("seeing",) if config.transplant else ("seeing", "whole")
    for guide in dict.fromkeys((*METHODS, config.guide)):
        if guide in optional and not guides.find_guide(
                base, guide, step_length(config), config.guides):
            continue                                # beyond the paper: shown where there is one
        try:
            methods[METHODS.get(guide, Path(guide).stem)] = find_method(config, base, guide)
        except BadInput as error:
            print(f"a column is left out: {error}")
    times, columns = {}, []
    with progress_bar(config, shots, len(methods)) as bar:
        for label, method in methods.items():
            times[label], column = measure(config, base, method, shots, bar.update)
            columns.append(column)
    headings = [f"{label}\n{passes(config, method)}\n{times[label]:,.0f} ms an image"
                for label, method in methods.items()]
    note = (f"{config.steps} steps of {config.sampler.upper()}, g = {config.g:g}, the same noise "
            "along a row; times are from prompt to pixels, in batches of "
            f"{min(config.batch, len(shots))}: {hardware(config.device)}, {config.dtype}")
    sheet = images.labelled_grid(headings, [one_line(shot.prompt) for shot in shots],
                                 list(zip(*columns)), note, side=256)
    path = images.free_name(out, "compare")
    save(path, sheet, config, base, f"{', '.join(times)} side by side", shots[0],
         base_sha256(base.path), sheet="compare", note=note, milliseconds=json.dumps(times))
    print(f"{note}\n{path}: " + ", ".join(f"{label} {ms:,.1f} ms" for label, ms in times.items()))


def measure(config: Config, base: Base, method: Method, shots: list[Shot],
            progress: Callable[[], object]) -> tuple[float, list[Image.Image]]:
    """Milliseconds an image, from prompt to pixels, and the images; one step of warm-up first."""
    sample_images(replace(config, steps=1), base, method, shots[:config.batch])
    start = time.perf_counter()
    column = [image for batch in batches(config, shots)
              for image in sample_images(config, base, method, batch, progress)]
    return round(1000 * (time.perf_counter() - start) / len(shots), 2), column


def passes(config: Config, method: Method) -> str:
    """What one image costs, in words."""
    n = predictions(config)
    if method.kind == "full":
        return f"{n} UNet + {n} guide passes"
    return f"{2 * n if method.kind == 'cfg' else n} UNet passes"


# ------------------------------------------------------------------------------- command line

def main(argv: list[str] | None = None) -> None:
    config = parse(Config, "sample.py", __doc__.splitlines()[0], argv)
    run_command("sample.py", lambda: run(config),
                f"pass --batch below {config.batch}, or a smaller --size",
                lambda: f"stopped; {KEPT}")


if __name__ == "__main__":
    startup.imported()
    main()
