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


def one_by_one(m, steps=5):
    """`orthogonalise` of a single matrix, in plain words."""
    x = m / (m.norm() + 1e-7)
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_matrices_that_are_taken_together_move_as_alone(shape):
    batch = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    for together, m in zip(orthogonalise(batch), batch):
        torch.testing.assert_close(together, one_by_one(m))


def test_parameters_of_equal_shapes_move_as_alone():
    """Of several groups, some of them convolutions in channels last, and one without a gradient."""
    shapes = [(12, 4), (6, 5, 2, 2), (12, 4), (12, 4), (6, 20), (7,)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(k))
               for k, shape in enumerate(shapes)]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(4, *shape, generator=generator) for shape in shapes]
    alone = [nn.Parameter(w.clone()) for w in weights]
    together = [nn.Parameter(w.clone()) for w in weights]
    optimizers = [Muon([{"params": together[:3]}, {"params": together[3:]}], lr=0.01),
                  *(Muon([p], lr=0.01) for p in alone)]
    for step in range(4):
        for k, (a, b, grad) in enumerate(zip(alone, together, grads)):
            a.grad = grad[step].clone()
            b.grad = None if k == 2 and step == 1 else grad[step].clone()
        alone[2].grad = together[2].grad
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(alone, together, weights):
        assert not torch.equal(a, before)
        torch.testing.assert_close(a, b)


def test_its_state_has_one_entry_a_parameter():
    """Which is how checkpoints keep it."""
    layer = nn.Linear(4, 3)
    optimizer = Muon(layer.parameters(), lr=0.01)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    shapes = {name: tuple(value.shape) for name, value in optimizer_tensors(optimizer).items()}
    assert shapes == {"optimizer.0.momentum": (3, 4), "optimizer.0.step": (),
                      "optimizer.1.step": (), "optimizer.1.exp_avg": (3,),
                      "optimizer.1.exp_avg_sq": (3,)}


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
