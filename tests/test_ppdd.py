"""What the method promises: schedule, samplers, guidance, guides, losses, sampling and files."""

import copy
import hashlib
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import disagreement, noise, randomised
from diffusers import ControlNetModel, DDIMScheduler, PNDMScheduler
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ppdd
from ppdd import FullGuide, GuideConfig, TinyGuide, build_guide
from unet import CheckpointError, UNet, UNetConfig, injection_channels
from vae import VAE, VAEConfig

SD15 = UNetConfig()
SMALL = UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention=(True, True),
                   num_heads=4, context_dim=24, norm_groups=8)
TINY = [GuideConfig(pool=pool, form=form) for pool in ("attention", "mean", "end")
        for form in ("sum", "product", "gated")]
BOTH = [GuideConfig("tiny"), GuideConfig("full")]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = [1, 2, 4, 5, 8, 10, 20, 25, 50]                        # N whose stride 1000 / N is whole


def names(config: GuideConfig) -> str:
    return f"{config.kind}-{config.pool}-{config.form}" if config.kind == "tiny" else config.kind


each_kind = pytest.mark.parametrize("config", BOTH, ids=lambda config: config.kind)


@pytest.fixture(scope="module")
def unet():
    return randomised(lambda: UNet(SMALL))


@pytest.fixture
def batch():
    """z (B, Z, H, W), t (B,), c, ∅ (B, L, D), g (B,): a t and a g of its own for every sample."""
    return (noise(3, 4, 8, 8), torch.tensor([999, 501, 20]), noise(3, 77, 24, seed=2),
            noise(1, 77, 24, seed=3).expand(3, -1, -1), torch.tensor([2.0, 5.0, 9.0]))


def trained(config: GuideConfig, seed: int = 4) -> nn.Module:
    """A guide no weight of which is zero, as one that has learned something."""
    return randomised(lambda: build_guide(SMALL, config), seed)


def features(unet, guide, z, t, c, g):
    """What a guide of either kind adds."""
    return guide(g, unet.embed_time(t), c, z, t)


def guided(unet, guide, z, t, c, g):
    """Eq. 4 in one whole pass."""
    return unet(z, t, c, features(unet, guide, z, t, c, g))


def fresh(unet, config: GuideConfig) -> nn.Module:
    guide = build_guide(SMALL, config)
    guide.start_from(unet)
    return guide


def spy(monkeypatch, cls, *methods) -> dict[str, list]:
    """The arguments of every call of these methods from here on."""
    calls = defaultdict(list)
    for name in methods:
        def spying(self, *args, _name=name, _method=getattr(cls, name), **options):
            calls[_name].append(args)
            return _method(self, *args, **options)
        monkeypatch.setattr(cls, name, spying)
    return calls


# ------------------------------------------------------------------------------- noise and steps


def test_schedule_is_stable_diffusions():
    theirs = DDIMScheduler(**BETAS).alphas_cumprod.double()
    assert ((ppdd.ALPHA[1:] ** 2 / theirs - 1).abs() < 1e-4).all()
    assert torch.allclose(ppdd.ALPHA**2 + ppdd.SIGMA**2, torch.ones(1001).double(), atol=1e-15)


def test_alpha_sigma_of_one_step_and_of_many():
    assert ppdd.alpha_sigma(-1) == (1, 0)
    t = torch.tensor([-1, 0, 500, 999])
    for many, one in zip(ppdd.alpha_sigma(t), zip(*(ppdd.alpha_sigma(i) for i in t.tolist()))):
        assert many.shape == (4, 1, 1, 1) and many.dtype == torch.float32
        assert torch.equal(many.flatten(), torch.tensor(one))


def test_grid_runs_from_full_noise_to_clean_and_nests_under_halving():
    for n in range(1, 202):
        grid = ppdd.step_grid(n)
        assert len(grid) == n + 1 and grid[0] == 999 and grid[-1] == -1
        assert all(t > s for t, s in pairwise(grid))
        if n % 2 == 0:
            assert grid[::2] == ppdd.step_grid(n // 2)


def test_grid_is_diffusers_trailing_one():
    theirs = DDIMScheduler(timestep_spacing="trailing")
    for n in [*range(1, 48), 49, 50, 64, 100, 200]:            # at 48 its float error breaks ties
        theirs.set_timesteps(n)
        assert ppdd.step_grid(n)[:-1] == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -4, 1001])
def test_grid_of_no_sampler_is_refused(steps):
    with pytest.raises(ValueError, match=f"{steps}.*1 to 1000"):
        ppdd.step_grid(steps)


