"""Guides in files: written, read, found, and handed to other tools.

A student of Meng et al., a whole UNet, is kept, found and used as a guide of the kind "whole".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

import meng
import ppdd
from meng import Student, StudentConfig
from ppdd import TIMESTEPS, FullGuide, GuideConfig, SeeingGuide, TinyGuide
from support.base import MINI, Base, find_weights, to_channels_last
from support.checkpoint import (
    CheckpointError,
    StateDictMismatch,
    build_on_meta,
    folder_name,
    load_strict,
    load_unet,
    read_config,
    read_tensors,
)
from support.cli import BadInput
from support.files import expand, files_in, save_tensors, write_text
from unet import KEY_PREFIX, UNetConfig, folder_names

# A guide of stage one serves any schedule. The first halving starts from it on 64 steps, so where
# guides are compared by their number of steps it counts as one for 64.
STAGE_ONE_STEPS = 64
BUNDLED = MINI.parent / "guides"


class GuideFile(NamedTuple):
    """What a guide's file says of itself."""

    config: GuideConfig | StudentConfig
    about: dict                         # base, base_hash, steps, g_range, updates, settings, …
    base_config: UNetConfig | None      # of the base it was trained for; None in the oldest files

    @property
    def steps(self) -> int:
        """The number of steps it was halved to; `STAGE_ONE_STEPS` where it never was."""
        return self.about.get("steps") or STAGE_ONE_STEPS

    @property
    def trial(self) -> int:
        """Where --max-updates cut its stages short: to how many updates; else 0."""
        return (self.about.get("settings") or {}).get("max_updates") or 0


# ------------------------------------------------------------------------------- files


def build_guide(base: UNetConfig, config: GuideConfig | StudentConfig) -> nn.Module:
    """A fresh guide or student, for a base of this shape."""
    build = Student if isinstance(config, StudentConfig) else ppdd.build_guide
    return build(base, config)


def save_guide(path: Path, guide: nn.Module, config: GuideConfig | StudentConfig,
               about: dict) -> None:
    """fp16 safetensors; metadata `guide` (its configuration), `about` (base, stage, …) and
    `unet_config` (the base's shape). A student's names are those of a UNet in an official file."""
    prefix = KEY_PREFIX if isinstance(guide, Student) else ""
    tensors = {prefix + k: v.half() for k, v in guide.state_dict().items()}
    metadata = {"guide": asdict(config), "about": about, "unet_config": asdict(guide.config)}
    save_tensors(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})


def read_guide(path: str | Path) -> GuideFile:
    """A guide file's metadata, without its weights. Raises CheckpointError."""
    _, metadata = read_tensors(path, lambda names: {})
    try:
        values = json.loads(metadata["guide"])
        pool = values.pop("pool", "attention")          # named by older files
        kind = StudentConfig if values.get("kind") == "whole" else GuideConfig
        config = read_config(kind, json.dumps(values), path)
        about = json.loads(metadata["about"])
        low, high = about.get("g_range") or (0, 1)
        counts = [about.get("updates"), *((about.get(part) or {}).get(k) for part, k in (
            ("settings", "updates"), ("settings", "max_updates"), ("init", "updates")))]
        if not (0 <= (about.get("steps") or 0) <= TIMESTEPS and math.isfinite(high - low)
                and all(isinstance(count, int | None) for count in counts)):
            raise ValueError("steps, g_range or updates")
        shape = metadata.get("unet_config")
        base_config = None if shape is None else read_config(UNetConfig, shape, path)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a guide: pass a .safetensors that train.py saved"
                              ) from error
    if pool != "attention":
        raise CheckpointError(f"{path} was trained with an option that is gone, --pool {pool}: "
                              "train it again without it")
    return GuideFile(config, about, base_config)


