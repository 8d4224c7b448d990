"""meng.py: the student and its losses, by the paper's formulas."""

# ruff: noqa: F811 (the fixtures' names)

import copy

import pytest
import torch
from conftest import disagreement, noise, randomised
from small import (  # noqa: F401 (fixtures)
    SMALL,
    STUDENTS,
    batch,
    each_student,
    fresh,
    spy,
    trained,
    unet,
)
from torch import Tensor

import meng
import ppdd
from meng import Student, StudentConfig
from support import fast
from unet import UNet, UNetConfig

T_MID, T_END = torch.tensor([749, 250, 10]), torch.tensor([499, -1, 3])


def x_of(z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = ppdd.alpha_sigma(t)
    return (z - sigma * eps) / alpha


# ------------------------------------------------------------------------------- the student


@torch.no_grad()
def test_a_fresh_student_is_the_teacher_bit_for_bit(unet, batch):
    z, t, c, _, g = batch
    student = fresh(unet, StudentConfig())
    assert torch.equal(student(z, t, c, g), unet(z, t, c))
    assert torch.equal(meng.sample(student, z, c, 8.0, 3), ppdd.sample(unet, z, c, 0.0, 3))


@torch.no_grad()
def test_a_fresh_student_of_v_has_the_teachers_weights(unet, batch):
    z, t, c, _, g = batch
    alpha, sigma = ppdd.alpha_sigma(t)
    expected = sigma * z + alpha * unet(z, t, c)
    assert torch.equal(fresh(unet, StudentConfig(prediction="v"))(z, t, c, g), expected)


@torch.no_grad()
@each_student
def test_every_sample_has_a_g_of_its_own(batch, config):
    z, t, c, _, g = batch
    student = trained(config)
    whole = student(z, t, c, g)
    for i in range(3):
        one = [x[i:i + 1] for x in (z, t, c, g)]
        assert disagreement(student(*one), whole[i:i + 1]) < 1e-5
    assert all(disagreement(x, y) > 1e-3 for x, y in zip(student(z, t, c, g + 0.1), whole))


def test_g_is_spread_over_the_sinusoids_thousand_timesteps(unet):
    student = trained(StudentConfig())
    for parameter in student.time_embed.parameters():
        parameter.zero_()
    g = torch.tensor([0.0, 2.5, 9.99])
    expected = student.g_embed(unet.fourier(torch.tensor([0, 250, 999])))
    assert torch.equal(student.embed(torch.tensor([7, 8, 9]), g), expected)


def test_v_gives_back_the_noise():
    x, eps, t = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=2), torch.tensor([999, 500, 0])
    alpha, sigma = ppdd.alpha_sigma(t)
    z, v = ppdd.add_noise(x, eps, t), alpha * eps - sigma * x
    for config, output in zip(STUDENTS, (eps, v)):
        assert disagreement(trained(config).eps_of(output, z, alpha, sigma), eps) < 1e-6
    assert disagreement(alpha * z - sigma * v, x) < 1e-6


def test_stable_diffusions_student_is_its_unet_and_an_embedding_of_g():
    with torch.device("meta"):
        student, t = Student(UNetConfig()), torch.zeros(2, dtype=torch.long)
        out = student(torch.empty(2, 4, 64, 64), t, torch.empty(2, 77, 768), torch.empty(2))
    assert out.shape == (2, 4, 64, 64)
    added = sum(p.numel() for p in student.g_embed.parameters())
    assert added == 320 * 1280 + 1280 + 1280 * 1280 + 1280
    assert sum(p.numel() for p in student.parameters()) - added == 859_520_964


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="prediction is 'x': use eps or v"):
        Student(SMALL, StudentConfig(prediction="x"))


# ------------------------------------------------------------------------------- other bases


@torch.no_grad()
def test_a_student_is_moved_to_a_fine_tune_by_its_difference_from_the_base(unet, batch):
    z, t, c, _, g = batch
    student, fine_tune = trained(StudentConfig()), randomised(lambda: UNet(SMALL), seed=9)
    at_home = meng.transplant(copy.deepcopy(student), unet, unet)
    assert disagreement(at_home(z, t, c, g), student(z, t, c, g)) < 1e-4
    moved = meng.transplant(copy.deepcopy(student), unet, fine_tune).state_dict()
    for name, weight in student.state_dict().items():
        base = unet.state_dict().get(name, torch.zeros(()))
        other = fine_tune.state_dict().get(name, torch.zeros(()))
        assert torch.equal(moved[name], other + (weight - base)), name
    untrained = meng.transplant(fresh(unet, StudentConfig()), unet, fine_tune)
    assert torch.equal(untrained(z, t, c, g), fine_tune(z, t, c))


def test_a_student_moves_to_no_base_of_another_shape(unet):
    other = UNet(UNetConfig(model_channels=32, channel_mult=(1,), attention=(True,), num_heads=4))
    with pytest.raises(ValueError, match="the same shapes"):
        meng.transplant(trained(StudentConfig()), unet, other)