def test_add_noise_is_diffusers_and_ddim_takes_it_off(batch):
    x, t, *_ = batch
    e = noise(*x.shape, seed=5)
    z = ppdd.add_noise(x, e, t)
    assert disagreement(z, DDIMScheduler(**BETAS).add_noise(x, e, t)) < 1e-5
    assert disagreement(ppdd.ddim_step(z, e, t, torch.full_like(t, -1)), x) < 1e-4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_samplers_are_diffusers(sampler, steps, dtype, tolerance):
    def eps(z, t):
        return torch.sin(2 * z + t / 300) + 0.3 * z.roll(1, -1) * (t / 1000)

    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    theirs = (DDIMScheduler(**BETAS, **options, clip_sample=False) if sampler == "ddim" else
              PNDMScheduler(**BETAS, **options, skip_prk_steps=True))
    if dtype == torch.float64:                                 # else its own float32 table
        theirs.alphas_cumprod = ppdd.ALPHA[1:] ** 2
    theirs.set_timesteps(steps)
    start = noise(2, 4, 4, 4).to(dtype)
    expected = start
    for t in theirs.timesteps:
        expected = theirs.step(eps(expected, t.item()), t, expected).prev_sample

    grid, asked = ppdd.step_grid(steps), []

    def predict(z, i):
        asked.append(i)
        return eps(z, grid[i])

    ours = ppdd.SAMPLERS[sampler](predict, start, grid)
    assert ours.dtype == dtype
    assert ((ours - expected).abs().max() / expected.abs().max()).item() < tolerance
    assert len(asked) == len(theirs.timesteps) == steps + (sampler == "plms" and steps > 1)


# ------------------------------------------------------------------------------- guidance, Eq. 3


def test_no_guidance_at_g_zero_nor_towards_the_empty_prompt(batch):
    eps, *_, g = batch
    for zero in (0.0, 0 * g):
        assert torch.equal(ppdd.cfg(eps, noise(*eps.shape, seed=5), zero), eps)
    assert disagreement(ppdd.cfg(eps, eps, g), eps) < 1e-5


def test_guidance_is_diffusers_at_scale_one_more_on_every_channel(batch):
    cond, *_, g = batch
    uncond = noise(*cond.shape, seed=5)
    ours = ppdd.cfg(cond, uncond, 6.5)
    for channel in range(4):
        theirs = uncond[:, channel] + 7.5 * (cond[:, channel] - uncond[:, channel])
        assert disagreement(ours[:, channel], theirs) < 1e-5
    each = [ppdd.cfg(cond[i], uncond[i], g[i].item()) for i in range(3)]
    assert torch.equal(ppdd.cfg(cond, uncond, g), torch.stack(each))


# ------------------------------------------------------------------------------- the guides


@pytest.mark.parametrize("config", [*TINY, GuideConfig("full")], ids=names)
def test_a_fresh_guide_changes_nothing(unet, batch, config):
    z, t, c, _, g = batch
    plain = unet(z, t, c)
    assert torch.equal(guided(unet, fresh(unet, config), z, t, c, g), plain)
    assert not torch.equal(guided(unet, trained(config), z, t, c, g), plain)
    assert ppdd.cfg_distillation(unet, fresh(unet, config), *batch).unexplained == 1


@pytest.mark.parametrize("config, count", [
    (GuideConfig("full"), 361_279_120), (GuideConfig(pool="mean"), 8_273_920),
    (GuideConfig(pool="end"), 8_273_920), (GuideConfig(), 8_273_920 + 16 * 768)], ids=str)
def test_parameters_are_table_1s(config, count):
    with torch.device("meta"):
        guide = build_guide(SD15, config)
    assert sum(p.numel() for p in guide.parameters()) == count
    assert len(injection_channels(SD15)) == 13


def macs(module: nn.Module, *inputs) -> int:
    """Multiply-accumulates of convolutions and linear layers, attention's products left out."""
    total = 0

    def count(layer, _, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in module.modules()
             if isinstance(layer, nn.Conv2d | nn.Linear)]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    return total


@torch.no_grad()
def test_macs_are_table_1s():
    with torch.device("meta"):
        z, t, c = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
        g, emb = torch.empty(1), torch.empty(1, 1280)
        tiny, full = TinyGuide(SD15, GuideConfig(pool="mean")), FullGuide(SD15)
        assert macs(UNet(), z, t, c) == pytest.approx(338.61e9, rel=1e-3)
        assert macs(full, g, emb, c, z, t) == pytest.approx(116.42e9, rel=1e-3)
        assert macs(tiny, g, emb, c) == 8_273_920              # millions: no map is broadcast


def test_tiny_guide_is_equation_5_on_maps(unet, batch):
    """The paper's Z, 1×1 convolutions on vectors spread over H × W, give what our vectors give."""
    _, t, c, _, g = batch
    guide, emb = trained(GuideConfig(pool="mean")), unet.embed_time(t)

    def conv(maps, theta):
        return F.conv2d(maps, theta.weight[:, :, None, None])

    gamma, time, text = (v[:, :, None, None].expand(-1, -1, 8, 8)
                         for v in (g[:, None].expand(3, 32) / 10, emb, c.mean(1)))
    h = gamma + conv(time, guide.theta_z1) + conv(text, guide.theta_z2)
    for y, theta, channels in zip(guide(g, emb, c), guide.theta_z3, injection_channels(SMALL)):
        assert y.shape == (3, channels, 1, 1)
        assert disagreement(y.expand(-1, -1, 8, 8), conv(h, theta)) < 1e-5


