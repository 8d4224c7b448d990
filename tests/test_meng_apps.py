"""meng.py: the stochastic sampler, image-to-image, inpainting, encoding."""

import functools
import math

import pytest
import torch
from conftest import disagreement, noise
from small import FULL, SEEING, batch, guided, trained, unet  # noqa: F401 (fixtures)
from torch import Tensor

import meng
import ppdd
from ppdd import ALPHA, SIGMA, GuideConfig, alpha_sigma, ddim, ddim_step, step_grid
from support import fast

# ruff: noqa: F811 (the fixtures' names)

SHAPE = 2, 4, 8, 8
STEPS = [(-1, 0), (-1, 499), (-1, 999), (0, 1), (124, 249), (499, 749), (998, 999)]    # k, s


def oracle(x: Tensor):
    """The predictor that always sees the clean latent x."""
    def predict(z: Tensor, t: int) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        return (z - alpha * x) / sigma
    return predict


def noises(seed: int = 0):
    return meng.noise_stream((seed, seed + 1), SHAPE[1:])


# ------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("k, s", STEPS)
def test_the_noise_of_a_step_back_is_the_paper_s(k, s):
    """Eq. 5, with λ in place of the form that the code has."""
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    deviation, ratio = meng.diffuse(none, k, s, one), meng.diffuse(one, k, s, none)
    lambda_s = 2 * (ALPHA[s + 1] / SIGMA[s + 1]).log()
    lambda_k = 2 * (ALPHA[k + 1] / SIGMA[k + 1]).log()
    variance = -torch.expm1(lambda_s - lambda_k) * SIGMA[s + 1] ** 2
    assert math.isclose(deviation**2, variance, rel_tol=1e-9)
    assert math.isclose(ratio, ALPHA[s + 1] / ALPHA[k + 1])
    both = (ratio * SIGMA[k + 1]) ** 2 + deviation**2           # what noise z_k had, and the new
    assert math.isclose(both, SIGMA[s + 1] ** 2)


def test_a_step_back_of_no_length_adds_no_noise():
    z = noise(*SHAPE)
    for t in (-1, 0, 499, 999):
        assert torch.equal(meng.diffuse(z, t, t, noise(*SHAPE, seed=2)), z)


def test_without_a_range_for_noise_it_is_ddim():
    predict, z = lambda z, t: z.sin() + t / 1000, noise(*SHAPE)
    for grid in ([999, 499, 499], [999, -1, -1], [999, -1]):
        ours = meng.stochastic(predict, z, grid, noises())
        assert disagreement(ours, ddim(predict, z, [grid[0], grid[1]])) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_it_predicts_at_each_point_of_the_grid_and_ends_without_noise(steps):
    asked, drawn, x, grid = [], [], noise(*SHAPE, seed=3), step_grid(steps)

    def predict(z: Tensor, t: int) -> Tensor:
        asked.append(t)
        return oracle(x)(z, t)

    def counted():
        for draw in noises():
            drawn.append(draw)
            yield draw

    end = meng.stochastic(predict, noise(*SHAPE), grid, counted())
    assert asked == grid[:-1] and len(drawn) == steps - 1
    assert disagreement(end, x) < 1e-5


def test_its_steps_are_the_paper_s():
    """Four steps, written out: 999 → 499 ↑ 749 → 249 ↑ 499 → −1 ↑ 249 → −1."""
    predict, z, draws = lambda z, t: z.cos() * t / 999, noise(*SHAPE), noises()
    expected = z
    for t, k, s in ((999, 499, 749), (749, 249, 499), (499, -1, 249)):
        expected = ddim_step(expected, predict(expected, t), t, k)
        expected = meng.diffuse(expected, k, s, next(draws))
    expected = ddim_step(expected, predict(expected, 249), 249, -1)
    assert torch.equal(meng.stochastic(predict, z, step_grid(4), noises()), expected)


def test_an_image_s_noise_is_its_own_and_begins_as_always():
    pair, alone = noises(7), meng.noise_stream([8], SHAPE[1:])
    draws = [next(pair) for _ in range(3)]
    assert torch.equal(draws[0], ppdd.noise([7, 8], SHAPE[1:]))
    assert all(torch.equal(draw[1:], next(alone)) for draw in draws)
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("config", [None, GuideConfig(), SEEING, FULL], ids=str)
@pytest.mark.parametrize("name", ["stochastic", "invert", "invert at the end", "inpaint"])
def test_the_fast_sampler_runs_them_all(unet, batch, name, config):
    """Compared with whole passes of the networks; CFG where there is no guide."""
    z, _, c, empty, _ = batch
    guide, g = config and trained(config), torch.full((3,), 5.0)
    grid = step_grid(4)[1:]

    def predict(z: Tensor, t: int) -> Tensor:
        t = torch.full((3,), t)
        if guide:
            return guided(unet, guide, z, t, c, g)
        return ppdd.cfg(unet(z, t, c), unet(z, t, empty), 5.0)

    def sampler() -> meng.Sampler:
        draws = meng.noise_stream(range(3), z.shape[1:])
        return {"stochastic": functools.partial(meng.stochastic, noises=draws),
                "invert": meng.invert,
                "invert at the end": functools.partial(meng.invert, at_end=True),
                "inpaint": functools.partial(meng.inpaint, x=z, noise=z, mask=(z[:, :1] > 0) * 1.0)
                }[name]

    grid = grid[::-1] if "invert" in name else grid
    ours = fast.sample(unet, z, c, 5.0, 4, guide, empty, sampler(), grid=grid)
    assert disagreement(ours, sampler()(predict, z, grid)) < 1e-4


