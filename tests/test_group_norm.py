"""Group normalisation with channels last: the kernels, and their stand-in, against PyTorch's own.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: it must be chosen
before Triton is imported.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import disagreement, noise
from torch import nn

from support import group_norm

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(2, 20, 5, 3, 7), (1, 96, 32, 16, 24), (3, 64, 16, 2, 2), (2, 160, 2, 9, 5)]
CHECK = """
import torch
from support import group_norm
for b, channels, groups, h, w in %r:
    x = (3 + torch.randn(b, channels, h, w)).to(memory_format=torch.channels_last)
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    expected = torch.nn.functional.group_norm(x, groups, weight, bias, 1e-5)
    y = group_norm.normalise(x, groups, weight, bias, 1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
"""


def example(b, channels, h, w, seed=0):
    x = 3 + 2 * noise(b, channels, h, w, seed=seed)
    return (x.to(memory_format=torch.channels_last), 1 + 0.2 * noise(channels, seed=1),
            noise(channels, seed=2))


@pytest.mark.skipif(group_norm.triton is None or torch.cuda.is_available(),
                    reason="this PyTorch has no Triton, or a GPU to run the kernels on, see below")
def test_the_kernels_compute_group_normalisation():
    done = subprocess.run([sys.executable, "-c", CHECK % SHAPES[:3]], cwd=ROOT, text=True,
                          capture_output=True, env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("b, channels, groups, h, w", SHAPES)
def test_the_stand_in_computes_it_with_the_same_gradients(b, channels, groups, h, w):
    ours, theirs = ([t.clone().requires_grad_() for t in example(b, channels, h, w)]
                    for _ in range(2))
    y = group_norm.differentiable(ours[0], groups, *ours[1:], 1e-5)
    expected = F.group_norm(theirs[0], groups, *theirs[1:], 1e-5)
    assert disagreement(y, expected) < 1e-5
    upstream = noise(*y.shape, seed=3)
    y.backward(upstream)
    expected.backward(upstream)
    for a, e in zip(ours, theirs):
        assert (a.grad - e.grad).abs().max() <= 1e-4 * e.grad.abs().max() + 1e-5


def test_installed_it_keeps_weights_and_what_a_cpu_computes():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(4, 8), nn.LayerNorm(6))
    x, before = noise(2, 4, 8, 8), {k: v.clone() for k, v in net.state_dict().items()}
    expected = net(x)
    group_norm.install(net)
    assert type(net[1]) is group_norm.ChannelsLastGroupNorm
    assert type(net[0]) is nn.Conv2d and type(net[2]) is nn.LayerNorm
    assert torch.equal(net(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("b, channels, groups, h, w", [
    *SHAPES, (1, 320, 32, 64, 64), (2, 2560, 32, 8, 8), (1, 128, 32, 512, 512)])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_on_a_gpu_it_is_pytorchs(b, channels, groups, h, w, dtype, off):
    x, weight, bias = (t.to("cuda", dtype) for t in example(b, channels, h, w))
    expected = F.group_norm(x.float(), groups, weight.float(), bias.float(), 1e-5)
    norm = group_norm.ChannelsLastGroupNorm(groups, channels).to("cuda", dtype)
    norm.weight.data, norm.bias.data = weight, bias
    for y in (norm(x), norm(x.clone().requires_grad_())):
        assert y.dtype == dtype and disagreement(y, expected) < off