def test_tiny_guide_in_product_form_says_nothing_without_guidance(unet, batch):
    _, t, c, _, g = batch
    guide, emb = trained(GuideConfig(form="product", pool="end")), unet.embed_time(t)
    assert all((y == 0).all() for y in guide(0 * g, emb, c))
    for once, twice in zip(guide(g, emb, c), guide(2 * g, emb, c)):
        assert torch.equal(2 * once, twice)


def test_in_the_gated_form_text_time_and_g_interact(unet, batch):
    """What a change of one of them changes depends on the others; in Eq. 5 it does not."""
    _, t, c, _, g = batch
    emb, other = unet.embed_time(t), unet.embed_time((t + 300) % 1000)
    for form, apart in (("sum", True), ("gated", False)):
        guide = trained(GuideConfig(form=form, pool="end"))
        texts = [[y0 - y for y0, y in zip(guide(*given, c), guide(*given, c.flip(0)))]
                 for given in ((g, emb), (g, other), (g + 5, emb))]
        for changed in texts[1:]:
            assert all((disagreement(a, b) < 1e-4) == apart for a, b in zip(texts[0], changed))
    h = (g[:, None] / 10 + guide.theta_z1(emb)) * (1 + guide.read_text(c))
    for y, theta in zip(guide(g, emb, c), guide.theta_z3):
        assert disagreement(y[..., 0, 0], theta(h)) < 1e-5


def test_tiny_guide_reads_the_text_as_configured(batch):
    c = batch[2]
    mean, end, attention = (trained(GuideConfig(pool=p)) for p in ("mean", "end", "attention"))
    assert disagreement(mean.read_text(c), c.mean(1) @ mean.theta_z2.weight.T) < 1e-5
    assert disagreement(end.read_text(c), c[:, 76] @ end.theta_z2.weight.T) < 1e-5
    for q, query in enumerate(attention.query):                # 16 queries, two channels each
        pooled = torch.einsum("bl,bld->bd", (c @ query).softmax(1), c)
        rows = attention.theta_z2.weight[2 * q:2 * q + 2]
        assert disagreement(attention.read_text(c)[:, 2 * q:2 * q + 2], pooled @ rows.T) < 1e-5


@torch.no_grad()
def test_full_guide_is_a_controlnet(batch):
    """diffusers' ControlNet takes its weights by the official names, and computes what it does."""
    z, t, c, _, g = batch
    guide = trained(GuideConfig("full", hint=16))
    theirs = ControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",) * 2).eval()
    theirs.load_state_dict(convert_controlnet_checkpoint(guide.state_dict(), dict(theirs.config)))
    hint = (g / 10).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    down, middle = theirs(z, t, c, hint, return_dict=False)
    for y, expected in zip(guide(g, torch.zeros(3, 64), c, z, t), [*down, middle], strict=True):
        assert disagreement(y, expected) < 1e-4


def test_full_guide_starts_from_the_bases_encoder(unet):
    base, own = unet.state_dict(), fresh(unet, GuideConfig("full")).state_dict()
    copied = {k for k in base if not k.startswith(("output_blocks.", "out."))}
    assert all(torch.equal(own[k], base[k]) for k in copied)
    assert {k.split(".")[0] for k in own.keys() - copied} == {
        "input_hint_block", "zero_convs", "middle_block_out"}


@pytest.mark.parametrize("config, word", [
    (GuideConfig("huge"), "huge"), (GuideConfig(pool="max"), "max"), (GuideConfig(queries=5), "5")])
def test_an_unknown_guide_is_refused(config, word):
    with pytest.raises(ValueError, match=word):
        build_guide(SMALL, config)


# ------------------------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("config", [*TINY, GuideConfig("full")], ids=names)
def test_only_the_guide_learns(unet, batch, config):
    before = copy.deepcopy(unet.state_dict())
    guide = fresh(unet, config)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):                                         # each wakes one more zero layer
        optimizer.zero_grad()
        distilled = ppdd.cfg_distillation(unet, guide, *batch)
        distilled.loss.backward()
        optimizer.step()
        losses.append(distilled.loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad.abs().sum() > 0 for p in guide.parameters())
    assert all(p.grad is None for p in unet.parameters())
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


@pytest.mark.parametrize("config", TINY, ids=names)
def test_tiny_guides_channels_learn_to_differ(unet, batch, config):
    """From zeros all over, every channel would have the same gradient for ever: a width of 1."""
    guide = fresh(unet, config)
    optimizer = torch.optim.SGD(guide.parameters(), lr=1e-3)
    for _ in range(2):
        ppdd.cfg_distillation(unet, guide, *batch).loss.backward()
        optimizer.step()
    assert all(torch.linalg.matrix_rank(theta.weight) > 1 for theta in guide.theta_z3)
    assert torch.linalg.matrix_rank(guide.theta_z1.weight) > 1