def load_guide(path: Path, base: UNetConfig, dtype: torch.dtype = torch.float32,
               device: str | torch.device = "cpu") -> nn.Module:
    """The guide in a file, for a base of the shape it was made for; eval mode, no gradients.

    Raises CheckpointError, with both shapes where the file notes its own.
    """
    config, _, shape = read_guide(path)
    advice = "use it with a checkpoint of that size, or train one for this"
    if shape not in (None, base):
        there, here = asdict(shape), asdict(base)
        sizes = ", ".join(f"{k} {there[k]} and not {here[k]}" for k in here if there[k] != here[k])
        raise CheckpointError(f"{path} was trained for a base of another size ({sizes}): {advice}")
    if _is_of_another_kind(shape, base):
        raise CheckpointError(f"{path} was trained for a base of {base.out_channels} input "
                              f"channels, and this one has {base.in_channels}, for inpainting: "
                              "train a guide for it")
    tensors, _ = read_tensors(path)
    tensors = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in tensors.items()}
    guide = build_on_meta(lambda: build_guide(base, config), path).to(dtype)
    try:
        load_strict(guide, tensors, path, device)
    except StateDictMismatch as error:
        raise CheckpointError(f"{path} was trained for a base of another size: {advice}") from error
    return to_channels_last(guide).eval().requires_grad_(False)


def transplant(path: Path, original: str | Path, base: Base) -> Student:
    """The student in a file, moved from the base it was distilled on to this one.

    Raises BadInput where that original has other sizes, CheckpointError as `load_guide`.
    """
    student = load_guide(path, base.unet.config, device=base.device)    # float32: it is subtracted
    unet = load_unet(find_weights(original), device=base.device)
    if unet.config != student.config:
        raise BadInput(f"{original}: its UNet has other sizes than that of {path}, so it can't be "
                       "the base that this was distilled on")
    return meng.transplant(student, unet, base.unet).to(base.unet.dtype)


def fits(path: Path, base: UNetConfig) -> bool:
    """Whether a guide's tensors have the shapes that this base asks for; no weights are read."""
    try:
        config, _, shape = read_guide(path)
        guide = build_on_meta(lambda: build_guide(base, config), path)
        with safe_open(path, framework="pt") as opened:
            shapes = {name.removeprefix(KEY_PREFIX): opened.get_slice(name).get_shape()
                      for name in opened.keys()}
    except CheckpointError:
        return False
    return shape in (None, base) and not _is_of_another_kind(shape, base) and shapes == {
        name: list(tensor.shape) for name, tensor in guide.state_dict().items()}


def _is_of_another_kind(shape: UNetConfig | None, base: UNetConfig) -> bool:
    """Whether the base is an inpainting model and the guide's file does not note its base: older
    files don't, and none of those was trained for one. A tiny guide's tensors can't tell."""
    return shape is None and base.in_channels != base.out_channels


# ------------------------------------------------------------------------------- finding one


def find_guide(base: Base, kind: str, steps: int, folder: str = "", home: str = "") -> Path | None:
    """The most suitable guide of a kind, tiny, seeing, full or whole, that fits the base; None
    where none does.

    `folder` comes before guides/HOME, and that before guides of other bases and the bundled ones.
    Then come those distilled on HOME, those for about so many steps, and those of the paper's
    form. HOME is the base's own name, if no other is given. Guides for a single g are for whoever
    names them, and so are trials in guides/.
    """
    home = home or base.name
    ranked = []
    for pool, path in _candidates(home, folder):
        try:
            file = read_guide(path)
        except CheckpointError:
            continue                                    # another file that lies there
        low, high = file.about.get("g_range") or (0, 1)
        form = getattr(file.config, "form", "sum")      # a student has none
        wanted = kind == ("seeing" if form == "seeing" else file.config.kind)
        if wanted and low < high and not (file.trial and pool):
            distance = abs(math.log(steps / file.steps))
            ranked.append((pool, file.about.get("base") != home, distance,
                           form != "sum", path))
    return next((path for *_, path in sorted(ranked) if fits(path, base.unet.config)), None)


