"""support/muon.py: matrices move by orthogonal steps, vectors as with AdamW."""

import pytest
import torch
from torch import nn

from support.muon import Muon, orthogonalise
from support.training_state import load_optimizer, optimizer_tensors


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_a_matrix_becomes_nearly_orthogonal(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular_values = torch.linalg.svdvals(orthogonalise(m))
    assert singular_values.min() > 0.5 and singular_values.max() < 1.3
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    assert torch.trace((u @ vt).T @ orthogonalise(m)) > 0.8 * min(shape)


def test_a_convolution_moves_along_its_momentum_by_the_documented_size():
    weight = nn.Parameter(torch.zeros(6, 5, 2, 2))
    optimizer = Muon([weight], lr=0.01, weight_decay=0.0)
    momentum = torch.zeros(6, 20)
    for k in range(3):
        grad = torch.randn(6, 20, generator=torch.Generator().manual_seed(k))
        before = weight.detach().clone()
        weight.grad = grad.view_as(weight).clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        nesterov = 0.05 * grad + 0.95 * momentum
        expected = 0.01 * 0.2 * 20**0.5 * orthogonalise(nesterov)
        torch.testing.assert_close((before - weight.detach()).view(6, 20), expected)


def test_vectors_move_as_with_adamw():
    biases = []
    for kind in (Muon, torch.optim.AdamW):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = kind(layer.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (layer.bias - 1).square().sum().backward()
            optimizer.step()
        biases.append(layer.bias.detach())
    assert torch.equal(*biases)


def test_its_state_is_loaded_into_another_one():
    layers, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(nn.Linear(4, 3))
        optimizers.append(Muon(layers[-1].parameters(), lr=0.01))

    def update(layer, optimizer):
        optimizer.zero_grad()
        (layer(torch.ones(2, 4)) - 1).square().sum().backward()
        optimizer.step()

    for _ in range(2):
        update(layers[0], optimizers[0])
    layers[1].load_state_dict(layers[0].state_dict())
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizers[0]).items()}
    load_optimizer(optimizers[1], saved)
    for layer, optimizer in zip(layers, optimizers):
        update(layer, optimizer)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)