@each_kind
def test_distillation_is_algorithm_1_one_encoder_pass_a_prompt(unet, batch, config, monkeypatch):
    z, t, c, empty, g = batch
    calls, guide = spy(monkeypatch, UNet, "encode", "decode"), trained(config)
    distilled = ppdd.cfg_distillation(unet, guide, *batch)
    (_, _, both), = calls["encode"]
    assert torch.equal(both, torch.cat([c, empty])) and len(calls["decode"]) == 2
    student = calls["decode"][1]                             # whose skips are the first of the two
    assert all(len(skip) == len(z) for skip in student[0]) and student[3] is c
    e, eps_c, w = guided(unet, guide, z, t, c, g), unet(z, t, c), g.view(3, 1, 1, 1)
    e_teacher = (1 + w) * eps_c - w * unet(z, t, empty)
    assert distilled.loss.item() == pytest.approx(F.mse_loss(e, e_teacher).item(), rel=1e-4)
    share = F.mse_loss(e, e_teacher) / F.mse_loss(eps_c, e_teacher)
    assert distilled.unexplained.item() == pytest.approx(share.item(), rel=1e-4)


@each_kind
def test_every_sample_has_its_own_t_and_g(unet, batch, config):
    guide = trained(config)
    whole = ppdd.cfg_distillation(unet, guide, *batch)
    alone = [ppdd.cfg_distillation(unet, guide, *(v[i:i + 1] for v in batch)) for i in range(3)]
    assert disagreement(whole.error, torch.cat([one.error for one in alone])) < 1e-4
    assert disagreement(whole.correction, torch.cat([one.correction for one in alone])) < 1e-4


# ------------------------------------------------------------------------------- Section 4.4


@pytest.fixture
def path():
    """t, t′, t″ of three samples on three grids, one of them ending clean."""
    return torch.tensor([999, 124, 530]), torch.tensor([874, 61, 499]), torch.tensor([749, -1, 468])


def test_a_halving_target_steps_onto_the_teachers_latent(batch, path):
    z, (t, t_mid, t_end) = batch[0], path
    z_mid = ppdd.ddim_step(z, noise(*z.shape, seed=5), t, t_mid)
    z_end = ppdd.ddim_step(z_mid, noise(*z.shape, seed=6), t_mid, t_end)
    landed = ppdd.ddim_step(z, ppdd.halving_target(z, z_end, t, t_end), t, t_end)
    swapped = ppdd.ddim_step(z, ppdd.halving_target(z, z_end, t, t_mid), t, t_end)
    for i in range(3):
        assert disagreement(landed[i], z_end[i]) < 1e-4
        assert disagreement(swapped[i], z_end[i]) > 1e-2       # the check can tell t′ from t″


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_a_perfect_student_arrives_where_its_teacher_does(steps):
    """In half the steps: 2N of the teacher's and N along the halving targets end in one picture."""
    fine, grid = ppdd.step_grid(2 * steps), ppdd.step_grid(steps)

    def teacher(z, i):
        return torch.sin(2 * z + fine[i] / 300)

    def student(z, i):
        t, mid, end = fine[2 * i:2 * i + 3]
        z_mid = ppdd.ddim_step(z, teacher(z, 2 * i), t, mid)
        z_end = ppdd.ddim_step(z_mid, teacher(z_mid, 2 * i + 1), mid, end)
        return ppdd.halving_target(z, z_end, grid[i], grid[i + 1])

    z = noise(2, 4, 4, 4).double()
    assert torch.allclose(ppdd.ddim(student, z, grid), ppdd.ddim(teacher, z, fine), rtol=1e-9)


@pytest.mark.parametrize("weight", [None, ppdd.truncated_snr], ids=["plain", "snr"])
@each_kind
def test_halving_is_two_steps_of_the_teacher_in_one(unet, batch, path, config, weight):
    """Sample by sample, whole passes, and ε̂* solved from z″ = (α″/α) z + (σ″ − σ α″/α) ε̂*."""
    z, _, c, _, g = batch
    student, teacher = trained(config, seed=8), trained(config)
    halved = ppdd.halving(unet, student, teacher, z, *path, c, g, weight)
    losses = []
    for i, times in enumerate(torch.stack(path, dim=1)):
        start, *rest = z[i:i + 1], c[i:i + 1], g[i:i + 1]
        end = start
        for t, s in pairwise(times.split(1)):
            end = ppdd.ddim_step(end, guided(unet, teacher, end, t, *rest), t, s)
        (alpha, sigma), (alpha_end, sigma_end) = (
            ppdd.alpha_sigma(times[k].item()) for k in (0, 2))
        target = (end - alpha_end / alpha * start) / (sigma_end - sigma * alpha_end / alpha)
        error = F.mse_loss(guided(unet, student, start, times[:1], *rest), target).item()
        assert halved.error[i].item() == pytest.approx(error, rel=1e-3)
        losses.append(error * (max(sigma**2 / alpha**2, 1) if weight else 1))
    assert halved.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-3)


@each_kind
def test_halving_teaches_the_student_only(unet, batch, path, config, monkeypatch):
    calls = spy(monkeypatch, UNet, "encode", "decode")
    z, _, c, _, g = batch
    teacher = trained(config).requires_grad_(True)
    student = copy.deepcopy(teacher)
    ppdd.halving(unet, student, teacher, z, *path, c, g).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in [*teacher.parameters(), *unet.parameters()])
    assert len(calls["encode"]) == 2 and len(calls["decode"]) == 4


