"""Checkpoints of Stable Diffusion 1.5 into the three networks, and what else is passed for one.

Only safetensors files are opened, never a pickle, which could run code. Loading is strict: every
tensor a network needs is there with its shape, and none is left over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import clip_text
import unet
import vae
from clip_text import TextConfig, TextEncoder
from support.configs import (
    PASS_SD15,
    CheckpointError,
    check_metadata,
    check_schedule,
    read_config,
    read_sizes,
    refuse_markers,
    refuse_other_context,
)
from support.files import check_readable, expand, save_tensors
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig


class StateDictMismatch(CheckpointError):
    """Tensors that are not those of the network they are loaded into."""


@dataclass(frozen=True)
class Part:
    """Where a network lies: its keys in a single file, its folder and file in the folder layout."""

    name: str
    prefixes: tuple[str, ...]
    folder: str
    stem: str
    config: str     # metadata key under which a single file may carry the network's sizes as JSON


UNET = Part("UNet", (unet.KEY_PREFIX,), "unet", "diffusion_pytorch_model", "unet_config")
VAE_PART = Part("VAE", vae.KEY_PREFIXES, "vae", "diffusion_pytorch_model", "vae_config")
TEXT = Part("text encoder", (clip_text.KEY_PREFIX,), "text_encoder", "model", "text_config")

_PICKLE = (     # the command opens it without running any code in it
    "a pickle, which can run code when opened: pass a .safetensors file, or make one with "
    "python -c \"import torch, safetensors.torch as s; "
    "d = torch.load('FILE', 'cpu', weights_only=True); d = d.get('state_dict', d); "
    "s.save_file({k: v.clone() for k, v in d.items() if hasattr(v, 'dtype')}, "
    "'FILE.safetensors')\"")
# What the first bytes of a file that is no safetensors file show it to be.
_NOT_WEIGHTS = {
    b"PK\x03\x04": _PICKLE,
    b"\x80": _PICKLE,
    b"<": "a web page saved under a model's name: download the file itself",
    b"version https://git-lfs": "a Git LFS pointer, not the weights: run `git lfs pull` there"}
# What names or sizes of tensors show a whole file to be.
_OTHER_BASES = {
    "conditioner.": "Stable Diffusion XL", "cond_stage_model.model.": "Stable Diffusion 2"}
_OR_ALONE = ("", ", or a VAE beside it with --vae FILE")
_ADD_ONS = {"lora": "a LoRA", "control": "a ControlNet"}
# Tensors that belong to a part's own training, or that this encoder has no use for.
_IGNORED_PREFIXES = ("model_ema.", "loss.")
_IGNORED_TEXT = ("embeddings.position_ids", "text_projection.weight")


# ------------------------------------------------------------------------------- whole networks


def load_unet(path: str | Path, dtype: torch.dtype = torch.float32,
              device: torch.device | str = "cpu", config: UNetConfig | None = None) -> UNet:
    """The frozen UNet of a checkpoint, a single file or a folder, in eval mode.

    Its sizes are `config`, else those stored in the file, else Stable Diffusion 1.5's; whether it
    is for inpainting shows in its first layer. Raises CheckpointError where the checkpoint is not
    what it should be.
    """
    tensors, stored = read_checkpoint(path, UNET)
    config = config or _with_mask_channels(read_config(UNetConfig, stored, path), tensors)
    _refuse_other_unets(tensors, config, path)
    tensors = rename(tensors, unet.folder_names(config))
    return _load(lambda: UNet(config), tensors, path, dtype, device)


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32,
             device: torch.device | str = "cpu", config: VAEConfig | None = None) -> VAE:
    """The frozen autoencoder of a checkpoint; see `load_unet`."""
    tensors, stored = read_checkpoint(path, VAE_PART)
    config = config or read_config(VAEConfig, stored, path)
    tensors = rename(tensors, vae.folder_names(config))
    return _load(lambda: VAE(config), tensors, path, dtype, device)


def load_text_encoder(path: str | Path, dtype: torch.dtype = torch.float32,
                      device: torch.device | str = "cpu", config: TextConfig | None = None
                      ) -> TextEncoder:
    """The frozen text encoder of a checkpoint; see `load_unet`."""
    tensors, stored = read_checkpoint(path, TEXT)
    tensors = {name.removeprefix(clip_text.INNER_PREFIX): t for name, t in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if name not in _IGNORED_TEXT}
    config = config or read_config(TextConfig, stored, path)
    return _load(lambda: TextEncoder(config), tensors, path, dtype, device)


def _load(make: Callable[[], nn.Module], tensors: dict[str, Tensor], path: str | Path,
          dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    module = build_on_meta(make, path).to(dtype)
    load_strict(module, tensors, path, device)
    return module.eval().requires_grad_(False)


def save_checkpoint(path: str | Path, unet_: UNet, vae_: VAE, text: TextEncoder,
                    **metadata: str) -> None:
    """One fp16 file in the official single-file layout, the networks' sizes in its metadata."""
    tensors: dict[str, Tensor] = {}
    for network, part, inner in (
            (unet_, UNET, ""), (vae_, VAE_PART, ""), (text, TEXT, clip_text.INNER_PREFIX)):
        prefix = part.prefixes[0] + inner
        tensors |= {prefix + k: v.half() for k, v in network.state_dict().items()}
        metadata[part.config] = json.dumps(asdict(network.config))
    save_tensors(path, tensors, metadata)