# ------------------------------------------------------------------------------- applications


@pytest.mark.parametrize("steps, strength, grid", [
    (8, 0.6, [624, 499, 374, 249, 124, -1]), (8, 0.5, [499, 374, 249, 124, -1]),
    (4, 0.6, [499, 249, -1]), (4, 0.65, [749, 499, 249, -1]), (4, 0.01, [249, -1]),
    (2, 0.75, [999, 499, -1]), (1, 0.3, [999, -1]), (2, 1.0, [999, 499, -1])])
def test_image_to_image_starts_at_the_grid_point_nearest_to_the_strength(steps, strength, grid):
    assert meng.edit_grid(steps, strength) == grid


@pytest.mark.parametrize("name", [*ppdd.SAMPLERS, "stochastic"])
def test_inpainting_keeps_what_is_known_and_paints_the_rest(name):
    sampler = ppdd.SAMPLERS.get(name, functools.partial(meng.stochastic, noises=noises()))
    x, new, eps = (noise(*SHAPE, seed=seed) for seed in (2, 3, 4))
    mask = (noise(2, 1, 8, 8, seed=5) > 0).float()
    grid, seen = step_grid(4), []

    def predict(z: Tensor, t: int) -> Tensor:
        seen.append((z, t))
        return oracle(new)(z, t)

    end = meng.inpaint(predict, noise(*SHAPE), grid, x, eps, mask, sampler)
    assert torch.equal(end * (1 - mask), x * (1 - mask))
    assert disagreement(end * mask, new * mask) < 1e-4
    for z, t in seen[1:]:
        known = ppdd.add_noise(x, eps, t) * (1 - mask)
        assert torch.equal(z * (1 - mask), known)


def test_inpainting_everything_is_sampling():
    predict, z, x = lambda z, t: z.sin(), noise(*SHAPE), noise(*SHAPE, seed=2)
    everything = torch.ones(2, 1, 8, 8)
    painted = meng.inpaint(predict, z, step_grid(4), x, z, everything)
    assert torch.equal(painted, ddim(predict, z, step_grid(4)))


def test_a_unet_of_nine_channels_is_given_the_mask_and_the_masked_image():
    mask, masked, seen = torch.ones(2, 1, 8, 8), noise(*SHAPE, seed=2), []

    def predict(z: Tensor, t: int) -> Tensor:
        seen.append(z)
        return z[:, :4].sin()

    z = noise(*SHAPE)
    end = meng.inpaint_by_channels(predict, z, step_grid(2), mask, masked)
    assert torch.equal(end, ddim(lambda z, t: z.sin(), z, step_grid(2)))
    assert torch.equal(seen[0], torch.cat([z, mask, masked], dim=1))
    assert all(torch.equal(z[:, 4:], seen[0][:, 4:]) for z in seen)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 50, 1000])
def test_ddim_takes_an_inversion_back(steps, at_end):
    x, eps, grid = noise(*SHAPE).double(), noise(*SHAPE, seed=2).double(), step_grid(steps)
    asked = []

    def predict(z: Tensor, t: int) -> Tensor:
        asked.append(t)
        return eps

    z = meng.invert(predict, x, grid[::-1], at_end)
    assert asked == (grid[-2::-1] if at_end else [0, *grid[-2:0:-1]])
    alpha, sigma = alpha_sigma(999)
    assert disagreement(z, alpha * x + sigma * eps) < 1e-9
    assert disagreement(ddim(predict, z, grid), x) < 1e-9


@pytest.mark.parametrize("t, t_end", [(-1, 124), (-1, 999), (124, 374), (499, 999)])
def test_a_step_along_the_inversion_s_target_lands_on_the_teacher_s_latent(t, t_end):
    z, z_end = noise(*SHAPE).double(), noise(*SHAPE, seed=2).double()
    target = meng.inversion_target(z, z_end, t, t_end)
    assert disagreement(ddim_step(z, target, t, t_end), z_end) < 1e-9
    if t >= 0:
        both = [torch.full((2,), n) for n in (t, t_end)]
        assert disagreement(ppdd.halving_target(z, z_end, *both), target) < 1e-4
        assert disagreement(meng.inversion_target(z, z_end, *both), target) < 1e-4


def test_halving_an_inversion_of_two_steps_that_agree_changes_nothing():
    x, eps = noise(*SHAPE).double(), noise(*SHAPE, seed=2).double()
    z_end = ddim_step(ddim_step(x, eps, -1, 249), eps, 249, 499)
    assert disagreement(meng.inversion_target(x, z_end, -1, 499), eps) < 1e-9
