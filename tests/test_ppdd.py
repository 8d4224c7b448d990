"""ppdd.py: what the method promises of schedule, samplers, guidance, guides, losses, sampling."""

# ruff: noqa: F811 (the fixtures' names)

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import disagreement, noise
from diffusers import ControlNetModel, DDIMScheduler, PNDMScheduler
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.utils.torch_utils import randn_tensor
from small import (  # noqa: F401 (fixtures)
    ALL,
    BLIND,
    FULL,
    KINDS,
    SEEING,
    SMALL,
    TINY,
    OneDevice,
    batch,
    each_guide,
    each_kind,
    fresh,
    guided,
    name_of,
    spy,
    trained,
    unet,
    ways,
)
from torch import nn

import ppdd
from ppdd import FullGuide, GuideConfig, TinyGuide, build_guide
from unet import UNet, UNetConfig, injection_channels

SD15 = UNetConfig()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = [1, 2, 4, 5, 8, 10, 20, 25, 50]                        # N whose stride 1000 / N is whole


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

    asked = []

    def predict(z, t):
        asked.append(t)
        return eps(z, t)

    ours = ppdd.SAMPLERS[sampler](predict, start, ppdd.step_grid(steps))
    assert ours.dtype == dtype
    assert ((ours - expected).abs().max() / expected.abs().max()).item() < tolerance
    assert asked == theirs.timesteps.tolist()
    assert len(asked) == steps + (sampler == "plms" and steps > 1)


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


@each_guide
def test_a_fresh_guide_changes_nothing(unet, batch, config):
    z, t, c, _, g = batch
    plain = unet(z, t, c)
    assert torch.equal(guided(unet, fresh(unet, config), z, t, c, g), plain)
    assert not torch.equal(guided(unet, trained(config), z, t, c, g), plain)
    assert ppdd.cfg_distillation(unet, fresh(unet, config), *batch).unexplained == 1


@pytest.mark.parametrize("config, count", [
    (GuideConfig("full"), 361_279_120), (GuideConfig(), 8_273_920 + 16 * 768),
    (GuideConfig(form="gated"), 8_273_920 + 16 * 768), (SEEING, 7_618_560 + 16 * 768)],
    ids=[name_of(c) for c in (FULL, *TINY)])
def test_parameters_are_table_1s(config, count):
    """The paper's tiny guide has 8,273,920; ours the 16 queries of 768 numbers more. A seeing guide
    stays below."""
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
        tiny, full = TinyGuide(SD15), FullGuide(SD15)
        assert macs(UNet(), z, t, c) == pytest.approx(338.61e9, rel=1e-3)
        assert macs(full, g, emb, c, z, t) == pytest.approx(116.42e9, rel=1e-3)
        theta_z2 = tiny.theta_z2.weight.numel()                # an einsum, which macs can't see
        assert macs(tiny, g, emb, c) + theta_z2 == 8_273_920   # millions: no map is broadcast


def test_the_tiny_guide_is_equation_5_on_maps(unet, batch):
    """The paper's Z, 1×1 convolutions on vectors spread over H × W, give what our vectors give."""
    _, t, c, _, g = batch
    guide, emb = trained(GuideConfig(queries=1)), unet.embed_time(t)
    c_text = torch.einsum("bl,bld->bd", (c @ guide.query[0]).softmax(1), c)

    def conv(maps, theta):
        return F.conv2d(maps, theta.weight[:, :, None, None])

    gamma, time, text = (v[:, :, None, None].expand(-1, -1, 8, 8)
                         for v in (g[:, None].expand(3, 32) / 10, emb, c_text))
    h = gamma + conv(time, guide.theta_z1) + conv(text, guide.theta_z2)
    for y, theta, channels in zip(guide(g, emb, c), guide.theta_z3, injection_channels(SMALL)):
        assert y.shape == (3, channels, 1, 1)
        assert disagreement(y.expand(-1, -1, 8, 8), conv(h, theta)) < 1e-5