# ------------------------------------------------------------------------------- reading files


def read_checkpoint(path: str | Path, part: Part) -> tuple[dict[str, Tensor], str]:
    """The tensors of one part of a checkpoint, less their prefix, and its stored configuration.

    `path` is a single .safetensors file, a folder with one subfolder a part, or that subfolder; a
    VAE may have a file to itself. Only the tensors asked for are read, memory mapped, in the dtype
    they have. The configuration, for `read_config`, is that in a file's metadata or in the
    config.json beside it, else "{}". Raises CheckpointError, also for what can't be obeyed.
    """
    path = expand(path)
    in_folder = os.path.isdir(path)
    files = _files_in_folder(path, part) if in_folder else [path]
    tensors, config = {}, "{}"
    if in_folder or path.name.startswith(VAE_PART.stem):
        config = read_sizes(files[0].parent / "config.json", part.folder)
    for file in files:
        found, metadata = read_tensors(
            file, lambda names, file=file: _select(file, names, part, in_folder))
        tensors |= found
        config = metadata.get(part.config, config)
        if part is UNET:
            check_metadata(metadata, file)
    if in_folder and part is UNET:
        check_schedule(files[0].parent.parent / "scheduler" / "scheduler_config.json")
    return tensors, config


def read_tensors(path: str | Path, choose: Callable[[list[str]], dict[str, str]] | None = None
                 ) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, memory mapped.

    `choose` is given the names of all tensors and returns those to read, each under the name to
    return it by; None reads all. Raises CheckpointError with what the file is.
    """
    path = Path(path)
    try:
        if b"\0" in str(path).encode():
            raise FileNotFoundError
        check_readable(path)            # safe_open says "no such file" of any it can't open
        if os.path.exists(path) and not os.path.isfile(path):   # a named pipe would block for ever
            raise CheckpointError(f"{path} is not a file: pass a .safetensors file")
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            names = choose(names) if choose else dict(zip(names, names))
            tensors = {short: opened.get_tensor(name) for short, name in names.items()}
            return tensors, opened.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: pass a .safetensors file or a model's folder"
                              ) from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path!a} has a name that is not UTF-8: rename it") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror or error})") from error
    except SafetensorError as error:    # only now: a good file may begin with those bytes as well
        raise CheckpointError(f"{path} is {_what_it_is(path, error)}") from error


def _what_it_is(path: Path, error: Exception) -> str:
    """What a file that is not safetensors is, from its first bytes, and what to do about it."""
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not head:
        return "empty: download it again"
    known = (what for start, what in _NOT_WEIGHTS.items() if head.startswith(start))
    unknown = f"cut short or not a safetensors file ({error}): download it again"
    return next(known, unknown).replace("FILE", str(path))


def _select(path: Path, names: Iterable[str], part: Part, in_folder: bool) -> dict[str, str]:
    """The names that belong to `part`, by what is left of them without their prefix."""
    plain = {name.removeprefix("state_dict."): name for name in names}
    alone = in_folder or (part is VAE_PART and "decoder.conv_in.weight" in plain)
    prefixes = ("",) if alone else part.prefixes
    if part is UNET:
        refuse_markers(plain, path)
    for mark, base in _OTHER_BASES.items():
        if any(name.startswith(mark) for name in plain):
            raise CheckpointError(f"{path} is {base}: {PASS_SD15}")
    chosen = {name[len(prefix):]: full
              for name, full in plain.items() for prefix in prefixes if name.startswith(prefix)}
    for mark, what in _ADD_ONS.items():
        if any(mark in name for name in chosen or plain):
            raise CheckpointError(f"{path} is {what}, an addition without the model it adds to: "
                                  "pass the Stable Diffusion 1.5 checkpoint itself")
    if not chosen:
        raise CheckpointError(f"{path} holds no {part.name} (no tensor is named "
                              f"{' or '.join(prefixes)}…): pass a whole Stable Diffusion 1.5 "
                              f"checkpoint or its folder{_OR_ALONE[part is VAE_PART]}")
    return {short: full for short, full in chosen.items()
            if not short.startswith(_IGNORED_PREFIXES)}


def _files_in_folder(path: Path, part: Part) -> list[Path]:
    """The part's files in a folder of the diffusers layout, full precision before fp16."""
    check_readable(path)
    for folder in (path / part.folder, path):
        if folder.exists():
            check_readable(folder)
        for variant in ("", ".fp16"):
            whole = folder / f"{part.stem}{variant}.safetensors"
            if whole.is_file():
                return [whole]
            index = folder / f"{part.stem}.safetensors.index{variant}.json"
            if index.is_file():
                return [folder / shard for shard in _shards(index)]
    raise CheckpointError(f"{path} has no {part.folder}/{part.stem}.safetensors: pass the folder "
                          f"of a whole model, saved as safetensors{_OR_ALONE[part is VAE_PART]}")


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists, all in its own folder."""
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError("names of files are missing, or lead to other folders")
        return shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} can't be read ({error}): download it again") from error


def _with_mask_channels(config: UNetConfig, tensors: Mapping[str, Tensor]) -> UNetConfig:
    """The sizes of an inpainting model, 9 input channels, where the first layer is one's: single
    files don't say."""
    first = tensors.get("input_blocks.0.0.weight", tensors.get("conv_in.weight"))
    channels = 2 * config.out_channels + 1          # latents, mask, latents of the masked image
    if first is not None and first.ndim == 4 and first.shape[1] == channels:
        return replace(config, in_channels=channels)
    return config


