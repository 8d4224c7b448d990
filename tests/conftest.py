"""What the tests share: random weights that no zero hides, and the measure of agreement.

`python -m pytest -q` leaves out the tests marked `full`: networks of full size, long kill loops,
whole tables. `--full` runs them too.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_text import TextConfig, TextEncoder
from support.checkpoint import save_checkpoint
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

if "PYTEST_XDIST_WORKER" in os.environ:     # several workers share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"     # of the processes that tests start

# Sizes of a toy base: every kind of layer, and quick.
TOY_UNET = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                      attention=(True, True), num_heads=4, context_dim=32, norm_groups=8)
TOY_VAE = VAEConfig(ch=16, ch_mult=(1, 2, 2, 2), num_res_blocks=1, norm_groups=8)
TOY_TEXT = TextConfig(width=32, layers=2, heads=4)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true",
                     help="also run what needs full-size networks, long kill loops, whole tables")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):     # not a keyword: parameters are called full too
                item.add_marker(pytest.mark.skip(reason="long: run with --full"))


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory) -> Path:
    """A random base in the official single-file layout, called toy."""
    networks = (randomised(lambda: UNet(TOY_UNET)), randomised(lambda: VAE(TOY_VAE)),
                randomised(lambda: TextEncoder(TOY_TEXT)))
    path = tmp_path_factory.mktemp("base") / "toy.safetensors"
    save_checkpoint(path, *networks)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def randomised(build, seed: int = 0) -> nn.Module:
    """The module `build()` makes, every parameter random: none zero, activations of order one.

    Fresh diffusion models have zeros and ones in places; two networks could agree on those and
    differ in what they do with trained weights.
    """
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        else:
            p.normal_(0, 0.1, generator=generator)
            p.add_(1.0 if name.endswith("weight") else 0.0)
    return module


def shrink_features(module: nn.Module) -> None:
    """Has a UNet or VAE work on features of about 1e-3, where normalisations' epsilons matter."""
    ends = ("input_blocks.0.0", "conv_in", "in_layers.2", "emb_layers.1", "out_layers.3", "conv1",
            "conv2", "proj_out")                                # of what makes features anew
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            for p in [layer.weight] * name.endswith(ends) + [layer.bias] * (layer.bias is not None):
                p.mul_(1e-3)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a fraction of the largest value of `theirs`."""
    assert ours.shape == theirs.shape and theirs.isfinite().all()
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def write_single_file(
    path: Path, module: nn.Module, prefix: str, dtype=torch.float32, metadata=None, **others: Tensor
) -> Path:
    """Saves `module` as one part of an official single file, among the parts of other models."""
    tensors = {prefix + name: p.to(dtype).contiguous() for name, p in module.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    save_file(tensors | others, path, metadata)
    return path


def channels_last_maps(module: nn.Module) -> list[bool]:
    """Of each feature map that a layer returns from here on: does it keep its channels last?"""
    said = []

    def look(module: nn.Module, inputs: tuple, out: Tensor) -> None:
        if out.ndim == 4:
            said.append(out.is_contiguous(memory_format=torch.channels_last))

    for m in module.modules():
        m.register_forward_hook(look)
    return said