def test_quick_attention_changes_only_the_time(unet, batch):
    distilled = ppdd.cfg_distillation(unet, trained(GuideConfig()), *batch)
    with ppdd.quick_attention("cpu"):
        quick = ppdd.cfg_distillation(unet, trained(GuideConfig()), *batch)
    assert disagreement(quick.error, distilled.error) < 1e-4


def test_truncated_snr_weighs_the_error_in_x():
    t = torch.tensor([0, 300, 600, 999])
    z, e, e_hat = (noise(4, 4, 8, 8, seed=s).double() for s in (5, 6, 7))
    alpha, sigma = (v.double() for v in ppdd.alpha_sigma(t))
    x, x_hat = ((z - sigma * eps) / alpha for eps in (e, e_hat))
    snr = (alpha**2 / sigma**2).flatten()
    assert (snr < 1).any() and (snr > 1).any()
    in_x = snr.clamp(min=1) * (x - x_hat).square().mean((1, 2, 3))
    in_eps = ppdd.truncated_snr(t) * (e - e_hat).square().mean((1, 2, 3))
    assert ppdd.truncated_snr(t).shape == (4,)
    assert torch.allclose(in_eps, in_x, rtol=1e-5)
    assert torch.allclose(ppdd.root_snr(t) ** 2, ppdd.truncated_snr(t))


@pytest.mark.parametrize("weight", [ppdd.truncated_snr, ppdd.root_snr])
def test_a_weight_weighs_each_sample_of_the_distillation_loss(unet, batch, weight):
    guide, (_, t, *_) = trained(GuideConfig()), batch
    plain = ppdd.cfg_distillation(unet, guide, *batch)
    weighed = ppdd.cfg_distillation(unet, guide, *batch, weight)
    assert weighed.loss.item() == pytest.approx((weight(t) * plain.error).mean().item(), rel=1e-5)
    assert (weight(t) > 1).any() and weighed.unexplained == plain.unexplained


# ------------------------------------------------------------------------------- sampling


def ways(batch) -> list[dict]:
    """What makes the four ways to sample: unguided, CFG, the tiny guide, the full guide."""
    return [{}, {"empty": batch[3]}, *({"guide": trained(config)} for config in BOTH)]


@pytest.mark.parametrize("sampler, passes", [("ddim", 4), ("plms", 5)])
def test_a_guide_runs_once_where_nothing_changes(unet, batch, monkeypatch, sampler, passes):
    z, _, c, _, _ = batch
    tiny = spy(monkeypatch, TinyGuide, "forward")
    full = spy(monkeypatch, FullGuide, "hint", "forward")
    ppdd.sample(unet, z, c, 5.0, 4, trained(GuideConfig()), sampler=sampler)
    assert len(tiny["forward"]) == 1 and not full
    ppdd.sample(unet, z, c, 5.0, 4, trained(GuideConfig("full")), sampler=sampler)
    assert len(full["hint"]) == 1 and len(full["forward"]) == passes


@pytest.mark.parametrize("sampler, passes", [("ddim", 4), ("plms", 5)])
def test_one_pass_a_step_and_one_of_twice_the_batch_for_cfg(
        unet, batch, monkeypatch, sampler, passes):
    z, _, c, _, _ = batch
    calls = spy(monkeypatch, UNet, "encode", "decode")
    for options, pictures in zip(ways(batch), (3, 6, 3, 3)):
        calls.clear()
        ppdd.sample(unet, z, c, 5.0, 4, sampler=sampler, **options,
                    progress=lambda: calls["progress"].append(()))
        assert [len(z) for z, *_ in calls["encode"]] == [pictures] * passes
        assert len(calls["decode"]) == len(calls["progress"]) == passes


@pytest.mark.parametrize("steps", [1, 4])
def test_what_no_step_changes_is_computed_once(unet, batch, monkeypatch, steps):
    """Projections of the time, of the prompt, and all a tiny guide has, in base and full guide."""
    once = re.compile(r"emb_layers|time_embed|attn2\.to_[kv]|theta|hint")
    texts = spy(monkeypatch, TinyGuide, "read_text")
    for options in ways(batch):
        names = {m: name for net in (unet, options.get("guide", unet))
                 for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
                 and name != "theta_z2"}                            # read_text, counted above
        ran = Counter()
        hook = register_module_forward_hook(lambda m, *_, ran=ran: ran.update([m]))
        ppdd.sample(unet, batch[0], batch[2], 5.0, steps, **options)
        hook.remove()
        assert {ran[m] for m, name in names.items() if once.search(name)} == {1}
        assert {ran[m] for m, name in names.items() if not once.search(name)} == {steps}
    assert len(texts["read_text"]) == 1


