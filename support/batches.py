"""What each update of a guide trains on: noised images, and rollouts of the teacher.

Everything that chance decides of an update comes from one generator, of its seed, stage and number:
neither a resumed run nor the number of processes changes a draw.

Shapes: B batch, n of it noised images and the rest rollouts, Z latent channels, H and W sides of
the latent, L tokens, D width of a token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import ppdd
from support.base import Base
from support.distributed import rank, world_size


class Batch(NamedTuple):
    """What chance decides of a whole batch, whatever the number of processes."""

    noise: Tensor       # (2, n, Z, H, W) of the n noised images: for x from its moments, for z_t;
                        # for inpainting a third, for the masked image
    masks: Tensor       # (n, 1, H, W) for inpainting, 1 where images are masked; else (n, 0, H, W)
    t: Tensor           # (B,) timesteps, of those images and then of the rollouts
    g: Tensor           # (B,)


class Part(NamedTuple):
    """What the loss of b samples of a batch is computed from, m of them noised images."""

    slots: Tensor       # (b,) their places in the batch
    places: Tensor      # (b − m,) places of the others among the rollouts
    moments: Tensor     # (m, 2 Z, H, W)
    noise: Tensor       # (2, m, Z, H, W)
    beside: Tensor      # (m, 1 + Z, H, W) for inpainting: masks, latents of the masked images
    rollouts: Tensor    # (b − m, Z, H, W)
    t: Tensor           # (b,)
    g: Tensor           # (b,)
    c: Tensor           # (b, L, D)
    rows: Tensor        # (b,) of the data


class Batches:
    """The batches of one stage.

    config is train.py's; data has the interface of support.data.CaptionedImages. steps are those of
    the student, 0 in stage one; before counts updates that the guide had in this stage already.
    """

    def __init__(self, config, base: Base, data, stage: int, steps: int, updates: int,
                 before: int = 0):
        self.config, self.base, self.data = config, base, data
        self.stage, self.steps, self.updates, self.before = stage, steps, updates, before
        self.device = base.device
        self.shape = (base.unet.config.out_channels, data.side, data.side)
        self.noised = config.batch - math.ceil(config.trajectories * config.batch)
        self.rollouts = Rollouts(self)
        self.images: Iterator | None = None             # see `load_images`
        # The samples of a batch that are this process's, in the parts that --accumulate makes.
        slots = torch.arange(config.batch)[rank()::world_size()]
        parts = [slots[k::config.accumulate] for k in range(config.accumulate)]
        self.parts = [part for part in parts if len(part)]
        # On the device: their places in the batch, and among the rollouts.
        self.places = [(part.to(self.device),
                        (part[part >= self.noised] - self.noised).to(self.device))
                       for part in self.parts]

    def generator(self, update: int) -> torch.Generator:
        """Of everything that chance decides in one update."""
        update += self.before
        seed = ((self.config.seed * 31 + self.stage) * 1_000_003 + update) % 2**63
        return torch.Generator().manual_seed(seed)

    def draw_rows(self, generator: torch.Generator) -> Tensor:
        """(n,) rows of the data: the images to noise. The first that a generator draws."""
        return torch.randint(max(self.data.image_count, 1), (self.noised,), generator=generator)

    def draw_g(self, n: int, generator: torch.Generator) -> Tensor:
        """(n,) guidance numbers, uniform in their range."""
        low, high = self.config.g_range
        return low + (high - low) * torch.rand(n, generator=generator)

    def draw(self, generator: torch.Generator) -> Batch:
        """A batch: one t and one g a sample, t on the grid of the student's steps in a halving.

        On the CPU, so that a seed means the same on every device.
        """
        n = len(self.draw_rows(generator))
        noise = torch.randn(2 + self.base.inpaints, n, *self.shape, generator=generator)
        masks = self.draw_masks(n, generator)
        g = self.draw_g(n, generator)
        if self.steps:
            # The stochastic sampler takes the student's steps from points in between, too.
            finer = 2 if self.config.stochastic else 1
            grid = torch.tensor(ppdd.step_grid(finer * self.steps))
            t = grid[torch.randint(finer * self.steps, (n,), generator=generator)]
        else:
            t = torch.randint(ppdd.TIMESTEPS, (n,), generator=generator)
        self.rollouts.refill(self.config.batch - n, generator)
        rollouts = self.rollouts.state
        return Batch(noise, masks, torch.cat([t, rollouts["t"]]), torch.cat([g, rollouts["g"]]))

    def draw_masks(self, n: int, generator: torch.Generator) -> Tensor:
        """Rectangles of any size in any place for an inpainting base, else (n, 0, H, W)."""
        if not self.base.inpaints:
            return torch.zeros(n, 0, *self.shape[1:])
        low, high = torch.rand(2, n, 2, 1, generator=generator).sort(0).values
        places = (torch.arange(self.data.side) + 0.5) / self.data.side
        rows, columns = ((low < places) & (places < high)).unbind(1)          # (n, H), (n, W)
        return (rows[:, :, None] & columns[:, None]).float()[:, None]

    def read_beside(self, images: Tensor, masks: Tensor, noise: Tensor) -> Tensor:
        """(m, 1 + Z, H, W) of images (m, 3, 8 H, 8 W), uint8, and masks: see `Part.beside`."""
        if not self.base.inpaints:
            return to_device(masks, self.device)
        pixels = masks.repeat_interleave(8, 2).repeat_interleave(8, 3)
        masked = torch.where(pixels > 0, 127.5, images.float())               # 0 in [−1, 1]
        latents = self.base.vae.sample(self.data.moments(masked), to_device(noise, self.device))
        return torch.cat([to_device(masks, self.device), latents], dim=1)

    def load_images(self, update: int) -> Iterator:
        """Rows and images of every part of the batch; those of later updates are loaded ahead."""
        if self.images is None:
            self.images = self.data.batches(
                rows[part[part < len(rows)]].tolist()
                for later in range(update, self.updates)
                for rows in [self.draw_rows(self.generator(later))]
                for part in self.parts)
        return self.images

    def gather(self, batch: Batch, update: int) -> list[Part]:
        """This process's share of a batch, part by part, on the device: noised images, then
        rollouts."""
        parts, state, device = [], self.rollouts.state, self.device
        for slots, (on_device, places), (rows, images) in zip(self.parts, self.places,
                                                              self.load_images(update)):
            noised = slots[slots < self.noised]
            noise = batch.noise[:, noised]
            beside = self.read_beside(images, batch.masks[noised], noise[-1])
            on_host = slots[slots >= self.noised] - self.noised
            moments = (self.data.moments(images) if noise.shape[1] else
                       noise.new_zeros(0, 2 * noise.shape[2], *noise.shape[3:]))
            rows = rows + state["row"][on_host].tolist()
            c = self.data.prompt_states(rows).to(self.base.unet.dtype)
            parts.append(Part(
                on_device, places, moments.to(device), to_device(noise, device),
                beside, state["z"][places], to_device(batch.t[slots], device),
                to_device(batch.g[slots], device), c, to_device(torch.tensor(rows), device)))
        return parts


class Rollouts:
    """Where n of the teacher's samplings stand, each at a timestep of its own.

    A guide that only ever sees noised images meets other latents when it samples: those that its
    own steps lead to. So a share of each batch may come from rollouts of the teacher (Jensen &
    Sadat, 2025), which cost nothing: the loss needs the teacher's prediction anyway.

    state: `z` (n, Z, H, W) on the device; on the CPU `t` (n,), −1 once it has arrived, `g` (n,),
    and `row` (n,) of the data, whose prompt it follows. Empty before the first `refill`.
    """

    def __init__(self, batches: Batches):
        self.batches = batches
        self.state: dict[str, Tensor] = {}

    def refill(self, n: int, generator: torch.Generator) -> None:
        """Those that have arrived begin anew, with other noise, prompt and g."""
        batches = self.batches
        noise = torch.randn(n, *batches.shape, generator=generator)
        new = {"z": to_device(noise, batches.device),
               "t": torch.full((n,), ppdd.TIMESTEPS - 1),
               "g": batches.draw_g(n, generator),
               "row": torch.randint(len(batches.data), (n,), generator=generator)}
        old = self.state or new
        arrived = old["t"] < 0
        self.state = {k: torch.where(arrived, new[k], old[k]) for k in ("t", "g", "row")}
        arrived = to_device(arrived, batches.device).view(-1, 1, 1, 1)
        self.state["z"] = torch.where(arrived, new["z"], old["z"])

    def advance(self, steps: int, target: Tensor, scatter: torch.Generator | None) -> None:
        """Takes one of the teacher's `steps`, with its prediction target (n, Z, H, W).

        scatter, for the first update, sends each to a timestep of its own instead, or all would be
        at the same one for ever.
        """
        t = self.state["t"]
        if scatter is None:
            s = next_timestep(steps, t.device)[t]
        else:
            s = torch.tensor(ppdd.step_grid(steps))[
                torch.randint(steps, t.shape, generator=scatter)]
        t_and_s = (to_device(x, self.batches.device) for x in (t, s))
        self.state |= {"z": ppdd.ddim_step(self.state["z"], target, *t_and_s), "t": s}

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state` as a checkpoint kept it."""
        self.state = dict(state)
        if state:
            self.state["z"] = state["z"].to(self.batches.device)
            self.state["row"] = state["row"] % len(self.batches.data)       # it may have shrunk


@functools.cache
def next_timestep(steps: int, device: torch.device) -> Tensor:
    """(1000,) the timestep that follows t in a run of so many steps; −1 for t outside its grid."""
    grid, following = torch.tensor(ppdd.step_grid(steps)), torch.full((ppdd.TIMESTEPS,), -1)
    following[grid[:-1]] = grid[1:]
    return following.to(device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a pinned copy, so that the host need not wait for a GPU."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