def _refuse_other_unets(tensors: Mapping[str, Tensor], config: UNetConfig,
                        source: str | Path) -> None:
    """Other bases use the same names; the width of the prompt's states gives them away."""
    for name, tensor in tensors.items():
        width = tensor.shape[1] if tensor.ndim > 1 else 0
        if name.endswith("attn2.to_k.weight") and width != config.context_dim:
            refuse_other_context(width, source)


# ------------------------------------------------------------------------------- into a network


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves tensors on the meta device alone: drawing numbers there imports SymPy, a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build_on_meta(make: Callable[[], nn.Module], source: str | Path) -> nn.Module:
    """The network that `make` makes, on the meta device, for weights to be loaded into.

    That takes no memory and no random numbers. Raises CheckpointError where it can't be made, as
    with sizes that were read from a damaged file.
    """
    try:
        with _NoRandomNumbers(), torch.device("meta"):
            return make()
    except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{source} carries sizes that make no network ({error}): download it "
                              "again, or pass another") from error


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path,
                device: torch.device | str | None = None) -> None:
    """Gives every parameter of `module` its tensor, cast to the parameter's dtype.

    A module on the meta device adopts the tensors: copied one at a time where dtype or `device`
    differ, otherwise not at all. Any other module is filled in place. 1×1 convolutions accept the
    weight of a linear layer. Raises StateDictMismatch, naming what is missing, unexpected or of
    another shape, and CheckpointError for numbers that are not finite; `source` is what the message
    calls the checkpoint.
    """
    wanted = module.state_dict()
    ready = {name: _cast(tensor, wanted.get(name), device) for name, tensor in tensors.items()}
    common = [n for n in wanted if n in ready]
    faults = {
        "missing": [n for n in wanted if n not in ready],
        "unexpected": [n for n in ready if n not in wanted],
        "not of numbers": [n for n in common if not tensors[n].is_floating_point()],
        "of another shape": [f"{n} {tuple(ready[n].shape)} for {tuple(wanted[n].shape)}"
                             for n in common if ready[n].shape != wanted[n].shape]}
    if any(faults.values()):
        faults = "; ".join(_count(what, names) for what, names in faults.items() if names)
        raise StateDictMismatch(f"{source} does not fit {type(module).__name__} ({faults}): "
                                f"{PASS_SD15}, or one of the sizes configured")
    if broken := [name for name, tensor in ready.items() if not _is_finite(tensor)]:
        raise CheckpointError(f"{source} is damaged "
                              f"({_count('with numbers that are not finite', broken)}): "
                              "download it again, or pass another")
    module.load_state_dict(ready, assign=all(p.is_meta for p in wanted.values()))


def rename(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors; in each name every left side of `table` gives way to its right side."""
    def new(name: str) -> str:
        for old, replacement in table.items():
            name = name.replace(old, replacement)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def folder_name(name: str, table: Mapping[str, str]) -> str:
    """The folder layout's name of a single-file name: a table of `rename` read backwards."""
    matches = [old + name[len(new):] for old, new in table.items() if name.startswith(new)]
    return matches[-1] if matches else name     # where two match, the later is the narrower


def _cast(tensor: Tensor, like: Tensor | None, device: torch.device | str | None) -> Tensor:
    """The tensor in the dtype of `like`; a linear weight (O, I) for a 1×1 one as (O, I, 1, 1)."""
    if like is None:
        return tensor
    if tensor.ndim == 2 and like.shape == (*tensor.shape, 1, 1):
        tensor = tensor[:, :, None, None]
    return tensor.to(device, like.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; a sum shows it at the price of reading them once."""
    return tensor.is_meta or bool(tensor.sum(dtype=torch.float32).isfinite())


def _count(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
