"""LoRA files merged into a base: W += scale · (alpha / rank) · up @ down.

Files name layers in three ways: kohya's (`lora_unet_down_blocks_0_…_to_q.lora_down.weight`), that
of diffusers and peft (`unet.down_blocks.0.….to_q.lora_A.weight`), and that of old diffusers
(`unet.….processor.to_q_lora.down.weight`). `_flat` brings all of them to one.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from support.checkpoint import CheckpointError, folder_name, read_tensors
from support.cli import BadInput
from support.files import expand
from unet import UNet, folder_names

_HALF = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
_OTHER_KINDS = ("hada_", "lokr_", "oft_", "dora_scale", "lora_magnitude", "lora_mid", "lora_bias")


def parse_lora(given: str) -> tuple[Path, float]:
    """The file and the scale of "FILE:scale", where "FILE" alone is scale 1."""
    file, _, scale = given.rpartition(":")
    try:
        factor = float(scale)
    except ValueError:
        file, factor = given, 1.0
    if not file or not abs(factor) <= 100:
        raise BadInput(f"LoRA {given!r}: pass FILE or FILE:scale, with a scale of at most 100")
    return expand(file), factor


def merge_lora(unet: UNet, text: nn.Module, path: Path, scale: float = 1.0) -> list[str]:
    """Adds a LoRA file to the weights of a UNet and a text encoder, in place.

    Linear layers and convolutions alike. Returns the names of the tensors that no layer here has a
    place for. Raises CheckpointError, and changes nothing, where the file does not fit.
    """
    tensors, metadata = read_tensors(path)
    _refuse_other_kinds(tensors, path)
    pairs, layers = _pairs(tensors), _layers(unet, text)
    alpha_of = _alphas(tensors, metadata, path)
    changes = {}
    for name, pair in pairs.items():
        if name in layers and len(pair) == 2:
            down, up = tensors[pair["down"]], tensors[pair["up"]]
            _check_shapes(name, down, up, layers[name].weight, path)
            factor = scale * alpha_of(name, len(down)) / len(down)
            if not (factor * (up.float().sum() + down.float().sum())).isfinite():
                raise CheckpointError(f"{path} holds numbers that are not finite (layer {name}): "
                                      "download it again")
            changes[name] = factor, down, up
    if not changes:
        raise CheckpointError(f"{path} holds no LoRA for a base of this kind: pass one for Stable "
                              "Diffusion 1.5")
    for name, change in changes.items():
        _add(layers[name], *change)
    used = {tensor for name in changes for tensor in pairs[name].values()}
    return [name for name in tensors if name not in used and not name.endswith(".alpha")]


def _add(layer: nn.Module, factor: float, down: Tensor, up: Tensor) -> None:
    weight = layer.weight
    down = down.to(weight.device, torch.float32).flatten(1)                   # (rank, in · kernel)
    up = up.to(weight.device, torch.float32).flatten(1)                       # (out, rank)
    change = factor * (up @ down).view_as(weight)
    # A new parameter: the old one may be a memory-mapped file, which must not be written to.
    layer.weight = nn.Parameter((weight.float() + change).to(weight.dtype), False)


def _check_shapes(name: str, down: Tensor, up: Tensor, weight: Tensor, path: Path) -> None:
    fits = (min(down.ndim, up.ndim) >= 2 and 0 < len(down) == up[0].numel()
            and (len(up), down[0].numel()) == (len(weight), weight[0].numel()))
    if not fits:
        raise CheckpointError(f"{path} is a LoRA for a base of another shape (layer {name}): "
                              "pass one for Stable Diffusion 1.5")


def _refuse_other_kinds(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError for what is no plain LoRA, or one of a base that names show."""
    if any(mark in name for name in tensors for mark in _OTHER_KINDS):
        raise CheckpointError(f"{path} is not a plain LoRA (but LoHa, LoKr, DoRA or the like): "
                              "merge it into a checkpoint with the tool that made it")
    if any(name.startswith(("lora_te2_", "text_encoder_2.")) for name in tensors):
        raise CheckpointError(f"{path} is a LoRA for Stable Diffusion XL: pass one for 1.5")


def _flat(layer: str) -> str:
    """A layer's name in the one form that all spellings share: "unet_…_" or "text_…_"."""
    name = layer.replace(".", "_").replace("_processor_", "_") + "_"
    name = re.sub("^(base_model_model|lora)_", "", name)
    if name.startswith(("te_", "te1_", "text_encoder_")):
        name = "text_" + re.sub("^(te1?|text_encoder)_(text_model_)?", "", name)
        return re.sub("attn_to_(q|k|v|out)_$", r"attn_\1_proj_", name)
    return "unet_" + re.sub("to_out_$", "to_out_0_", name.removeprefix("unet_"))


def _pairs(tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """Of each layer, the names of its "down" and its "up" tensor."""
    pairs, halves = defaultdict(dict), {"A": "down", "B": "up", "down": "down", "up": "up"}
    for name in tensors:
        if match := _HALF.fullmatch(name):
            pairs[_flat(match[1])][halves[match[2]]] = name
    return pairs


def _layers(unet: UNet, text: nn.Module) -> dict[str, nn.Module]:
    """A base's layers by their `_flat` names, in the folder layout's spelling and in ours."""
    table = folder_names(unet.config)
    names = {f"unet.{name}": layer for name, layer in unet.named_modules()}
    names |= {f"unet.{folder_name(name + '.', table)[:-1]}": layer
              for name, layer in unet.named_modules()}
    names |= {f"text_encoder.{name}": layer for name, layer in text.named_modules()}
    return {_flat(name): layer for name, layer in names.items()
            if isinstance(layer, nn.Linear | nn.Conv2d)}


def _alphas(tensors: dict[str, Tensor], metadata: dict, path: Path
            ) -> Callable[[str, int], float]:
    """alpha of a layer of this rank: its tensor's, else what peft wrote down, else the rank.

    Times √rank where peft wrote that it divides alpha by √rank only ("rslora").
    """
    known: dict[str, float] = {}
    rank_stabilised = set()
    try:
        written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        for part, short in (("unet", "unet"), ("text_encoder", "text")):
            for name, alpha in written.get(f"{part}.alpha_pattern", {}).items():
                known[_flat(f"{part}.{name}")] = float(alpha)
            if f"{part}.lora_alpha" in written:
                known[short] = float(written[f"{part}.lora_alpha"])
            if written.get(f"{part}.use_rslora"):
                rank_stabilised.add(short)
        known |= {_flat(k[:-6]): v.item() for k, v in tensors.items() if k.endswith(".alpha")}
    except (ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds an alpha that can't be read ({error}): download it "
                              "again") from error

    def alpha(layer: str, rank: int) -> float:
        part, _, name = layer.partition("_")
        # A pattern of peft's names the end of a layer's name.
        matches = (v for k, v in known.items() if k.startswith(f"{part}_")
                   and f"_{name}".endswith(f"_{k.partition('_')[2]}"))
        return next(matches, known.get(part, rank)) * (
            rank**0.5 if part in rank_stabilised else 1)

    return alpha
