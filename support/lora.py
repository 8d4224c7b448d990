"""LoRA files merged into a base: W += scale · (alpha / rank) · up @ down.

Files name layers in many ways: kohya's (`lora_unet_down_blocks_0_…_to_q.lora_down.weight`), that
of diffusers and peft (`unet.down_blocks.0.….to_q.lora_A.weight`), that of old diffusers
(`unet.….processor.to_q_lora.down.weight`), LyCORIS's and ComfyUI's. `_flat` brings all of them to
one. Beside low-rank differences a file may hold full ones, of weights and of biases (`.diff`).
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from support.checkpoint import folder_name, read_tensors
from support.cli import BadInput
from support.configs import CheckpointError, check_metadata, read_json, require_only
from support.files import expand
from unet import UNet, folder_names

_PIECE = re.compile(r"(.+?)[._](?:lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight"
                    r"|(diff|diff_b|w_norm|b_norm))")
_KINDS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
_TARGETS = ((("up", "down"), "weight"), (("diff",), "weight"), (("diff_b",), "bias"))
_OTHER_KINDS = ("hada_", "lokr_", "oft_", "dora_scale", "lora_magnitude", "lora_mid", "lora_bias")
_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")      # in a folder
# Settings of peft that change more than the strength of a plain LoRA. (`fan_in_fan_out` does not:
# peft itself leaves it aside for the layers there are here.)
_PEFT_ONLY = {"peft_type": "LORA", "use_dora": False, "bias": "none", "lora_bias": False,
              "modules_to_save": None, "trainable_token_indices": None, "layer_replication": None,
              "use_qalora": False, "target_parameters": None, "alora_invocation_tokens": None}
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")      # before training begins
_TEXT_LAYER = re.compile("(text_model_)?(encoder_layers|embeddings|final_layer_norm)_")


def parse_lora(given: str) -> tuple[Path, float]:
    """The file or folder and the scale of "FILE:scale", where "FILE" alone is scale 1."""
    file, _, scale = given.rpartition(":")
    try:
        factor = float(scale)
    except ValueError:
        file, factor = given, 1.0
    if not file or not abs(factor) <= 100:
        raise BadInput(f"LoRA {given!r}: pass FILE or FILE:scale, with a scale of at most 100")
    return expand(file), factor


def lora_files(path: Path) -> list[Path]:
    """The LoRA's weights, in the folder given or that file itself, and peft's settings if any."""
    file = path
    if os.path.isdir(path):                 # unlike Path.is_dir, never raises
        file = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path} holds no {' or '.join(_NAMES)}: pass the LoRA's file")
    settings = file.with_name("adapter_config.json")
    return [file, settings] if file.name == _NAMES[0] and os.path.isfile(settings) else [file]


def merge_lora(unet: UNet, text: nn.Module, path: Path, scale: float = 1.0) -> list[str]:
    """Adds a LoRA to the weights of a UNet and a text encoder, in place.

    Returns notes to print: where no alpha was found, and the names of tensors that no layer here
    has a place for. Raises CheckpointError, and changes nothing, where the file does not fit.
    """
    path, *settings = lora_files(path)
    tensors, metadata = read_tensors(path)
    _refuse_other_kinds(tensors, path)
    check_metadata(metadata, path)
    strength = _Strengths(tensors, metadata, path, settings)
    layers, changes, used = _layers(unet, text), [], set()
    for layer, pieces in _pieces(tensors).items():
        for kinds, target in _TARGETS:
            parameter = getattr(layers.get(layer), target, None)
            if parameter is None or not all(kind in pieces for kind in kinds):
                continue
            names = [pieces[kind] for kind in kinds]
            factors = [tensors[name] for name in names]
            _check_shapes(layer, factors, parameter, path)
            factor = scale * (strength(layer, names[1], len(factors[1])) if names[1:] else 1)
            if not (factor * sum(x.float().sum() for x in factors)).isfinite():
                raise CheckpointError(f"{path} holds numbers that are not finite (layer {layer}): "
                                      "download it again")
            changes.append((layers[layer], target, factor, factors))
            used.update(names)
    unused = [name for name in tensors if name not in used and not name.endswith(".alpha")]
    notes = _notes(strength, unused)
    if not changes:
        found = f" ({notes[-1]})" if notes else ""
        raise CheckpointError(f"{path} holds no LoRA for a base of this kind{found}: pass one for "
                              "Stable Diffusion 1.5")
    for change in changes:
        _add(*change)
    return notes


def _notes(strength: _Strengths, unused: list[str]) -> list[str]:
    notes = ["no alpha found, strength 1"] if strength.is_unknown else []
    if unused:
        more = f", … ({len(unused)} in all)" if len(unused) > 3 else ""
        notes.append(f"names not known: {', '.join(unused[:3])}{more}")
    return notes


def _add(layer: nn.Module, target: str, factor: float, factors: list[Tensor]) -> None:
    parameter = getattr(layer, target)
    change, *down = (x.to(parameter.device, torch.float32) for x in factors)
    if down:
        change = change.flatten(1) @ down[0].flatten(1)                       # (out, in · kernel)
    change = factor * change.view_as(parameter)
    # A new parameter: the old one may be a memory-mapped file, which must not be written to.
    changed = nn.Parameter((parameter.float() + change).to(parameter.dtype), False)
    setattr(layer, target, changed)


def _check_shapes(layer: str, factors: list[Tensor], parameter: Tensor, path: Path) -> None:
    change, *down = factors
    if down:
        fits = (min(change.ndim, down[0].ndim) >= 2 and 0 < len(down[0]) == change[0].numel()
                and (len(change), down[0][0].numel()) == (len(parameter), parameter[0].numel()))
    else:
        fits = change.squeeze().shape == parameter.squeeze().shape
    if not fits:
        raise CheckpointError(f"{path} is a LoRA for a base of another shape (layer {layer}): "
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
    name = re.sub("^(base_model_model|lora|lycoris|(model_)?diffusion_model)_", "", name)
    name = re.sub("^(text_encoders_)?clip_l_(transformer_)?", "te_", name)
    if name.startswith(("te_", "te1_", "text_encoder_")) or _TEXT_LAYER.match(name):
        name = "text_" + re.sub("^((te1?|text_encoder)_)?(text_model_)?", "", name)
        return re.sub("attn_to_(q|k|v|out)_$", r"attn_\1_proj_", name)
    return "unet_" + re.sub("to_out_$", "to_out_0_", name.removeprefix("unet_"))


def _pieces(tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """Of each layer, the names of its "down" and "up", its "diff" and "diff_b"."""
    pieces = defaultdict(dict)
    for name in tensors:
        if match := _PIECE.fullmatch(name):
            kind = match[2] or match[3]
            pieces[_flat(match[1])][_KINDS.get(kind, kind)] = name
    return pieces


def _layers(unet: UNet, text: nn.Module) -> dict[str, nn.Module]:
    """A base's layers by their `_flat` names, in the folder layout's spelling and in ours."""
    table = folder_names(unet.config)
    names = {f"unet.{name}": layer for name, layer in unet.named_modules()}
    names |= {f"unet.{folder_name(name + '.', table)[:-1]}": layer
              for name, layer in unet.named_modules()}
    names |= {f"text_encoder.{name}": layer for name, layer in text.named_modules()}
    return {_flat(name): layer for name, layer in names.items() if hasattr(layer, "weight")}


class _Strengths:
    """alpha / rank of each layer: by its own tensor, else by what peft wrote down, else 1.

    peft writes its settings into adapter_config.json beside the file; diffusers copies them into
    the file's metadata, one set a network.
    """

    def __init__(self, tensors: dict[str, Tensor], metadata: dict, path: Path,
                 settings: list[Path]):
        self.path, self.is_unknown = path, False
        try:
            self.alphas = {_flat(name.removesuffix(".alpha")): tensor.item()
                           for name, tensor in tensors.items() if name.endswith(".alpha")}
            written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            self.peft = {flat: {key.removeprefix(f"{part}."): value
                                for key, value in written.items() if key.startswith(f"{part}.")}
                         for part, flat in (("unet", "unet"), ("text_encoder", "text"))}
        except (ValueError, AttributeError, RuntimeError, RecursionError) as error:
            raise self._unreadable(error) from error
        for file in settings:
            self.peft = dict.fromkeys(self.peft, read_json(file))
        for part, said in self.peft.items():
            if said or settings:
                self.peft[part] = {"lora_alpha": 8} | said              # peft's own default
            source = settings[0] if settings else path
            require_only(said, _PEFT_ONLY, source)
            if str(said.get("init_lora_weights")).lower().startswith(_CHANGES_THE_BASE):
                raise CheckpointError(
                    f"{source} has init_lora_weights {json.dumps(said['init_lora_weights'])}, "
                    "which changes the base too: have peft convert it to a plain LoRA")

    def __call__(self, layer: str, name: str, rank: int) -> float:
        """Of a layer, by its `_flat` name and by the name of its "down" tensor in the file."""
        said = self.peft[layer.partition("_")[0]]
        if layer in self.alphas:
            return self.alphas[layer] / rank
        if "lora_alpha" not in said:
            self.is_unknown = True
            return 1.0
        module = re.sub(r"^(base_model\.model|unet|text_encoder)\.", "", _PIECE.fullmatch(name)[1])
        alpha = said["lora_alpha"]
        try:
            for pattern, other in (said.get("alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):       # as peft itself matches it
                    alpha = other
                    break
            return float(alpha) / (rank**0.5 if said.get("use_rslora") else rank)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path} holds an alpha that can't be read ({error}): download "
                               "it again")