def test_in_the_gated_form_text_time_and_g_interact(unet, batch):
    """What a change of one of them changes depends on the others; in Eq. 5 it does not."""
    _, t, c, _, g = batch
    emb, other = unet.embed_time(t), unet.embed_time((t + 300) % 1000)
    for form, apart in (("sum", True), ("gated", False)):
        guide = trained(GuideConfig(form=form))
        texts = [[y0 - y for y0, y in zip(guide(*given, c), guide(*given, c.flip(0)))]
                 for given in ((g, emb), (g, other), (g + 5, emb))]
        for changed in texts[1:]:
            assert all((disagreement(a, b) < 1e-4) == apart for a, b in zip(texts[0], changed))
    h = (g[:, None] / 10 + guide.theta_z1(emb)) * (1 + guide.read_text(c))
    for y, theta in zip(guide(g, emb, c), guide.theta_z3):
        assert disagreement(y[..., 0, 0], theta(h)) < 1e-5


def test_each_query_of_a_tiny_guide_makes_its_share_of_the_channels(batch):
    c, guide = batch[2], trained(GuideConfig())
    for q, query in enumerate(guide.query):                    # 16 queries, two channels each
        pooled = torch.einsum("bl,bld->bd", (c @ query).softmax(1), c)
        rows = guide.theta_z2.weight[2 * q:2 * q + 2]
        assert disagreement(guide.read_text(c)[:, 2 * q:2 * q + 2], pooled @ rows.T) < 1e-5


def test_a_fresh_tiny_guide_reads_nearly_the_mean_of_the_prompt(unet, batch):
    c, guide = batch[2], fresh(unet, GuideConfig())
    assert (c @ guide.query.T).softmax(1).max() < 0.2          # of 77 tokens


@pytest.mark.parametrize("config", BLIND, ids=name_of)
def test_the_residuals_of_a_whole_run_are_those_of_its_steps(unet, batch, config):
    """Embeddings (N, 1, E) of N steps at once: a tiny guide reads no latent."""
    _, _, c, _, g = batch
    guide, embs = trained(config), unet.embed_time(torch.tensor(ppdd.step_grid(4)[:-1]))
    for whole, *steps in zip(guide(g, embs[:, None], c),
                             *(guide(g, emb.expand(3, -1), c) for emb in embs), strict=True):
        assert whole.shape[:2] == (4, 3)
        assert all(disagreement(a, b) < 1e-5 for a, b in zip(whole, steps, strict=True))


def test_a_seeing_guide_scales_its_vector_by_what_the_encoder_saw(unet, batch):
    z, t, c, _, g = batch
    guide, emb = trained(SEEING), unet.embed_time(t)
    features = unet.encode(z, emb, c)
    v = (g[:, None] / 10 + guide.theta_z1(emb)) * (1 + guide.read_text(c))              # (B, C)
    ys = guide(g, emb, c, None, None, features)
    for y, s, look, theta in zip(ys, features, guide.look, guide.theta_z3, strict=True):
        groups = s.unflatten(1, (SMALL.norm_groups, -1))
        deviation = groups.var((2, 3, 4), correction=0, keepdim=True).add(1e-5).sqrt()
        norm = ((groups - groups.mean((2, 3, 4), keepdim=True)) / deviation).flatten(1, 2)
        at_each = theta(v[:, None, None] * (1 + look(norm.permute(0, 2, 3, 1))))  # (B, H, W, C_i)
        assert y.shape == s.shape and disagreement(y, at_each.permute(0, 3, 1, 2)) < 1e-5


@torch.no_grad()
def test_a_full_guide_is_a_controlnet(batch):
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


def test_a_full_guide_starts_from_the_bases_encoder(unet):
    base, own = unet.state_dict(), fresh(unet, FULL).state_dict()
    copied = {k for k in base if not k.startswith(("output_blocks.", "out."))}
    assert all(torch.equal(own[k], base[k]) for k in copied)
    assert {k.split(".")[0] for k in own.keys() - copied} == {
        "input_hint_block", "zero_convs", "middle_block_out"}


@pytest.mark.parametrize("config, word", [
    (GuideConfig("huge"), "huge"), (GuideConfig(form="max"), "max"), (GuideConfig(queries=5), "5")])
