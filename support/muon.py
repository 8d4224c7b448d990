"""Muon (Jordan et al., 2024): matrices move by their momentum made orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor


class Muon(torch.optim.AdamW):
    """AdamW for vectors, Muon for matrices; a convolution is the matrix (out, in · rows · columns).

    The step is scaled to the size of AdamW's at a fifth of the learning rate (Liu et al., 2025), so
    that one rate serves both.
    """

    @torch.no_grad()
    def step(self) -> None:
        matrices = [p for group in self.param_groups for p in group["params"]
                    if p.ndim > 1 and p.grad is not None]
        for p in matrices:
            state = self.state[p]
            if not state:               # AdamW looks for a step in every state that it loads
                state |= {"momentum": torch.zeros_like(p), "step": torch.zeros(())}
            state["momentum"].lerp_(p.grad, 0.05)
            nesterov = p.grad.lerp(state["momentum"], 0.95).flatten(1)
            size = 0.2 * max(nesterov.shape) ** 0.5 * self.param_groups[0]["lr"]
            p.sub_(size * orthogonalise(nesterov).view_as(p))
            p.grad = None                               # so that AdamW passes it over
        super().step()


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of m = U S Vᵀ, (rows, columns), by a quintic Newton-Schulz iteration.

    The coefficients are Jordan et al.'s: singular values end between about 0.7 and 1.2 after five
    steps, which serves as well as exactly 1.
    """
    x = m / (m.norm() + 1e-7)
    is_tall = m.shape[0] > m.shape[1]
    x = x.T if is_tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if is_tall else x