def _candidates(home: str, folder: str) -> Iterator[tuple[int, Path]]:
    """Files that may be guides, each with the rank of the place it lies in."""
    if folder:
        yield from ((0, path) for path in files_in(expand(folder), "**/*.safetensors"))
    yield from ((1, path) for path in files_in(Path("guides") / home, "*.safetensors"))
    yield from ((2, path) for path in files_in("guides", "*/*.safetensors"))
    yield from ((2, path) for path in files_in(BUNDLED, "*.safetensors"))


def guide_path(base: Base, name: str) -> Path:
    """The guide of a name, as full-16, in guides/BASE or among the miniature's, or in that file.

    Trials count only by their file. Raises BadInput where there is none.
    """
    if name.endswith(".safetensors"):
        return expand(name)
    places = [Path("guides") / base.name / f"{name}.safetensors"]
    if base.is_miniature:
        places.append(BUNDLED / f"{name}.safetensors")
    for place in places:
        if place.is_file() and not read_guide(place).trial:
            return place
    trial = ", but for a trial, which is used by its file" if places[0].is_file() else ""
    raise BadInput(f"there is no {places[0]}{trial}: train.py makes guides")


def describe_guide(path: Path, about: dict, base: Base, original: str = "") -> str:
    """A line on which guide is used, for what it was made, how long, and on which base; original is
    the base that a student was moved from."""
    steps, made_on = about.get("steps"), about.get("base")
    parts = [f"guide: {path}, distilled on {made_on} for {steps or 'any'} step{'s' * (steps != 1)}"]
    if updates := _updates_in_words(about):
        parts.append(f"after {updates} updates")
    if limit := GuideFile(GuideConfig(), about, None).trial:
        parts.append(f"a trial of at most {limit} a stage")
    if made_on != base.name:
        is_student = (about.get("settings") or {}).get("guide") == "whole"
        parts.append(f"plugged into {base.name} as it is" if not is_student else
                     f"moved by its difference from {original} to {base.name}" if original else
                     f"a UNet of its own: that of {base.name} is not used")
    if about.get("uncond"):
        parts.append(f"away from {about['uncond']!r}")
    return ", ".join(parts)


def doubts_about(path: Path, file: GuideFile, g_values: set[float], steps: int, sampler: str
                 ) -> list[str]:
    """Why a guide may not do well with these settings, a line a reason."""
    low, high = file.about.get("g_range") or (-math.inf, math.inf)
    halved_to = file.about.get("steps") or 0                # 0: of stage one, for any number
    settings = file.about.get("settings") or {}
    given, as_long = f"{steps}", steps
    if sampler == "stochastic":
        given, as_long = f"{steps} stochastic ones, of twice the length,", steps / 2
    is_far = not all(low <= g <= high for g in g_values)
    reasons = ((is_far, f"was trained for g from {low:g} to {high:g}"),
               (as_long < halved_to, f"was distilled for {halved_to} steps; {given} are fewer"),
               (halved_to and sampler == "plms", "was distilled for DDIM's steps, not for PLMS"),
               (halved_to and sampler == "stochastic" and not settings.get("stochastic"),
                "was trained without --stochastic: half of the steps start between its own"))
    return [f"{path.stem} {reason}" for holds, reason in reasons if holds]


def doubts_of_origin(path: Path, about: dict, original: Path, sha256: str) -> list[str]:
    """A line where a student was not distilled on `original`, from which it is to be moved."""
    if about.get("base_hash") in (None, sha256):
        return []
    return [f"{path} was distilled on {about.get('base')}, whose hash is not that of {original}: "
            "unless both hold the same weights, it is moved by a wrong difference"]


def _updates_in_words(about: dict) -> str:
    """The updates of all stages that made a guide: "6,000 + 3 × 500"; "" where it isn't known."""
    last, settings, init = (about.get(k) for k in ("updates", "settings", "init"))
    if not last or about.get("stage", 0) not in range(1, 11):
        return f"{last:,}" if last else ""
    halved_before = (init or {}).get("steps")           # of those before, the file doesn't know
    first = "" if halved_before else (init or settings or {}).get("updates")
    return f"{first:,} + {about['stage']} × {last:,}" if first else f"{about['stage']} × {last:,}"