def test_an_unknown_guide_is_refused(config, word):
    with pytest.raises(ValueError, match=word):
        build_guide(SMALL, config)


# ------------------------------------------------------------------------------- Algorithm 1


@each_guide
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


@pytest.mark.parametrize("config", TINY, ids=name_of)
def test_a_tiny_guides_channels_learn_to_differ(unet, batch, config):
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
    student = calls["decode"][1]                          # whose features are the first of the two
    assert all(len(feature) == len(z) for feature in student[0]) and student[2] is c
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
    """In half the steps: 2N of the teacher's and N along the halving targets end in one image."""
    fine, grid = ppdd.step_grid(2 * steps), ppdd.step_grid(steps)

    def teacher(z, t):
        return torch.sin(2 * z + t / 300)

    def student(z, t):
        mid, end = fine[fine.index(t) + 1:][:2]
        z_mid = ppdd.ddim_step(z, teacher(z, t), t, mid)
        z_end = ppdd.ddim_step(z_mid, teacher(z_mid, mid), mid, end)
        return ppdd.halving_target(z, z_end, t, end)

    z = noise(2, 4, 4, 4).double()
    assert torch.allclose(ppdd.ddim(student, z, grid), ppdd.ddim(teacher, z, fine), rtol=1e-9)


@pytest.mark.parametrize("weight", [None, ppdd.root_snr], ids=["plain", "root-snr"])
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
        losses.append(error * (max(sigma / alpha, 1) if weight else 1))
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


def test_root_snr_is_the_root_of_the_weight_that_makes_truncated_snr():
    """Squared, it makes the ε error Salimans & Ho's max(α²/σ², 1) on the x̂ error."""
    t = torch.tensor([0, 300, 600, 999])
    z, e, e_hat = (noise(4, 4, 8, 8, seed=s).double() for s in (5, 6, 7))
    alpha, sigma = (v.double() for v in ppdd.alpha_sigma(t))
    x, x_hat = ((z - sigma * eps) / alpha for eps in (e, e_hat))
    snr = (alpha**2 / sigma**2).flatten()
    assert (snr < 1).any() and (snr > 1).any()
    in_x = snr.clamp(min=1) * (x - x_hat).square().mean((1, 2, 3))
    in_eps = ppdd.root_snr(t) ** 2 * (e - e_hat).square().mean((1, 2, 3))
    assert ppdd.root_snr(t).shape == (4,)
    assert torch.allclose(ppdd.root_snr(t).double(), (sigma / alpha).flatten().clamp(min=1))
    assert torch.allclose(in_eps, in_x, rtol=1e-5)


def test_a_weight_weighs_each_sample_of_the_distillation_loss(unet, batch):
    guide, (_, t, *_), weight = trained(GuideConfig()), batch, ppdd.root_snr
    plain = ppdd.cfg_distillation(unet, guide, *batch)
    weighed = ppdd.cfg_distillation(unet, guide, *batch, weight)
    assert weighed.loss.item() == pytest.approx((weight(t) * plain.error).mean().item(), rel=1e-5)
    assert (weight(t) > 1).any() and weighed.unexplained == plain.unexplained


# ------------------------------------------------------------------------------- sampling


@torch.no_grad()
@pytest.mark.parametrize("way", range(4), ids=["none", "cfg", "tiny", "full"])
def test_sampling_is_the_equations_in_a_loop(unet, batch, way):
    """Eq. 3 or Eq. 4 at every step of Eq. 2, each with whole passes."""
    z, _, c, empty, _ = batch
    options, expected = ways(batch)[way], z
    for t, s in pairwise(torch.tensor(ppdd.step_grid(4))[:, None].expand(-1, 3)):
        eps = unet(expected, t, c)
        if "empty" in options:
            eps = eps + 5.0 * (eps - unet(expected, t, empty))
        if "guide" in options:
            eps = guided(unet, options["guide"], expected, t, c, torch.full((3,), 5.0))
        expected = ppdd.ddim_step(expected, eps, t, s)
    assert disagreement(ppdd.sample(unet, z, c, 5.0, 4, **options), expected) < 1e-4
    if options:                                                # the check can tell g apart
        assert disagreement(ppdd.sample(unet, z, c, -9.0, 4, **options), expected) > 1e-3


