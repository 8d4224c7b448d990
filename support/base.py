"""The base: a frozen Stable Diffusion of three networks, and where its weights are found."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import TextEncoder, Tokenizer, embed_text
from support.capture import captured
from support.checkpoint import load_text_encoder, load_unet, load_vae
from support.files import expand, sha256
from support.lora import merge_lora, parse_lora
from unet import UNet
from vae import VAE

MINI = Path(__file__).resolve().parent.parent / "mini" / "mini.safetensors"
HUB_NAMES = ("models--stable-diffusion-v1-5--stable-diffusion-v1-5",
             "models--runwayml--stable-diffusion-v1-5",
             "models--Comfy-Org--stable-diffusion-v1-5-archive")
NO_WEIGHTS = ("base: the bundled miniature, as no Stable Diffusion 1.5 was found: put "
              "v1-5-pruned-emaonly.safetensors into ./weights, or pass it with --weights FILE "
              "(from huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5)")


@dataclass
class Base:
    """A frozen Stable Diffusion: three networks, the tokenizer, and where they came from."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    tokenizer: Tokenizer
    path: Path
    loras: tuple[tuple[Path, float], ...] = ()      # files merged into it, with their scales

    @property
    def name(self) -> str:
        """`base_name`, then the names of merged LoRAs, each after a +."""
        return "+".join([base_name(self.path), *(path.stem for path, _ in self.loras)])

    @property
    def sha256(self) -> str:
        """SHA-256 of the files it was made from, merged LoRAs included."""
        return base_sha256(self.path, self.loras)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def is_miniature(self) -> bool:
        """Whether it is the miniature or as small, and paints postcards of 64 pixels."""
        return self.unet.config.model_channels < 256

    def embed(self, texts: list[str]) -> Tensor:
        """Prompts to states (B, 77, D)."""
        return embed_text(self.text, self.tokenizer, texts)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, H / 8, W / 8) to images (B, 3, H, W) uint8.

        As many at a time as make up one of 512 × 512, on a GPU four, so that memory stays flat.
        float16 can overflow in the VAE: an image that is not finite is decoded again in float32.
        """
        dtype, images = next(self.vae.parameters()).dtype, []
        # A recording would go on reading the weights that are replaced below.
        decode = self.vae.decode if dtype == torch.float16 else captured(self.vae.decode, z.device)
        positions = 64 * 64 * (4 if z.is_cuda else 1)
        for latents in z.split(max(1, positions // z[0, 0].numel())):
            x = decode(latents.to(dtype)).float()
            if dtype == torch.float16 and (bad := ~x.flatten(1).isfinite().all(1)).any():
                x[bad] = self.vae.float().decode(latents[bad].float())
                self.vae.to(dtype)
            images.append(((x / 2 + 0.5).clamp(0, 1) * 255).round().byte())
        return torch.cat(images)


def load_base(path: Path, dtype: torch.dtype = torch.float32,
              device: str | torch.device = "cpu") -> Base:
    """All three networks of a checkpoint, frozen. Raises CheckpointError."""
    unet = to_channels_last(load_unet(path, dtype, device))
    vae = to_channels_last(load_vae(path, dtype, device))
    return Base(unet, vae, load_text_encoder(path, dtype, device), Tokenizer(), Path(path))


def to_channels_last(module: nn.Module) -> nn.Module:
    """Channels last on a GPU, as its tensor cores take them; on a CPU that gains nothing."""
    if not next(module.parameters()).is_cuda:
        return module
    from support import group_norm  # which imports Triton, a second

    group_norm.install(module)
    return module.to(memory_format=torch.channels_last)


def base_name(path: Path) -> str:
    """The file's or folder's name; the repository's for a snapshot in a Hugging Face cache."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.split("--")[-1]
    return path.stem if path.is_file() else path.resolve().name


def base_sha256(path: Path, loras: Iterable[tuple[Path, float]] = ()) -> str:
    """SHA-256, hex, of a checkpoint file, or of its networks' files where it is a folder.

    With the LoRAs that are merged into it, of those and their scales too.
    """
    parts = ("unet", "vae", "text_encoder")
    files = [path] if path.is_file() else [
        file for part in parts for file in sorted(path.glob(f"{part}/*.safetensors"))]
    scales = b"".join(b"%.9g" % scale for _, scale in loras)
    return sha256(*files, *(file for file, _ in loras), prefix=scales)


def find_weights(given: str | Path | None = None) -> Path:
    """The base given, else one in ./weights or in the Hugging Face cache, else the miniature."""
    if given == "mini":
        return MINI
    if given:
        return expand(given)
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub = expand(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    snapshots = [s for name in HUB_NAMES for s in sorted((hub / name / "snapshots").glob("*"))]
    for folder in (Path("weights"), *snapshots):
        in_weights = folder.name == "weights"
        files = sorted(folder.glob("*.safetensors"))
        single_files = [f for f in files if in_weights or "v1-5" in f.name]
        inside = "*" if in_weights else "*.safetensors"     # a snapshot may be downloaded in part
        for candidate in (*single_files, folder, *sorted(folder.glob("*/"))):
            if candidate.is_file() or all(any((candidate / part).glob(inside))
                                          for part in ("unet", "vae")):
                return candidate
    return MINI


def describe_base(path: Path, given: str | Path) -> str:
    """A line on the base that find_weights(given) found, and on how to get another."""
    return NO_WEIGHTS if path == MINI and not given else f"base: {path}"


def merge_loras(base: Base, given: Iterable[str]) -> list[str]:
    """Merges each "FILE" or "FILE:scale" into the base; returns a message on each, to print."""
    messages = []
    for path, scale in map(parse_lora, given):
        unused = merge_lora(base.unet, base.text, path, scale)
        base.loras += ((path, scale),)
        names = ", ".join(unused[:3]) + ", …" * (len(unused) > 3)
        left_out = f"; {len(unused)} of its tensors have no place here: {names}" if unused else ""
        messages.append(f"LoRA: {path}, merged at {scale:g}{left_out}")
    return messages