@torch.no_grad()
def test_sampling_is_the_equations_in_a_loop(unet, batch):
    """Eq. 3 or Eq. 4 at every step of Eq. 2, each with whole passes."""
    z, _, c, empty, _ = batch
    for options in ways(batch):
        expected = z
        for t, s in pairwise(torch.tensor(ppdd.step_grid(4))[:, None].expand(-1, 3)):
            eps = unet(expected, t, c)
            if "empty" in options:
                eps = eps + 5.0 * (eps - unet(expected, t, empty))
            if "guide" in options:
                eps = guided(unet, options["guide"], expected, t, c, torch.full((3,), 5.0))
            expected = ppdd.ddim_step(expected, eps, t, s)
        assert disagreement(ppdd.sample(unet, z, c, 5.0, 4, **options), expected) < 1e-3


@pytest.mark.parametrize("config", [*TINY, GuideConfig("full")], ids=names)
def test_features_of_a_run_are_those_of_its_steps(unet, batch, config):
    z, _, c, _, g = batch
    guide, times = trained(config), torch.tensor(ppdd.step_grid(4)[:-1])
    cues = guide.cues(g, unet.embed_time(times), times, c, z)
    for i, t in enumerate(times):
        z = noise(*z.shape, seed=10 + i)
        expected = features(unet, guide, z, t.expand(3), c, g)
        for once, step in zip(guide.features(cues[i], z), expected, strict=True):
            assert disagreement(once, step) < 1e-4


def test_a_picture_does_not_depend_on_its_batch(unet, batch):
    z, _, c, _, _ = batch
    for options in ways(batch):
        alone = options | ({"empty": batch[3][:1]} if "empty" in options else {})
        whole = ppdd.sample(unet, z, c, 5.0, 4, **options)
        for i in range(3):
            one = ppdd.sample(unet, z[i:i + 1], c[i:i + 1], 5.0, 4, **alone)
            assert disagreement(one, whole[i:i + 1]) < 1e-4


def test_sampling_without_guidance(unet, batch):
    z, _, c, empty, _ = batch
    plain = ppdd.sample(unet, z, c, 5.0, 4)
    assert disagreement(ppdd.sample(unet, z, c, 0.0, 4, empty=empty), plain) < 1e-4
    assert disagreement(ppdd.sample(unet, z, c, 5.0, 4, empty=empty), plain) > 1e-2
    for config in BOTH:
        assert torch.equal(ppdd.sample(unet, z, c, 5.0, 4, fresh(unet, config)), plain)


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_sampling_in_half_precision_and_on_the_meta_device(unet, batch, monkeypatch, sampler):
    """The steps run on one device: on meta nothing can be read back, and nothing is sent there."""
    z, _, c, _, _ = batch
    half, meta = copy.deepcopy(unet).bfloat16(), copy.deepcopy(unet).to("meta")
    steps = ppdd.SAMPLERS[sampler]

    def watched(*args):
        with OneDevice():
            return steps(*args)

    monkeypatch.setitem(ppdd.SAMPLERS, sampler, watched)
    for options in ways(batch):
        def to(*where, options=options):
            return {k: copy.deepcopy(v).to(*where) for k, v in options.items()}

        exact = ppdd.sample(unet, z, c, 5.0, 2, sampler=sampler, **options)
        rough = ppdd.sample(half, z, c.bfloat16(), 5.0, 2, sampler=sampler, **to(torch.bfloat16))
        assert rough.dtype == torch.float32 and disagreement(rough, exact) < 0.1
        shape = ppdd.sample(meta, z.to("meta"), c.to("meta"), 5.0, 4, sampler=sampler, **to("meta"))
        assert shape.is_meta and shape.shape == z.shape and shape.dtype == torch.float32