@pytest.mark.parametrize("sampler, predictions", [("ddim", 4), ("plms", 5)])
def test_one_pass_a_step_and_two_for_cfg(unet, batch, monkeypatch, sampler, predictions):
    """All of the batch's size: CFG's two passes come one after the other."""
    z, _, c, _, _ = batch
    calls = spy(monkeypatch, UNet, "encode", "decode")
    for options, passes in zip(ways(batch), (1, 2, 1, 1)):
        calls.clear()
        ppdd.sample(unet, z, c, 5.0, 4, sampler=sampler, **options,
                    progress=lambda: calls["progress"].append(()))
        assert [len(z) for z, *_ in calls["encode"]] == [3] * passes * predictions
        assert len(calls["decode"]) == passes * predictions
        assert len(calls["progress"]) == predictions


@each_kind
@pytest.mark.parametrize("sampler, predictions", [("ddim", 4), ("plms", 5)])
def test_the_guide_runs_once_a_step(unet, batch, monkeypatch, config, sampler, predictions):
    z, _, c, _, _ = batch
    guide = trained(config)
    calls = spy(monkeypatch, type(guide), "forward")
    ppdd.sample(unet, z, c, 5.0, 4, guide, sampler=sampler)
    assert len(calls["forward"]) == predictions


def test_an_image_does_not_depend_on_its_batch(unet, batch):
    z, _, c, _, _ = batch
    for options in ways(batch):
        alone = options | ({"empty": batch[3][:1]} if "empty" in options else {})
        whole = ppdd.sample(unet, z, c, 5.0, 2, **options)
        for i in (0, 2):
            one = ppdd.sample(unet, z[i:i + 1], c[i:i + 1], 5.0, 2, **alone)
            assert disagreement(one, whole[i:i + 1]) < 1e-4


def test_sampling_without_guidance(unet, batch):
    z, _, c, empty, _ = batch
    plain = ppdd.sample(unet, z, c, 5.0, 4)
    assert torch.equal(ppdd.sample(unet, z, c, 0.0, 4, empty=empty), plain)
    assert disagreement(ppdd.sample(unet, z, c, 5.0, 4, empty=empty), plain) > 1e-2
    for config in KINDS:
        assert torch.equal(ppdd.sample(unet, z, c, 5.0, 4, fresh(unet, config)), plain)


def test_sampling_in_half_precision(unet, batch):
    z, c, empty, half = batch[0][:1], batch[2][:1], batch[3][:1], copy.deepcopy(unet).bfloat16()
    for options in ({}, {"empty": empty}, *({"guide": trained(config)} for config in KINDS)):
        exact = ppdd.sample(unet, z, c, 5.0, 2, **options)
        options = {k: copy.deepcopy(v).bfloat16() for k, v in options.items()}
        rough = ppdd.sample(half, z, c.bfloat16(), 5.0, 2, **options)
        assert rough.dtype == torch.float32 and disagreement(rough, exact) < 0.1


@pytest.mark.full
def test_sampling_stays_on_the_device(unet, batch):
    """On the meta device nothing can be read back, and nothing is sent there."""
    z, c, meta = batch[0].to("meta"), batch[2].to("meta"), copy.deepcopy(unet).to("meta")
    for options in ways(batch):
        options = {k: v.to("meta") for k, v in options.items()}
        with OneDevice():
            latent = ppdd.sample(meta, z, c, 5.0, 2, **options)
        assert latent.is_meta and latent.shape == z.shape and latent.dtype == torch.float32


def test_noise_is_diffusers_and_one_seeds_own():
    generators = [torch.Generator().manual_seed(s) for s in (7, 0, 7)]
    ours = ppdd.noise([7, 0, 7], (4, 8, 8))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, randn_tensor((3, 4, 8, 8), generator=generators))
    assert torch.equal(ours[1:2], ppdd.noise(iter([0]), (4, 8, 8)))
