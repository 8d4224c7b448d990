"""Text to pictures: `python sample.py --steps 8 --g 8`.

Writes one PNG a picture and a contact sheet; with --compare one sheet of no guidance, CFG and the
guides side by side, from the same noise. Picture k of a run starts from noise of its own, that of
seed + k, so that no batch size changes it; its PNG holds the `Config` that makes it again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as distributed
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

import ppdd
from ppdd import Base, rank, world
from unet import CheckpointError, UNetConfig, build, folder_name, lora_scale, renames


class BadInput(ValueError):
    """Something the person gave can't be used; the message is all they need to see."""


def option(default, text: str, **more):
    """A field of a configuration, with the help text of its flag."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Config:
    """Settings of a run; the command line is generated from them, and every picture holds them."""

    steps: int = option(8, "sampling steps")
    g: float = option(8.0, "guidance number of Eq. 3; the guidance scale elsewhere is 1 + g")
    guide: str = option("tiny", "tiny or full: the guide distilled for so many steps; cfg: two "
                                "passes a step; none; or the path of a guide")
    prompt: tuple[str, ...] = option((), "what to paint, one or several; default: a few examples")
    prompts: str = option("", "a text file of prompts, one a line")
    negative: str = option("", "a negative prompt in place of ∅, with --guide cfg")
    seed: int = option(0, "seed of the first picture; the next has the next")
    n: int = option(1, "pictures a prompt")
    size: str = option("", "one side or WIDTHxHEIGHT; default: 512, the miniature's 64")
    sampler: str = option("ddim", "ddim or plms", choices=tuple(ppdd.SAMPLERS))
    weights: str = option("", "Stable Diffusion 1.5; default: looked for, else the miniature")
    lora: tuple[str, ...] = option((), "LoRA files to merge into the base: FILE or FILE:scale")
    guides: str = option("", "folder to look for guides in before guides/ and mini/guides/")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "auto: bf16 on CUDA, fp16 on GPUs older than Ampere, else fp32",
                        choices=("auto", "fp32", "bf16", "fp16"))
    batch: int = option(8, "pictures sampled together")
    out: str = option("out", "folder of the pictures; nothing in it is overwritten")
    compile: bool = option(False, "compile the step and the decoder: slow to begin, then faster; "
                                  "needs a C++ compiler")
    export: str = option("", "folder to write the full guide to, as a ControlNet for other tools; "
                             "paints nothing")
    about: str = option("", "a guide file: prints what it says of itself; paints nothing")
    compare: bool = option(False, "one sheet of no guidance, CFG, full guide and tiny guide")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = {"none": "no guidance", "cfg": "CFG", "full": "full guide", "tiny": "tiny guide"}
STAGE_ONE = 48                  # above so many steps a guide that was never halved is preferred
BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # line breaks, control characters
SHOWN, ROWS = 64, 32            # pictures on a contact sheet, rows of a comparison, at most

MINI_PROMPTS = (
    "a big red boat on the sea at sunset, in the middle",
    "a small white house in the snow at night, on the left",
    "a big green cactus in the desert at noon, on the right",
    "in the morning, a large orange balloon in a meadow, in the center",
    "under the stars, a huge purple rocket among the dunes, in the middle",
    "a postcard of a little blue car in the city, on the left, in the evening sun",
    "on the right, a big pink mushroom on the grass in bright daylight",
    "a tiny yellow tree on a snowy plain at dawn, to the left",
)
SD_PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a lighthouse on a cliff at sunset, oil painting, thick brush strokes",
    "close-up portrait of a red fox in the snow, soft morning light, 85mm photograph",
    "a cozy wooden cabin by a mountain lake, reflections in the water, watercolor",
)


class Shot(NamedTuple):
    """One picture to take."""

    prompt: str
    seed: int


class Method(NamedTuple):
    """One way to be guided."""

    name: str                       # stem of the guide's file, or cfg, or none
    kind: str                       # tiny, full, cfg or none
    guide: nn.Module | None = None


# ------------------------------------------------------------------------------- a run

def run(config: Config) -> None:
    """All that the command does. Raises BadInput, CheckpointError or OSError with one sentence."""
    if config.about:
        return print(json.dumps(about(path_of(config.about)), indent=1, sort_keys=True))
    config = settle(config)
    check(config)
    out = writable_folder(config.export or config.out)
    path = ppdd.find_weights(config.weights)
    base = ppdd.load_base(path, DTYPES[config.dtype], config.device)
    loras = ppdd.merge_loras(base, config.lora)
    config = fit(config, base)
    say(ppdd.say_base(path, config.weights), *loras,
        f"g = {config.g:g} (guidance scale {1 + config.g:g} elsewhere)")
    if config.export:
        return export(config, base, out)
    if config.compile:
        base.vae.decode = compiled(base.vae.decode, config.device)
    else:
        ppdd.pack(base.unet, base.vae)
    prompts = [prompt for prompt in config.prompt for _ in range(config.n)]
    shots = [Shot(prompt, config.seed + k) for k, prompt in enumerate(prompts)]
    (compare if config.compare else write)(config, base, shots, out)


def write(config: Config, base: Base, shots: list[Shot], out: Path) -> None:
    """One PNG a shot, each saved as soon as its batch is done, and a contact sheet."""
    method = find_method(config, base, config.guide)
    first, start = in_common(next_number(out)), time.perf_counter()
    paths = [out / f"{first + k:03d}{slug(shot.prompt)}.png" for k, shot in enumerate(shots)]
    work = list(zip(batches(config, shots), batches(config, paths)))[rank()::world()]
    with ThreadPoolExecutor(1) as pool, progress_bar(config, shots) as bar:
        digest = pool.submit(ppdd.fingerprint, base.path)    # gigabytes, read while we sample
        for batch, files in work:
            images = paint(config, base, method, batch, bar.update)
            for shot, path, image in zip(batch, files, images):
                again = replace(config, prompt=(shot.prompt,), seed=shot.seed, n=1)
                save_png(path, image, ppdd=as_json(again),
                         parameters=parameters(config, base, method, shot, digest.result()))
    in_common(None)                                          # waits for everyone's pictures
    if rank():
        return
    shown = [Image.open(path) for path in paths[:SHOWN]]
    grid = free_name(out, "grid")
    save_png(grid, contact_sheet(shown), sheet="grid", ppdd=as_json(config),
             parameters=parameters(config, base, method, shots[0], digest.result()))
    many = f"the first {SHOWN}" if len(shots) > SHOWN else "all"
    print(f"{len(shots)} × PNG in {out}, {many} on {grid}: {time.perf_counter() - start:.1f} s")


def paint(config: Config, base: Base, method: Method, shots: list[Shot],
          progress: Callable[[], object] = lambda: None) -> list[Image.Image]:
    """The pictures of one batch of shots; progress() is called once a prediction."""
    width, height = sides(config.size)
    c = base.embed([shot.prompt for shot in shots])                                 # (B, L, D)
    empty = base.embed([config.negative]).expand_as(c) if method.kind == "cfg" else None
    shape = (base.unet.config.in_channels, height // 8, width // 8)
    z = ppdd.noise([shot.seed for shot in shots], shape).to(c.device)               # (B, Z, H, W)
    z = ppdd.sample(base.unet, z, c, config.g, config.steps, method.guide, empty, config.sampler,
                    progress, predictor(config.compile, config.device))
    pixels = base.decode(z).permute(0, 2, 3, 1).cpu().numpy()                       # (B, 8H, 8W, 3)
    return [Image.fromarray(picture) for picture in pixels]


@functools.cache
def predictor(compile: bool, device: str) -> Callable[..., Tensor]:
    """One step's prediction; compiled, it is so once a shape, for any g, prompt and seed."""
    return compiled(ppdd.predict, device) if compile else ppdd.predict