class OneDevice(TorchDispatchMode):
    """Fails where a tensor comes from a list or another device: the host may have to wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors}) < 2 and "lift_fresh" not in str(func), func
        return out


@pytest.mark.parametrize("way", [1, 2, 3], ids=["cfg", "tiny", "full"])
def test_a_step_is_compiled_once_for_any_g_prompt_and_seed(unet, batch, way):
    """As one graph, a way to sample; the backend needs no compiler on the machine."""
    noisy, _, prompts, _, _ = batch
    options, counter = ways(batch)[way], CompileCounter()
    compiled = torch.compile(ppdd.predict, fullgraph=True, dynamic=False, backend=counter)
    for g, z, c in ((2.0, noisy, prompts), (8.5, noisy, prompts.flip(1)), (8.5, -noisy, prompts)):
        exact = ppdd.sample(unet, z, c, g, 2, **options)
        quick = ppdd.sample(unet, z, c, g, 2, **options, predict=compiled)
        assert disagreement(quick, exact) < 1e-4
    assert counter.frame_count == 1


def test_noise_is_diffusers_and_one_seeds_own():
    generators = [torch.Generator().manual_seed(s) for s in (7, 0, 7)]
    ours = ppdd.noise([7, 0, 7], (4, 8, 8))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, randn_tensor((3, 4, 8, 8), generator=generators))
    assert torch.equal(ours[1:2], ppdd.noise(iter([0]), (4, 8, 8)))


# ------------------------------------------------------------------------------- files


def test_a_picture_that_overflows_is_decoded_again():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(40_000.0))

        def decode(self, z):
            return z[:, :3] * self.weight * 2 / (self.weight * 2)     # 80,000 is no float16

    z = noise(2, 4, 8, 8).clamp(-1, 1).half().float()
    vae = Loud().half().requires_grad_(False)
    pictures = ppdd.Base(None, vae, None, None, Path()).decode(z)
    assert pictures.dtype == torch.uint8 and vae.weight.dtype == torch.float16
    assert torch.equal(pictures, ((z[:, :3] + 1) * 127.5).round().byte())


def test_pictures_decoded_together_are_those_decoded_alone():
    """As many as one of 512 × 512 at a time; alone, a convolution may round differently."""
    sizes = VAEConfig(ch=16, ch_mult=(1, 2, 2, 2), num_res_blocks=1, norm_groups=8)
    vae, parts = randomised(lambda: VAE(sizes)), []
    base, decode = ppdd.Base(None, vae, None, None, Path()), vae.decode
    vae.decode = lambda z: parts.append(len(z)) or decode(z)
    for side, many in ((8, [64, 2]), (16, [16, 3]), (64, [1, 1]), (72, [1])):
        z = noise(sum(many), 4, side, side)
        parts.clear()
        together = base.decode(z)
        assert parts == many and together.dtype == torch.uint8
        alone = torch.cat([base.decode(latent) for latent in z[-4:].split(1)])
        off = (alone.int() - together[-4:].int()).abs()
        assert off.max() <= 1 and off.float().mean() < 1e-3


def test_fingerprint_is_of_the_bytes(tmp_path):
    file, folder = tmp_path / "base.safetensors", tmp_path / "unet" / "weights.safetensors"
    folder.parent.mkdir()
    file.write_bytes(b"weights" * 1_000_000)
    folder.write_bytes(file.read_bytes())
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert ppdd.fingerprint(file) == ppdd.fingerprint(tmp_path) == expected
    for part in ("vae", "text_encoder", "safety_checker"):
        before = ppdd.fingerprint(tmp_path)
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(b"more")
        assert (ppdd.fingerprint(tmp_path) == before) == (part == "safety_checker")


@pytest.mark.parametrize("config", [*TINY, GuideConfig("full")], ids=names)
def test_a_guide_comes_back_from_its_file(tmp_path, config):
    guide, about = trained(config), {"base": "mini", "stage": "cfg", "g": [2, 9]}
    ppdd.save_guide(tmp_path / "new" / "guide.safetensors", guide, config, about)
    file, = (tmp_path / "new").iterdir()
    assert ppdd.read_about(file) == (config, about)
    back = ppdd.load_guide(file, SMALL)
    assert type(back) is type(guide) and not back.training and back.guide_config == config
    assert not any(p.requires_grad for p in back.parameters())
    assert {v.dtype for v in load_file(file).values()} == {torch.float16}
    for name, value in guide.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.half().float())
    rough = ppdd.load_guide(file, SMALL, torch.bfloat16)
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}


@each_kind
def test_a_guide_for_another_base_is_refused(tmp_path, config):
    ppdd.save_guide(tmp_path / "guide.safetensors", trained(config), config, {})
    with pytest.raises(CheckpointError, match="guide.safetensors was trained for.*another"):
        ppdd.load_guide(tmp_path / "guide.safetensors", replace(SMALL, context_dim=32))


def test_what_is_no_guide_is_refused(tmp_path):
    bad = tmp_path / "bad.safetensors"
    tensors = {"x": torch.zeros(1)}
    for write, said in (
            (lambda: bad.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS"),
            (lambda: bad.write_bytes(b"PK\3\4"), "pickle"), (lambda: bad.write_bytes(b""), "empty"),
            (lambda: save_file(tensors, bad), "not a guide"),
            (lambda: save_file(tensors, bad, {"guide": "{", "about": "{}"}), "not a guide"),
            (lambda: save_file(tensors, bad, {"guide": '{"size": 3}', "about": "{}"}),
             "not a guide")):
        write()
        for read in (ppdd.read_about, lambda path: ppdd.load_guide(path, SMALL)):
            with pytest.raises(CheckpointError, match=f"bad.safetensors is .*{said}"):
                read(bad)
    with pytest.raises(CheckpointError, match="is not a file"):
        ppdd.load_guide(tmp_path, SMALL)
    with pytest.raises(CheckpointError, match="none.safetensors does not exist"):
        ppdd.load_guide(tmp_path / "none.safetensors", SMALL)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "state.safetensors"
    ppdd.save_tensors(file, {"x": torch.arange(6.0).view(2, 3).T}, {"step": "1"})
    before = file.read_bytes()
    assert list(file.parent.iterdir()) == [file]
    assert torch.equal(load_file(file)["x"], torch.arange(6.0).view(2, 3).T)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(ppdd, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        ppdd.save_tensors(file, {"x": torch.ones(3)})
    assert list(file.parent.iterdir()) == [file] and file.read_bytes() == before


def test_training_resumed_is_training_uninterrupted(unet, batch, tmp_path):
    def start():
        guide = trained(GuideConfig()).requires_grad_(True)
        return guide, torch.optim.AdamW(guide.parameters(), lr=1e-2)

    def advance(guide, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            ppdd.cfg_distillation(unet, guide, *batch).loss.backward()
            optimizer.step()

    guide, optimizer = start()
    advance(guide, optimizer, 3)
    state = {f"guide.{k}": v for k, v in guide.state_dict().items()}
    ppdd.save_tensors(tmp_path / "state", state | ppdd.optimizer_tensors(optimizer))
    advance(guide, optimizer, 3)
    resumed, its_optimizer = start()
    tensors = load_file(tmp_path / "state")
    resumed.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("guide.")})
    ppdd.load_optimizer(its_optimizer, tensors)
    advance(resumed, its_optimizer, 3)
    for a, b in zip(guide.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------- finding the base

OFFICIAL, COMFY = ppdd.HUB_NAMES[0], ppdd.HUB_NAMES[2]


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty place to work in, and the Hugging Face cache beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def test_weights_are_the_bundled_ones_where_there_are_no_others(cache):
    put(cache / OFFICIAL / "snapshots" / "1" / "README.md")
    for part in ("unet", "vae"):                                             # not its weights
        put(cache / OFFICIAL / "snapshots" / "1" / part / "config.json")
        put(cache / OFFICIAL / "snapshots" / "1" / part / "diffusion_pytorch_model.bin")
    put(Path("weights") / "README.md")
    assert ppdd.find_weights() == ppdd.MINI
    assert ppdd.MINI.parent == Path(ppdd.__file__).parent / "mini"


def test_weights_are_looked_for_in_order(cache, monkeypatch):
    comfy = put(cache / COMFY / "snapshots" / "1" / "v1-5-pruned-emaonly-fp16.safetensors")
    assert ppdd.find_weights() == comfy
    folder = cache / OFFICIAL / "snapshots" / "2"
    put(folder / "safety.safetensors")
    put(folder / "unet" / "x.safetensors"), put(folder / "vae" / "x.safetensors")
    assert ppdd.find_weights() == folder
    base = ppdd.Base(None, None, None, None, folder)
    assert base.name == "stable-diffusion-v1-5"
    file = put(folder / "v1-5-pruned-emaonly.safetensors")
    assert ppdd.find_weights() == file
    other = put(Path("elsewhere") / OFFICIAL / "snapshots" / "3" / file.name)
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    assert ppdd.find_weights() == other
    put(Path("weights/model/unet/x")), put(Path("weights/model/vae/x"))
    assert ppdd.find_weights() == Path("weights/model")
    mine = put(Path("weights/mine.safetensors"))
    assert ppdd.find_weights() == mine
    assert ppdd.find_weights("given.safetensors") == Path("given.safetensors")
    assert ppdd.find_weights("~/given") == Path.home() / "given"
    assert ppdd.find_weights("mini") == ppdd.MINI


def test_the_method_needs_no_other_library():
    code = ("import sys, ppdd; print({'open_clip', 'torchvision', 'diffusers', 'transformers'}"
            " & sys.modules.keys())")
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(ppdd.__file__).parent,
                         capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ------------------------------------------------------------------------------- packed weights


@torch.no_grad()
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_packed_networks_compute_the_same_at_any_size_and_batch(dtype, off):
    plain, packed = (ppdd.load_base(ppdd.MINI, dtype) for _ in range(2))
    file = ppdd.MINI.parent / "guides" / "full.safetensors"
    guides = [ppdd.load_guide(file, plain.unet.config, dtype) for _ in range(2)]
    ppdd.pack(packed.unet, packed.vae, guides[1])
    convolutions = [m for m in packed.unet.modules() if isinstance(m, torch.nn.Conv2d)]
    c = plain.embed(["a red boat", "a green tree"])
    for seeds, sides in ((1, (8, 8)), (2, (8, 8)), (2, (16, 8)), (1, (8, 8))):
        z = ppdd.noise(range(seeds), (4, *sides))
        t = torch.tensor([600] * seeds)
        g = torch.full((seeds,), 4.0)
        pictures = [guided(base.unet, guide, z.to(dtype), t, c[:seeds], g).float()
                    for base, guide in zip((plain, packed), guides)]
        pictures += [base.vae.decode(z.to(dtype)).float() for base in (plain, packed)]
        for a, b in zip(pictures[::2], pictures[1::2]):
            assert (a - b).abs().max() < off * a.abs().max()
    if torch.backends.mkldnn.is_available():
        assert all(isinstance(m, ppdd.PackedConv2d) and m.weight.is_mkldnn for m in convolutions)
        assert {m.sides for m in convolutions} == {(8, 8), (4, 4)}


def test_what_no_cpu_kernel_takes_is_not_packed():
    half = torch.nn.Conv2d(4, 4, 3).half()
    elsewhere = torch.nn.Conv2d(4, 4, 3, device="meta")
    ppdd.pack(half, elsewhere)
    assert type(half) is type(elsewhere) is torch.nn.Conv2d