# ------------------------------------------------------------------------------- the losses


@each_student
def test_stage_one_is_equation_3_on_the_clean_image(unet, batch, config):
    """L = ω(λ) ‖x̂_η − ((1 + g) x̂_c − g x̂_∅)‖² with ω = max(α² / σ², 1), written out."""
    z, t, c, empty, g = batch
    student, w = trained(config), g.view(-1, 1, 1, 1)
    result = meng.cfg_distillation(unet, student, z, t, c, empty, g, meng.truncated_snr)
    with torch.no_grad():
        eps_c, eps = unet(z, t, c), student(z, t, c, g)
        target = (1 + w) * x_of(z, eps_c, t) - w * x_of(z, unet(z, t, empty), t)
        alpha, sigma = (x.double().flatten() for x in ppdd.alpha_sigma(t))
    omega = (alpha**2 / sigma**2).clamp(min=1)
    error = (x_of(z, eps, t) - target).double().square().mean((1, 2, 3))
    torch.testing.assert_close(result.loss.double(), (omega * error).mean(), rtol=1e-3, atol=0)
    assert disagreement(x_of(z, result.target, t), target) < 1e-4
    torch.testing.assert_close(result.correction, (eps_c - result.target).square().mean((1, 2, 3)))

    plain = meng.cfg_distillation(unet, student, z, t, c, empty, g)
    torch.testing.assert_close(plain.loss, (eps - plain.target).square().mean())


def test_the_target_is_that_of_the_guides(unet, batch):
    z, t, c, empty, g = batch
    guide = fresh(unet, ppdd.GuideConfig())
    guides = ppdd.cfg_distillation(unet, guide, z, t, c, empty, g)
    ours = meng.cfg_distillation(unet, fresh(unet, StudentConfig()), z, t, c, empty, g)
    assert disagreement(ours.target, guides.target) < 1e-5
    for result in (guides, ours):                   # both measure from the base without guidance
        assert result.unexplained.item() == pytest.approx(1, abs=1e-4)


def test_a_halving_lands_on_the_teachers_latent(unet, batch):
    z, t, c, _, g = batch
    teacher, student = trained(StudentConfig(), 5), trained(StudentConfig(), 6)
    result = meng.halving(unet, student, teacher, z, t, T_MID, T_END, c, g)
    with torch.no_grad():
        z_mid = ppdd.ddim_step(z, teacher(z, t, c, g), t, T_MID)
        z_end = ppdd.ddim_step(z_mid, teacher(z_mid, T_MID, c, g), T_MID, T_END)
        correction = (unet(z, t, c) - result.target).square().mean((1, 2, 3))
    assert disagreement(ppdd.ddim_step(z, result.target, t, T_END), z_end) < 1e-4
    torch.testing.assert_close(result.correction, correction)
    error = (student(z, t, c, g) - result.target).square().mean((1, 2, 3))
    torch.testing.assert_close(result.error, error)
    torch.testing.assert_close(result.loss, error.mean())
    weighted = meng.halving(unet, student, teacher, z, t, T_MID, T_END, c, g, meng.truncated_snr)
    torch.testing.assert_close(weighted.loss, (meng.truncated_snr(t) * error).mean())


def test_the_last_odd_step_has_one_step_of_the_teacher_as_its_target(unet, batch):
    z, _, c, _, g = batch
    teacher, t, end = trained(StudentConfig()), torch.tensor([62, 62, 62]), torch.full((3,), -1)
    result = meng.halving(unet, trained(StudentConfig(), 5), teacher, z, t, end, end, c, g)
    assert disagreement(result.target, teacher(z, t, c, g)) < 1e-4


@each_student
def test_only_the_student_learns_and_it_does(unet, batch, config):
    z, t, c, empty, g = batch
    student, before = fresh(unet, config), {k: v.clone() for k, v in unet.state_dict().items()}
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    shares = []
    for _ in range(6):
        result = meng.cfg_distillation(unet, student, z, t, c, empty, g)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        shares.append(result.unexplained.item())
    assert shares[-1] < 0.9 * shares[0], shares
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert all(p.grad is None for p in unet.parameters())


# ------------------------------------------------------------------------------- sampling


@each_student
@pytest.mark.parametrize("sampler, passes", [("ddim", 3), ("plms", 4)])
def test_fast_sampling_is_the_plain_loop_with_one_pass_a_step(unet, batch, monkeypatch, config,
                                                              sampler, passes):
    z, _, c, _, _ = batch
    student = trained(config)
    plain = meng.sample(student, z, c, 5.0, 3, sampler)
    other = meng.sample(student, z, c, 8.0, 3, sampler)
    calls = spy(monkeypatch, UNet, "encode", "decode", "embed_time")
    quick = fast.sample(unet, z, c, 5.0, 3, student, sampler=sampler)
    assert disagreement(quick, plain) < 1e-4 < 1e-2 < disagreement(quick, other)
    assert [len(calls[name]) for name in ("encode", "decode", "embed_time")] == [passes, passes, 1]
