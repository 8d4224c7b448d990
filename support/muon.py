"""Muon (Jordan et al., 2024): matrices move by their momentum made orthogonal."""

from __future__ import annotations

from collections import defaultdict

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
        same_shape = defaultdict(list)
        for p in matrices:
            same_shape[p.flatten(1).shape].append(p)
        for parameters in same_shape.values():
            self._move(parameters)
        for p in matrices:
            p.grad = None                               # so that AdamW passes it over
        super().step()

    def _move(self, matrices: list[Tensor]) -> None:
        """One step of matrices of equal shapes: on a GPU they take hardly longer than one."""
        for p in matrices:
            if not self.state[p]:       # AdamW looks for a step in every state that it loads
                self.state[p] |= {"momentum": torch.zeros_like(p), "step": torch.zeros(())}
        grads, momenta = [p.grad for p in matrices], [self.state[p]["momentum"] for p in matrices]
        torch._foreach_lerp_(momenta, grads, 0.05)
        nesterov = torch._foreach_lerp(grads, momenta, 0.95)
        batch = torch.stack([m.flatten(1) for m in nesterov])                 # (N, rows, columns)
        size = 0.2 * max(batch.shape[1:]) ** 0.5 * self.param_groups[0]["lr"]
        moves = (size * orthogonalise(batch)).unbind()
        torch._foreach_sub_(matrices, [m.view_as(p) for m, p in zip(moves, matrices)])


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of m = U S Vᵀ, (..., rows, columns), by a quintic Newton-Schulz iteration.

    The coefficients are Jordan et al.'s: singular values end between about 0.7 and 1.2 after five
    steps, which serves as well as exactly 1.
    """
    x = m / (m.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = m.shape[-2] > m.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if is_tall else x