def compiled(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """The function as one graph. On a GPU that is a CUDA graph, launched at once.

    A CUDA graph writes where it wrote before, so what it returns is copied. Raises BadInput where
    this machine can't compile.
    """
    mode = "max-autotune" if device.startswith("cuda") else "default"
    graph = torch.compile(function, dynamic=False, mode=mode)

    def call(*args) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return graph(*args).clone()
        except torch._dynamo.exc.TorchDynamoException as error:
            said = " ".join(str(error).splitlines()[:2]).strip()
            raise BadInput(f"--compile can't be used here, leave it out ({said})") from error

    return call


def batches(config: Config, shots: list) -> list[list]:
    return [shots[i:i + config.batch] for i in range(0, len(shots), config.batch)]


def predictions(config: Config) -> int:
    """Of one run of the sampler: PLMS takes its first step twice."""
    return config.steps + (config.sampler == "plms" and config.steps > 1)


def say(*lines: str, file=None) -> None:
    """Prints, in the first process only."""
    if rank() == 0:
        print(*lines, sep="\n", file=file)


def in_common(value):
    """The first process's value, in all of them, once all have come; BadInput if one has ended."""
    if world() == 1:
        return value
    values = [value]
    try:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo")
        distributed.barrier()
        distributed.broadcast_object_list(values)
    except RuntimeError as error:
        raise BadInput("another process ended: its own message says why; the pictures of finished "
                       "batches are kept") from error
    return values[0]


def progress_bar(config: Config, shots: list[Shot], methods: int = 1) -> tqdm:
    runs = methods * len(batches(config, shots)[rank()::world()])
    return tqdm(disable=rank() > 0, total=runs * predictions(config), unit="prediction")


def is_mini(base: Base) -> bool:
    return base.unet.config.model_channels < 256


# ------------------------------------------------------------------------------- what was asked for

def settle(config: Config) -> Config:
    """The configuration with its prompts read and every "auto" decided."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and here > 1:                        # a GPU for each process
        if here > torch.cuda.device_count():
            raise BadInput(f"{here} processes and {torch.cuda.device_count()} GPUs: start at most "
                           "one process a GPU, or pass --device cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    check_device(device)
    read = read_prompts(config.prompts) if config.prompts else ()
    return replace(config, prompt=(*config.prompt, *read), prompts="", device=device,
                   dtype=ppdd.auto_dtype(device) if config.dtype == "auto" else config.dtype,
                   g=0.0 if config.guide == "none" and not config.compare else config.g)


def check(config: Config) -> None:
    """Raises BadInput for settings that can work with no base, before anything is loaded."""
    text, named = "".join((config.negative, *config.prompt)), config.guide in COLUMNS
    for wrong, sentence in (
        (not 1 <= config.steps <= ppdd.TIMESTEPS, f"--steps {config.steps}: from 1 to 1000"),
        (not abs(config.g) <= 1000, f"--g {config.g}: a number; 0 is no guidance, 8 is much"),
        (not 1 <= config.n <= 10_000, f"--n {config.n}: from 1 to 10000"),
        (not 1 <= config.batch <= 1024, f"--batch {config.batch}: from 1 to 1024"),
        (not 0 <= config.seed < 2**53, f"--seed {config.seed}: from 0 to {2**53 - 1}"),
        (not named and not config.guide.endswith(".safetensors"),
         f"--guide {config.guide}: tiny, full, cfg, none or the path of a .safetensors guide"),
        (config.negative and (config.guide != "cfg" or config.compare), "--negative is for "
         "--guide cfg: a guide learns its negative prompt in training, from train.py --uncond"),
        (config.guides and not path_of(config.guides).is_dir(),
         f"--guides {config.guides}: there is no such folder"),
        ((config.compare or config.export) and world() > 1,
         "torchrun shares pictures out: run --compare and --export without it"),
        (config.compare and config.compile,
         "--compare times its columns, and --compile would be timed with them: leave one out"),
        (text != text.encode(errors="ignore").decode(), "a prompt holds bytes that are not text"),
    ):
        if wrong:
            raise BadInput(sentence)
    for lora in config.lora:
        lora_scale(lora)
    if not named:
        ppdd.read_about(path_of(config.guide))
    sides(config.size or "512")


def check_device(name: str) -> None:
    """Raises BadInput where this machine has no such device."""
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name}: cpu, cuda or cuda:1, for example") from None
    if (device.index or 0) >= there.get(device.type, 0):
        raise BadInput(f"--device {name}: there is none here; leave it out, or pass cpu")


def read_prompts(file: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank."""
    if path_of(file).is_char_device():
        raise BadInput(f"--prompts {file}: a device, not a file")
    try:
        lines = path_of(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise BadInput(f"--prompts {file}: not a UTF-8 text") from None
    if not any(map(str.strip, lines)):
        raise BadInput(f"--prompts {file}: there is no prompt in it; write one a line")
    return [line.strip() for line in lines if line.strip()]


def sides(size: str) -> tuple[int, int]:
    """Width and height in pixels of "768x512" or "512"."""
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", size)
    if not match:
        raise BadInput(f"--size {size}: one side or WIDTHxHEIGHT, for example 768x512")
    return int(match[1]), int(match[2] or match[1])


def fit(config: Config, base: Base) -> Config:
    """The configuration with the base's own prompts and size where none were given."""
    width, height = sides(config.size or ("64" if is_mini(base) else "512"))
    unit = 8 * 2 ** (len(base.unet.config.channel_mult) - 1)
    if any(side % unit or not unit <= side <= 4096 for side in (width, height)):
        raise BadInput(f"--size {config.size}: sides are multiples of {unit} with {base.name}, "
                       "and at most 4096")
    examples = MINI_PROMPTS if is_mini(base) else SD_PROMPTS
    return replace(config, prompt=config.prompt or examples, size=f"{width}x{height}")


# ------------------------------------------------------------------------------- guides

def find_method(config: Config, base: Base, guide: str) -> Method:
    """The guide of that name or path, loaded and announced; raises BadInput where there is none."""
    if guide in ("cfg", "none"):
        return Method(guide, guide)
    path = find_guide(config, base, guide) if guide in COLUMNS else path_of(guide)
    if path is None:
        raise BadInput(f"there is no {guide} guide for {base.name}: train one with "
                       f"`python train.py --guide {guide}`, or use --guide cfg, or the "
                       "miniature with its guides: --weights mini")
    made, about = ppdd.read_about(path)
    module = ppdd.load_guide(path, base.unet.config, DTYPES[config.dtype], config.device)
    if not (config.compile or config.export):
        ppdd.pack(module)
    say(describe(path, about, base))
    low, high = about.get("g_range") or (config.g, config.g)
    if not low <= config.g <= high:
        say(f"warning: {path.stem} was trained for g from {low:g} to {high:g}", file=sys.stderr)
    return Method(path.stem, made.kind, module)


def find_guide(config: Config, base: Base, kind: str) -> Path | None:
    """The most suitable guide of this kind that fits the base.

    --guides comes before guides/BASE, and that before guides of other bases and the bundled ones;
    then this base's own come first, then those distilled for about so many steps, then those of
    the paper's form. Guides for a single g are for whoever names them.
    """
    given, own = path_of(config.guides), Path("guides") / base.name
    bundled = Path(__file__).resolve().parent / "mini" / "guides"
    pools = (given.glob("**/*.safetensors") if config.guides else (), own.glob("*.safetensors"),
             (*Path("guides").glob("*/*.safetensors"), *bundled.glob("*.safetensors")))
    ranked = []
    for pool, path in ((pool, path) for pool, paths in enumerate(pools) for path in paths):
        try:
            made, about = ppdd.read_about(path)
        except CheckpointError:
            continue                                         # something else that lies there
        low, high = about.get("g_range") or (0, 1)
        if made.kind == kind and low < high:
            ranked.append((pool, about.get("base") != base.name, *far(about, config.steps),
                           made.form != "sum", path))
    return next((path for *_, path in sorted(ranked) if fits(path, base.unet.config)), None)


def about(path: Path) -> dict:
    """All that a guide file says of itself; no weights are read."""
    made, said = ppdd.read_about(path)
    shape = ppdd.read_shape(path)
    return said | {"guide": asdict(made), "base_shape": shape and asdict(shape)}


def export(config: Config, base: Base, folder: Path) -> None:
    """Writes a full guide as the ControlNet it is."""
    exact = replace(config, dtype="fp32", device="cpu")              # to be rounded only once
    method = find_method(exact, base, config.guide)
    if method.kind != "full":
        raise BadInput(f"--export: {method.name} is not a full guide, and only that is a "
                       "ControlNet; for a tiny one see ppdd.residuals")
    single = save_controlnet(folder, method.guide, method.name)
    print(f"{folder}: a ControlNet in diffusers' layout; {single}: the same in one file; both fp16"
          "\nits picture is plain grey, g / 10 of white: 204 of 255 for g = 8; guidance scale 1")


def save_controlnet(folder: Path, guide: ppdd.FullGuide, name: str) -> Path:
    """A full guide as the ControlNet that it is, fp16, in both layouts that other tools read.

    config.json and diffusion_pytorch_model.safetensors are the folder layout of diffusers;
    NAME-controlnet.safetensors is the single file, in ControlNet's own names after
    "control_model.". Both take a plain grey picture of value g / 10 as the hint. Returns the
    single file's path.
    """
    tensors = {k: v.half() for k, v in guide.state_dict().items()}
    table = renames(guide.config) | {
        "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
        "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
        "controlnet_mid_block.": "middle_block_out.0."}
    table |= {f"controlnet_cond_embedding.blocks.{i}.": f"input_hint_block.{2 * i + 2}."
              for i in range(6)}
    table |= {f"controlnet_down_blocks.{i}.": f"zero_convs.{i}.0."
              for i in range(len(guide.zero_convs))}
    single = folder / f"{name}-controlnet.safetensors"
    ppdd.save_tensors(single, {f"control_model.{k}": v for k, v in tensors.items()})
    ppdd.save_tensors(folder / "diffusion_pytorch_model.safetensors",
                      {folder_name(k, table): v for k, v in tensors.items()}, {"format": "pt"})
    with ppdd.written(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(_controlnet_config(guide), indent=2, sort_keys=True) + "\n")
    return single


def _controlnet_config(guide: ppdd.FullGuide) -> dict:
    base, hint = guide.config, guide.input_hint_block[0].out_channels
    kinds = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in base.attention]
    return {
        "_class_name": "ControlNetModel", "in_channels": base.in_channels,
        "block_out_channels": [base.model_channels * m for m in base.channel_mult],
        "layers_per_block": base.num_res_blocks, "down_block_types": kinds,
        "cross_attention_dim": base.context_dim, "attention_head_dim": base.num_heads,
        "norm_num_groups": base.norm_groups,
        "conditioning_embedding_out_channels": [hint, 2 * hint, 6 * hint, 16 * hint]}


def far(about: dict, steps: int) -> tuple[bool, float]:
    """How ill a guide suits so many steps: is it of the wrong stage, and by which ratio."""
    made_for = about.get("steps") or 64                      # stage one: of whatever schedule
    return (made_for == 64) != (steps > STAGE_ONE), abs(math.log(steps / made_for))


def fits(path: Path, base: UNetConfig) -> bool:
    """Whether a guide's tensors have the shapes that this base asks for; no weights are read."""
    try:
        made, _ = ppdd.read_about(path)
        guide = build(lambda: ppdd.build_guide(base, made), path)
        with safe_open(path, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    except CheckpointError:
        return False
    return ppdd.read_shape(path) in (None, base) and shapes == {
        name: list(tensor.shape) for name, tensor in guide.state_dict().items()}


def describe(path: Path, about: dict, base: Base) -> str:
    steps, made_on = about.get("steps") or 64, about.get("base")
    said = [f"guide: {path}, distilled on {made_on} for {'any' if steps == 64 else steps} steps"]
    if made_on != base.name:
        said.append(f"folded into {base.name} as it is")
    if about.get("uncond"):
        said.append(f"away from {about['uncond']!r}")
    return ", ".join(said)


# ------------------------------------------------------------------------------- pictures on disk

def path_of(given: str) -> Path:
    """The path given, with ~ for the home folder, where there is one."""
    return Path(os.path.expanduser(given))


def writable_folder(name: str) -> Path:
    """The folder, made where it is missing; raises OSError where nothing can be written."""
    path = path_of(name)
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
    return path


def next_number(folder: Path) -> int:
    """One more than the highest number that a picture in the folder begins with."""
    found = (re.match(r"(\d{3,9})(-.*)?\.png$", path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in found if match), default=-1) + 1


def free_name(folder: Path, stem: str) -> Path:
    """stem.png, or where that is taken stem-2.png, stem-3.png, …"""
    path, k = folder / f"{stem}.png", 2
    while path.exists():
        path, k = folder / f"{stem}-{k}.png", k + 1
    return path


def slug(prompt: str) -> str:
    """The prompt in a file name: a dash and at most 60 of a-z, 0-9 and dashes; or nothing."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-")
    return words and f"-{words}"


def save_png(path: Path, image: Image.Image, **chunks: str) -> None:
    """A PNG with text chunks, written under a temporary name and renamed: never half a file."""
    info = PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    with ppdd.written(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def as_json(config: Config) -> str:
    return json.dumps(asdict(config))


def parameters(config: Config, base: Base, method: Method, shot: Shot, digest: str) -> str:
    """What popular interfaces write into a picture and read from it.

    They read it line by line, so that a prompt's own line breaks and control characters become
    spaces here, which mean the same to the tokenizer; the `Config` beside it has them as they were.
    """
    def plain(text: str) -> str:
        return BREAKS.sub(" ", text.encode(errors="replace").decode())

    def quoted(name: str) -> str:
        name = plain(name)
        return json.dumps(name, ensure_ascii=False) if re.search(r'[,:"]', name) else name

    negative = f"Negative prompt: {plain(config.negative)}\n" if config.negative else ""
    loras = ", ".join(f"{path.stem}:{scale:g}" for path, scale in base.loras)
    lora = f"LoRA: {quoted(loras)}, " if loras else ""
    return (f"{plain(shot.prompt)}\n{negative}Steps: {config.steps}, "
            f"Sampler: {config.sampler.upper()}, CFG scale: {1 + config.g:g}, "
            f"Seed: {shot.seed}, Size: {config.size}, Model hash: {digest[:10]}, "
            f"Model: {quoted(base.name)}, {lora}Guide: {quoted(method.name)}, "
            f"g: {config.g:g}, Version: ppdd")


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """The pictures on white, four a row, or eight where they are many."""
    images = [enlarged(image, 192) for image in images]
    columns, (width, height) = min(len(images), 4 if len(images) <= 16 else 8), images[0].size
    gap, rows = width // 24, math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def enlarged(image: Image.Image, width: int) -> Image.Image:
    """The picture with every pixel a square, so that it is at least so wide."""
    times = math.ceil(width / image.width)
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


# ------------------------------------------------------------------------------- the comparison

class Column(NamedTuple):
    """What one method made of all shots."""

    label: str
    passes: str
    milliseconds: float             # a picture, from prompt to pixels
    images: list[Image.Image]


def compare(config: Config, base: Base, shots: list[Shot], out: Path) -> None:
    """One sheet: a row a shot, a column a method, the same noise along a row."""
    if len(shots) > ROWS:
        raise BadInput(f"--compare has room for {ROWS} rows, and these are {len(shots)}")
    methods = {}
    for guide in dict.fromkeys((*COLUMNS, config.guide)):
        try:
            methods[COLUMNS.get(guide, Path(guide).stem)] = find_method(config, base, guide)
        except BadInput as error:
            print(f"a column is left out: {error}")
    with progress_bar(config, shots, len(methods)) as bar:
        columns = [measure(config, base, *item, shots, bar.update) for item in methods.items()]
    path, threads = free_name(out, "compare"), torch.get_num_threads()
    hardware = f"{threads} CPU thread{'s' * (threads > 1)}"
    if config.device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(config.device)
    times = {column.label: round(column.milliseconds, 2) for column in columns}
    terms = (f"{config.steps} steps of {config.sampler.upper()}, g = {config.g:g}, the same noise "
             f"along a row; milliseconds a picture, from prompt to pixels, in batches of "
             f"{min(config.batch, len(shots))}: {hardware}, {config.dtype}")
    method = Method(f"{', '.join(times)} side by side", "")
    save_png(path, draw_comparison(columns, shots, terms), sheet="compare", ppdd=as_json(config),
             milliseconds=json.dumps(times), terms=terms, parameters=parameters(
                 config, base, method, shots[0], ppdd.fingerprint(base.path)))
    print(f"{terms}\n{path}: " + ", ".join(f"{label} {ms:,.1f} ms" for label, ms in times.items()))


def measure(config: Config, base: Base, label: str, method: Method, shots: list[Shot],
            progress: Callable[[], object]) -> Column:
    """The shots' pictures and the time they took; one step goes before that, unmeasured."""
    paint(replace(config, steps=1), base, method, shots[:config.batch])
    start, images = time.perf_counter(), []
    for batch in batches(config, shots):
        images += paint(config, base, method, batch, progress)
    milliseconds = 1000 * (time.perf_counter() - start) / len(shots)
    n = predictions(config) * (2 if method.kind == "cfg" else 1)
    passes = f"{n} UNet + {n} guide passes" if method.kind == "full" else f"{n} UNet passes"
    return Column(label, passes, milliseconds, images)


def draw_comparison(columns: list[Column], shots: list[Shot], terms: str) -> Image.Image:
    """Headers over the columns, prompts beside the rows, the terms of the comparison below."""
    rows = [[enlarged(image, 256) for image in row] for row in zip(*(c.images for c in columns))]
    width, height = rows[0][0].size
    unit = width / 256
    left, top, gap = round(206 * unit), round(112 * unit), round(14 * unit)
    title, small = (ImageFont.load_default(points * unit) for points in (23, 15))
    sheet = Image.new("RGB", (left + len(columns) * (width + gap) + gap,
                              top + len(rows) * (height + gap) + 6 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, column in enumerate(columns):
        middle = left + i * (width + gap) + width / 2
        draw.text((middle, 34 * unit), column.label, "#111", title, anchor="mm")
        draw.text((middle, 64 * unit), column.passes, "#777", small, anchor="mm")
        draw.text((middle, 86 * unit), f"{column.milliseconds:,.0f} ms", "#777", small, anchor="mm")
    for row, (shot, images) in enumerate(zip(shots, rows)):
        y, said = top + row * (height + gap), textwrap.fill(shot.prompt, 22, max_lines=9)
        draw.text((2 * gap, y + height / 2), said, "#777", small, anchor="lm", spacing=6 * unit)
        for i, image in enumerate(images):
            sheet.paste(image, (left + i * (width + gap), y))
    said = textwrap.fill(terms, 36 * len(columns))
    draw.text((left, sheet.height - 5 * gap), said, "#aaa", small, spacing=6 * unit)
    return sheet


# ------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """Answers bad input with one sentence, without its usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {BREAKS.sub(' ', message)}\n")


def command_line() -> Parser:
    """One flag a field of `Config`."""
    parser = Parser(prog="sample.py", description=__doc__.splitlines()[0])
    for f in fields(Config):
        flag, more = "--" + f.name.replace("_", "-"), dict(f.metadata)
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", **more)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, nargs="+", action="extend", default=[], **more)
        else:
            more["help"] += " (%(default)s)" if f.default != "" else ""
            parser.add_argument(flag, type=type(f.default), default=f.default, **more)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = command_line()
    ppdd.print_any_name()
    given = parser.parse_args(argv)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(given).items()}
    for f in fields(Config):                                 # argparse makes a list of --steps=--
        if isinstance(values[f.name], tuple) and not isinstance(f.default, tuple):
            parser.error(f"argument --{f.name}: expected one argument")
    try:
        run(Config(**values))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the pictures of finished batches are kept\n")
    except torch.cuda.OutOfMemoryError:
        parser.error(f"out of GPU memory: pass --batch below {given.batch}, or a smaller --size")
    except (MemoryError, RuntimeError) as error:
        if not ppdd.out_of_memory(error):
            raise
        parser.error(f"out of memory: pass --batch below {given.batch}, or a smaller --size")
    except OSError as error:
        parser.error(f"{error.filename or given.out}: {error.strerror or error}")
    except (BadInput, CheckpointError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
