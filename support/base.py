"""The base: a frozen Stable Diffusion of three networks, and where its weights are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import TextConfig, TextEncoder, Tokenizer
from support.capture import captured
from support.checkpoint import load_text_encoder, load_unet, load_vae
from support.configs import PASS_SD15, CheckpointError
from support.files import expand, files_in, hub_cache, sha256
from support.lora import lora_files, merge_lora, parse_lora
from support.machine import use_few_threads
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

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
    vae_path: Path | None = None                    # of a VAE that replaces the checkpoint's own
    source: Base | None = None                      # another, that images are inverted with

    @property
    def name(self) -> str:
        """`base_name`, then the names of merged LoRAs, each after a +."""
        return "+".join([base_name(self.path), *(path.stem for path, _ in self.loras)])

    @property
    def sha256(self) -> str:
        """SHA-256 of the files it was made from, merged LoRAs and another VAE included."""
        return base_sha256(self.path, self.loras, self.vae_path)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def is_miniature(self) -> bool:
        """Whether it is the miniature or as small, and paints postcards of 64 pixels."""
        return self.unet.config.model_channels < 256

    @property
    def inpaints(self) -> bool:
        """Whether its UNet is for inpainting, and also takes a mask and the masked image."""
        return self.unet.config.in_channels > self.unet.config.out_channels

    def embed(self, texts: list[str]) -> Tensor:
        """The paper's c: the states of prompts (B, 77, D), in the text encoder's dtype."""
        ids = self.tokenizer(texts).to(self.text.final_layer_norm.weight.device)
        # Recording pays where a batch is small, and then its size usually comes again.
        encode = captured(encode_text, ids.device) if len(ids) <= 64 else encode_text
        return encode(self.text, ids)

    def encode(self, images: Tensor, noise: Tensor | float) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] to the latents (B, Z, H / 8, W / 8) that standard normal
        noise picks, scaled for the UNet, float32; the number 0 picks their means."""
        moments = torch.cat([*self._in_parts(encode_images, images, images[0, 0].numel() // 64)])
        return self.vae.sample(moments, noise)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, H / 8, W / 8) to images (B, 3, H, W) uint8."""
        return torch.cat([((x / 2 + 0.5).clamp(0, 1) * 255).round().byte()
                          for x in self._in_parts(decode_latents, z, z[0, 0].numel())])

    def _in_parts(self, run: Callable[[VAE, Tensor], Tensor], batch: Tensor, positions: int
                  ) -> Iterator[Tensor]:
        """A half of the VAE over a batch, float32: as many images at a time, each of so many
        positions in the latent, as make up one of 512 × 512, on a GPU four. So memory stays flat.

        float16 can overflow in the VAE: what is not finite is computed again in float32.
        """
        dtype = next(self.vae.parameters()).dtype
        # A recording would go on reading the weights that are replaced below.
        quick = run if dtype == torch.float16 else captured(run, batch.device)
        most = 64 * 64 * (4 if batch.is_cuda else 1)
        for part in batch.split(max(1, most // positions)):
            x = quick(self.vae, part.to(dtype)).float()
            if dtype == torch.float16 and (bad := ~x.flatten(1).isfinite().all(1)).any():
                x[bad] = run(self.vae.float(), part[bad].float())
                self.vae.to(dtype)
            yield x


def encode_text(text: TextEncoder, ids: Tensor) -> Tensor:
    return text(ids)


def encode_images(vae: VAE, images: Tensor) -> Tensor:
    return vae.encode(images)


def decode_latents(vae: VAE, z: Tensor) -> Tensor:
    return vae.decode(z)


def load_base(path: Path, dtype: torch.dtype = torch.float32,
              device: str | torch.device = "cpu", vae: str | Path = "", inpainting: bool = False
              ) -> Base:
    """All three networks of a checkpoint, frozen; the VAE of another file or folder, if given.

    Raises CheckpointError; also for an inpainting model, unless `inpainting` allows one.
    """
    vae_path = expand(vae) if vae else None
    unet_ = to_channels_last(load_unet(path, dtype, device))
    if unet_.config.in_channels == 2 * unet_.config.out_channels + 1 and not inpainting:
        raise CheckpointError(f"{path} is an inpainting model, with {unet_.config.in_channels} "
                              "input channels: it works in sample.py with --image and "
                              f"--mask, and in train.py; here, {PASS_SD15}")
    vae_ = to_channels_last(load_vae(vae_path or path, dtype, device))
    text = load_text_encoder(path, dtype, device)
    _check_fit(unet_.config, vae_.config, text.config, f"{path} with {vae}" if vae else str(path))
    base = Base(unet_, vae_, text, Tokenizer(), Path(path), vae_path=vae_path)
    if base.is_miniature or base.device.type == "cuda":
        use_few_threads()
    return base


def _check_fit(unet_: UNetConfig, vae_: VAEConfig, text: TextConfig, source: str) -> None:
    """Raises CheckpointError where networks can't work together. All else here takes it for granted
    that latents are an eighth of an RGB image, and that the UNet predicts their noise."""
    latents = (vae_.z_channels, unet_.in_channels, unet_.out_channels)
    in_channels = (vae_.z_channels, 2 * vae_.z_channels + 1)    # the second is for inpainting
    fits = (unet_.out_channels == vae_.z_channels and unet_.in_channels in in_channels
            and text.width == unet_.context_dim and len(vae_.ch_mult) == 4
            and vae_.in_channels == vae_.out_channels == 3)
    if not fits:
        raise CheckpointError(
            f"{source} has networks that do not fit together (the VAE makes {latents[0]} channels "
            f"from {vae_.in_channels} at 1/{2 ** (len(vae_.ch_mult) - 1)} of the side, the UNet "
            f"takes {latents[1]} and gives {latents[2]}, the prompt's states are {text.width} wide "
            f"for {unet_.context_dim}): {PASS_SD15}")


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


def base_sha256(path: Path, loras: Iterable[tuple[Path, float]] = (),
                vae: Path | None = None) -> str:
    """SHA-256, hex, of a checkpoint file, or of its networks' files where it is a folder.

    With the LoRAs that are merged into it, of those and their scales too; and of another VAE.
    """
    files = _network_files(path, "unet", "vae", "text_encoder")
    files += [file for lora, _ in loras for file in lora_files(lora)]
    if vae:
        files += _network_files(vae, "vae", ".")
    scales = b"".join(b"%.9g" % scale for _, scale in loras)
    return sha256(*files, prefix=scales)


def _network_files(path: Path, *parts: str) -> list[Path]:
    """A file alone; of a folder the weights in these parts of it, each with its configuration."""
    if path.is_file():
        return [path]
    patterns = (f"{part}/{name}" for part in parts for name in ("*.safetensors", "config.json"))
    return [file for pattern in patterns for file in sorted(path.glob(pattern))]


def find_weights(given: str | Path | None = None) -> Path:
    """The base given, else one in ./weights or in the Hugging Face cache, else the miniature."""
    if given == "mini":
        return MINI
    if given:
        return expand(given)
    hub = hub_cache()
    snapshots = [s for name in HUB_NAMES for s in sorted((hub / name / "snapshots").glob("*"))]
    for folder in (Path("weights"), *snapshots):
        in_weights = folder.name == "weights"
        files = files_in(folder, "*.safetensors")
        single_files = [f for f in files if in_weights or "v1-5" in f.name]
        inside = "*" if in_weights else "*.safetensors"     # a snapshot may be downloaded in part
        for candidate in (*single_files, folder, *sorted(folder.glob("*/"))):
            if candidate.is_file() or all(any((candidate / part).glob(inside))
                                          for part in ("unet", "vae")):
                return candidate
    return MINI


def describe_base(path: Path, given: str | Path, vae: str = "") -> str:
    """A line on the base that find_weights(given) found, and on how to get another."""
    line = NO_WEIGHTS if path == MINI and not given else f"base: {path}"
    return f"{line}; its VAE is that of {vae}" if vae else line


def merge_loras(base: Base, given: Iterable[str]) -> list[str]:
    """Merges each "FILE" or "FILE:scale" into the base; returns a message on each, to print."""
    messages = []
    for path, scale in map(parse_lora, given):
        notes = merge_lora(base.unet, base.text, path, scale)
        base.loras += ((path, scale),)
        messages.append("; ".join([f"LoRA: {path}, merged at {scale:g}", *notes]))
    return messages
