"""A base as the well-known libraries save it, and LoRA files for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import noise, randomised
from references import diffusers_unet, reference_text_encoder
from torch import Tensor, nn
from toys import TEXT, UNET

from support.base import Base
from support.checkpoint import load_text_encoder, load_unet

RANK = 3


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A UNet and a text encoder as the libraries save them."""
    folder = tmp_path_factory.mktemp("base")
    randomised(lambda: diffusers_unet(UNET)).save_pretrained(folder / "unet")
    reference_text_encoder(TEXT).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def base(folder: Path) -> Base:
    text = load_text_encoder(folder, config=TEXT)
    return Base(load_unet(folder, config=UNET), None, text, None, folder)


@pytest.fixture
def theirs() -> dict[str, nn.Module]:
    """The same two networks, the libraries' own, to merge into by hand."""
    unet = randomised(lambda: diffusers_unet(UNET))
    return {"unet": unet, "text_encoder": reference_text_encoder(TEXT)}


def layers_of(network: nn.Module, only: str = "") -> dict[str, nn.Module]:
    """Linear layers and convolutions, by name; those whose names the expression finds."""
    return {name: layer for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and re.search(only, name)}


def random_lora(layer: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """(down, up) of rank RANK, shaped as trainers shape them."""
    out, into, *kernel = layer.weight.shape
    down = noise(RANK, into, *kernel, seed=seed) * 0.1
    return down, noise(out, RANK, *(1 for _ in kernel), seed=seed + 1) * 0.1


def lora_of(theirs: dict, only: str) -> dict[tuple[str, str], tuple]:
    named = [(part, name, layer) for part, network in theirs.items()
             for name, layer in layers_of(network, only).items()]
    return {(part, name): random_lora(layer, 2 * i) for i, (part, name, layer) in enumerate(named)}


def full_name(part: str, name: str) -> str:
    """As files spell it; recent transformers leave "text_model." out of the module's own names."""
    if part == "text_encoder":
        name = "text_model." + name.removeprefix("text_model.")
    return f"{part}.{name}"


def kohya(lora: dict) -> dict:
    tensors = {}
    for i, ((part, name), (down, up)) in enumerate(lora.items()):
        name = full_name(part, name).replace("text_encoder", "te").replace(".", "_")
        tensors |= {f"lora_{name}.lora_down.weight": down, f"lora_{name}.lora_up.weight": up,
                    f"lora_{name}.alpha": torch.tensor(float(i % 3 + 1))}
    return tensors


def peft(lora: dict) -> dict:
    return {f"{full_name(*key)}.lora_{half}.weight": tensor
            for key, pair in lora.items() for half, tensor in zip("AB", pair)}
