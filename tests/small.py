"""A small UNet, guides for it and a batch, for tests of the method."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from conftest import noise, randomised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meng import StudentConfig
from ppdd import GuideConfig
from support.guides import build_guide
from unet import UNet, UNetConfig

SMALL = UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention=(True, True),
                   num_heads=4, context_dim=24, norm_groups=8)
BLIND = [GuideConfig(form=form) for form in ("sum", "gated")]      # to z_t and its features
SEEING = GuideConfig(form="seeing")
TINY = [*BLIND, SEEING]
FULL = GuideConfig("full", hint=8)      # as narrow as the default, 1, random weights lose g
KINDS = [GuideConfig("tiny"), SEEING, FULL]
ALL = [*TINY, FULL]
STUDENTS = [StudentConfig(), StudentConfig(prediction="v")]


def name_of(config: GuideConfig) -> str:
    return f"{config.kind}-{config.form}" if config.kind == "tiny" else config.kind


each_kind = pytest.mark.parametrize("config", KINDS, ids=name_of)
each_student = pytest.mark.parametrize("config", STUDENTS, ids=lambda config: config.prediction)
each_guide = pytest.mark.parametrize("config", ALL, ids=name_of)


@pytest.fixture
def unet() -> UNet:
    return randomised(lambda: UNet(SMALL))


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    """z (B, Z, H, W), t (B,), c, ∅ (B, L, D), g (B,): a t and a g of its own for every sample."""
    return (noise(3, 4, 8, 8), torch.tensor([999, 501, 20]), noise(3, 77, 24, seed=2),
            noise(1, 77, 24, seed=3).expand(3, -1, -1), torch.tensor([2.0, 5.0, 9.0]))


def trained(config: GuideConfig | StudentConfig, seed: int = 4) -> nn.Module:
    """A guide or student no weight of which is zero, as one that has learned something."""
    return randomised(lambda: build_guide(SMALL, config), seed)


def fresh(unet: UNet, config: GuideConfig | StudentConfig) -> nn.Module:
    guide = build_guide(SMALL, config)
    guide.start_from(unet)
    return guide


def residuals(unet, guide, z, t, c, g) -> list[Tensor]:
    """What a guide of any kind adds."""
    emb = unet.embed_time(t)
    return guide(g, emb, c, z, t, unet.encode(z, emb, c))


def guided(unet, guide, z, t, c, g) -> Tensor:
    """Eq. 4 in one whole pass."""
    return unet(z, t, c, residuals(unet, guide, z, t, c, g))


def ways(batch) -> list[dict]:
    """What makes the five ways to sample: unguided, CFG, and with a guide of each kind."""
    return [{}, {"empty": batch[3]}, *({"guide": trained(config)} for config in KINDS)]


def spy(monkeypatch, cls, *methods) -> dict[str, list]:
    """The arguments of every call of these methods from here on."""
    calls = defaultdict(list)
    for name in methods:
        def spying(self, *args, _name=name, _method=getattr(cls, name), **options):
            calls[_name].append(args)
            return _method(self, *args, **options)
        monkeypatch.setattr(cls, name, spying)
    return calls


class OneDevice(TorchDispatchMode):
    """Fails where a tensor comes from a list or another device: the host may have to wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors}) < 2 and "lift_fresh" not in str(func), func
        return out