# ------------------------------------------------------------------------------- other tools


def diffusers_residuals(guide: TinyGuide, unet: nn.Module, g: float, t: Tensor, c: Tensor,
                        z: Tensor | None = None) -> dict:
    """What a tiny guide adds, as the keyword arguments of diffusers' UNet2DConditionModel.

    unet is that model; t a timestep or (B,); c the prompt's states (B, L, D): unet(z, t,
    encoder_hidden_states=c, **diffusers_residuals(guide, unet, g, t, c)). A seeing guide reads the
    features of the latents z (B, Z, H, W) too, from a pass of unet of their own.
    """
    t = t.to(c.device).expand(len(c))
    guidance = torch.full((len(c),), float(g), device=c.device)
    emb = unet.time_embedding(unet.time_proj(t).to(c.dtype))
    features = []
    if isinstance(guide, SeeingGuide):
        features = diffusers_features(unet, z, t, c)
    *down, middle = guide(guidance, emb, c, z, t, features)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def diffusers_features(unet: nn.Module, z: Tensor, t: Tensor, c: Tensor) -> list[Tensor]:
    """`UNet.encode`'s features, of diffusers' UNet2DConditionModel: hooks catch what conv_in, the
    blocks on the way down and the middle block return. The middle one ends the pass."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, _: tuple, result: Tensor | tuple) -> None:
        caught.extend([result] if isinstance(result, Tensor) else result[1])
        if module is unet.mid_block:
            raise StopIteration

    modules = [unet.conv_in, *unet.down_blocks, unet.mid_block]
    hooks = [module.register_forward_hook(catch) for module in modules]
    try:
        unet(z.to(c.dtype), t, encoder_hidden_states=c)
    except StopIteration:
        return caught
    finally:
        for hook in hooks:
            hook.remove()


def save_controlnet(folder: Path, guide: FullGuide, name: str) -> Path:
    """A full guide as the ControlNet that it is, fp16, in both layouts that other tools read.

    config.json and diffusion_pytorch_model.safetensors are the folder layout of diffusers;
    NAME-controlnet.safetensors is the single file, in ControlNet's own names after
    "control_model.". Both take a plain grey image of value g / 10 as the hint. Returns the single
    file's path.
    """
    tensors = {k: v.half() for k, v in guide.state_dict().items()}
    single = folder / f"{name}-controlnet.safetensors"
    save_tensors(single, {f"control_model.{k}": v for k, v in tensors.items()})
    names = _controlnet_names(guide)
    save_tensors(folder / "diffusion_pytorch_model.safetensors",
                 {folder_name(k, names): v for k, v in tensors.items()}, {"format": "pt"})
    write_text(folder / "config.json",
               json.dumps(_controlnet_config(guide), indent=2, sort_keys=True) + "\n")
    return single


def _controlnet_names(guide: FullGuide) -> dict[str, str]:
    """Names of diffusers' ControlNetModel to the guide's own."""
    names = folder_names(guide.config) | {
        "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
        "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
        "controlnet_mid_block.": "middle_block_out.0."}
    names |= {f"controlnet_cond_embedding.blocks.{i}.": f"input_hint_block.{2 * i + 2}."
              for i in range(6)}
    return names | {f"controlnet_down_blocks.{i}.": f"zero_convs.{i}.0."
                    for i in range(len(guide.zero_convs))}


def _controlnet_config(guide: FullGuide) -> dict:
    base, hint = guide.config, guide.input_hint_block[0].out_channels
    kinds = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in base.attention]
    return {
        "_class_name": "ControlNetModel", "in_channels": base.in_channels,
        "block_out_channels": [base.model_channels * m for m in base.channel_mult],
        "layers_per_block": base.num_res_blocks, "down_block_types": kinds,
        "cross_attention_dim": base.context_dim, "attention_head_dim": base.num_heads,
        "norm_num_groups": base.norm_groups,
        "conditioning_embedding_out_channels": [hint, 2 * hint, 6 * hint, 16 * hint]}
