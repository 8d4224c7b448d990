"""support/fast.py: the same as the plain loop, with what no step changes computed once."""

# ruff: noqa: F811 (the fixtures' names)

import copy
import io
import re
from collections import Counter

import pytest
import torch
from conftest import disagreement, noise
from small import (  # noqa: F401 (fixtures)
    FULL,
    KINDS,
    TINY,
    OneDevice,
    batch,
    each_guide,
    each_kind,
    fresh,
    guided,
    name_of,
    residuals,
    spy,
    trained,
    unet,
    ways,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_hook

import ppdd
from ppdd import FullGuide, GuideConfig, TinyGuide
from support import fast
from support.base import MINI, load_base
from support.guides import BUNDLED, load_guide
from unet import UNet

WAYS = ["none", "cfg", "tiny", "seeing", "full"]
each_way = pytest.mark.parametrize("way", range(5), ids=WAYS)

# ------------------------------------------------------------------------------- the plain loop


@each_way
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_it_samples_what_the_plain_loop_does(unet, batch, sampler, way):
    z, _, c, _, _ = batch
    options = ways(batch)[way]
    for steps, g in ((1, 5.0), (3, 0.0)):
        plain = ppdd.sample(unet, z, c, g, steps, sampler=sampler, **options)
        quick = fast.sample(unet, z, c, g, steps, sampler=sampler, **options)
        assert quick.dtype == torch.float32 and disagreement(quick, plain) < 1e-4
    different = fast.sample(unet, z, c, 20.0, 3, sampler=sampler, **options)
    assert way == 0 or disagreement(different, plain) > 1e-3      # the check can tell g apart


@pytest.mark.parametrize("config", TINY, ids=name_of)
def test_it_samples_with_every_form_of_the_tiny_guide(unet, batch, config):
    z, _, c, _, _ = batch
    guide = trained(config)
    plain = ppdd.sample(unet, z, c, 5.0, 2, guide)
    assert disagreement(fast.sample(unet, z, c, 5.0, 2, guide), plain) < 1e-4


@pytest.mark.parametrize("sampler, predictions", [("ddim", 4), ("plms", 5)])
def test_one_pass_a_step_and_one_of_twice_the_batch_for_cfg(
        unet, batch, monkeypatch, sampler, predictions):
    z, _, c, _, _ = batch
    calls = spy(monkeypatch, UNet, "encode", "decode")
    for options, images in zip(ways(batch), (3, 6, 3, 3)):
        calls.clear()
        fast.sample(unet, z, c, 5.0, 4, sampler=sampler, **options,
                    progress=lambda: calls["progress"].append(()))
        assert [len(z) for z, *_ in calls["encode"]] == [images] * predictions
        assert len(calls["decode"]) == len(calls["progress"]) == predictions


def test_an_image_does_not_depend_on_its_batch(unet, batch):
    z, _, c, _, _ = batch
    for options in ways(batch):
        alone = options | ({"empty": batch[3][:1]} if "empty" in options else {})
        whole = fast.sample(unet, z, c, 5.0, 2, **options)
        for i in (0, 2):
            one = fast.sample(unet, z[i:i + 1], c[i:i + 1], 5.0, 2, **alone)
            assert disagreement(one, whole[i:i + 1]) < 1e-4


def test_sampling_without_guidance(unet, batch):
    z, _, c, empty, _ = batch
    plain = fast.sample(unet, z, c, 5.0, 4)
    assert disagreement(fast.sample(unet, z, c, 0.0, 4, empty=empty), plain) < 1e-4
    assert disagreement(fast.sample(unet, z, c, 5.0, 4, empty=empty), plain) > 1e-2
    for config in KINDS:
        assert torch.equal(fast.sample(unet, z, c, 5.0, 4, fresh(unet, config)), plain)


# ------------------------------------------------------------------------------- computed once


@pytest.mark.parametrize("sampler, predictions", [("ddim", 4), ("plms", 5)])
def test_a_guide_runs_once_where_nothing_changes(unet, batch, monkeypatch, sampler, predictions):
    z, _, c, _, _ = batch
    tiny = spy(monkeypatch, TinyGuide, "forward")
    full = spy(monkeypatch, FullGuide, "encode_hint", "control")
    fast.sample(unet, z, c, 5.0, 4, trained(GuideConfig()), sampler=sampler)
    assert len(tiny["forward"]) == 1 and not full
    fast.sample(unet, z, c, 5.0, 4, trained(FULL), sampler=sampler)
    assert len(full["encode_hint"]) == 1 and len(full["control"]) == predictions


@each_way
def test_what_no_step_changes_is_computed_once(unet, batch, monkeypatch, way):
    """Projections of the time, of the prompt, and all a tiny guide has, in base and full guide."""
    once = re.compile(r"emb_layers|time_embed|attn2\.to_[kv]|theta|hint")
    texts, options = spy(monkeypatch, TinyGuide, "read_text"), ways(batch)[way]
    names = {m: name for net in (unet, options.get("guide", unet))
             for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
             and name != "theta_z2"}                                # read_text, counted below
    if WAYS[way] == "seeing":                   # its other layers are convolutions, at each step
        names = {m: name for m, name in names.items() if not re.match("theta_z3|look", name)}
    for steps in (1, 4):
        ran = Counter()
        hook = register_module_forward_hook(lambda m, *_, ran=ran: ran.update([m]))
        fast.sample(unet, batch[0], batch[2], 5.0, steps, **options)
        hook.remove()
        assert {ran[m] for m, name in names.items() if once.search(name)} == {1}
        assert {ran[m] for m, name in names.items() if not once.search(name)} == {steps}
    assert len(texts["read_text"]) == (2 if WAYS[way] in ("tiny", "seeing") else 0)


@torch.no_grad()
def test_time_and_prompt_of_a_run_are_those_of_every_step(unet, batch):
    z, _, c, _, _ = batch
    times = torch.tensor([999, 500, 20])
    expected = [unet(z, t.expand(3), c) for t in times]
    shifts, projected = fast.precompute(unet, unet.embed_time(times), c)
    for shift, out in zip(shifts, expected, strict=True):
        emb, prompt = fast.by_layer(unet, shift, projected)
        features = unet.encode(z, emb, prompt)
        assert disagreement(unet.decode(features, emb, prompt), out) < 1e-5


@torch.no_grad()
@each_guide
def test_what_a_guide_adds_in_a_run_is_what_it_adds_in_its_steps(unet, batch, config):
    z, _, c, _, g = batch
    guide, times = trained(config), torch.tensor(ppdd.step_grid(4)[:-1])
    known = fast.precompute_guide(guide, g, unet.embed_time(times), times, c, z)
    for i, t in enumerate(times):
        z = noise(*z.shape, seed=10 + i)
        expected = residuals(unet, guide, z, t.expand(3), c, g)
        if config.form == "seeing":
            features = unet.encode(z, unet.embed_time(t.expand(3)), c)
            ours = guide.add_sight(*known[i], features)
        elif config.kind == "tiny":
            ours = known[i][0].split(fast.guide_widths(guide), dim=-1)
        else:
            shifts, prompt, hint = known[i]
            ours = guide.control(z, *fast.by_layer(guide, shifts, prompt), hint)
        for once, step in zip(ours, expected, strict=True):
            assert disagreement(once.view_as(step), step) < 1e-4


# ------------------------------------------------------------------------------- the networks


@each_kind
def test_networks_it_has_used_compute_what_they_did_bit_for_bit(unet, batch, config):
    """It gives layers another class, in place: sampling and training know nothing of that."""
    def everything(unet, guide):
        guide = copy.deepcopy(guide).requires_grad_(True)
        z, t, c, empty, g = batch
        halved = ppdd.halving(unet, guide, trained(config, 8), z, t, t - 10, t - 20, c, g)
        distilled = ppdd.cfg_distillation(unet, guide, *batch)
        (halved.loss + distilled.loss).backward()
        latents = [ppdd.sample(unet, z, c, 5.0, 2, guide), ppdd.sample(unet, z, c, 5.0, 2),
                   ppdd.sample(unet, z, c, 5.0, 2, empty=empty), unet(z, t, c)]
        return [*latents, distilled.error, halved.error, *(p.grad for p in guide.parameters())]

    guide = trained(config)
    before = everything(unet, guide)
    for options in ({"guide": guide}, {"empty": batch[3]}):
        fast.sample(unet, batch[0], batch[2], 5.0, 3, **options)
    after = everything(unet, guide)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_networks_it_has_used_are_copied_and_saved_as_ever(batch, unet):
    z, t, c, _, _ = batch
    untouched, guide = copy.deepcopy(unet), trained(FULL)
    fast.sample(unet, z, c, 5.0, 2, guide)
    expected, file = unet(z, t, c), io.BytesIO()
    assert unet.state_dict().keys() == untouched.state_dict().keys()
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in unet.state_dict().items())
    torch.save(unet, file)
    torch.save(unet.state_dict(), states := io.BytesIO())
    file.seek(0), states.seek(0)
    untouched.load_state_dict(torch.load(states))
    for network in (copy.deepcopy(unet), torch.load(file, weights_only=False), untouched):
        assert torch.equal(network(z, t, c), expected)
        theirs = fast.sample(network, z, c, 5.0, 2, copy.deepcopy(guide))
        assert torch.equal(theirs, fast.sample(unet, z, c, 5.0, 2, guide))


def test_a_copy_and_its_original_do_not_share_what_was_computed(batch, unet):
    z, _, c, _, _ = batch
    first = fast.sample(unet, z, c, 5.0, 2)
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert disagreement(fast.sample(other, z, c, 5.0, 2), ppdd.sample(other, z, c, 5.0, 2)) < 1e-4
    assert torch.equal(fast.sample(unet, z, c, 5.0, 2), first)


# ------------------------------------------------------------------------------- how it may be run


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_sampling_in_half_precision(unet, batch, sampler):
    z, c, empty, half = batch[0][:1], batch[2][:1], batch[3][:1], copy.deepcopy(unet).bfloat16()
    for options in ({}, {"empty": empty}, *({"guide": trained(config)} for config in KINDS)):
        exact = fast.sample(unet, z, c, 5.0, 2, sampler=sampler, **options)
        options = {k: copy.deepcopy(v).bfloat16() for k, v in options.items()}
        rough = fast.sample(half, z, c.bfloat16(), 5.0, 2, sampler=sampler, **options)
        assert rough.dtype == torch.float32 and disagreement(rough, exact) < 0.1


@pytest.mark.full
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_the_steps_never_wait_for_the_device(unet, batch, monkeypatch, sampler):
    """On the meta device nothing can be read back, and nothing is sent there."""
    z, c, meta = batch[0].to("meta"), batch[2].to("meta"), copy.deepcopy(unet).to("meta")
    steps, watched = ppdd.SAMPLERS[sampler], []

    def on_one_device(*args):
        watched.append(sampler)
        with OneDevice():
            return steps(*args)

    monkeypatch.setitem(fast.SAMPLERS, sampler, on_one_device)
    for options in ways(batch):
        options = {k: v.to("meta") for k, v in options.items()}
        latent = fast.sample(meta, z, c, 5.0, 4, sampler=sampler, **options)
        assert latent.is_meta and latent.shape == z.shape and latent.dtype == torch.float32
    assert len(watched) == len(WAYS)


@pytest.mark.full
@pytest.mark.parametrize("way", range(1, 5), ids=WAYS[1:])
def test_a_step_is_compiled_once_for_any_g_prompt_and_seed(unet, batch, way):
    """As one graph, a way to sample; the backend needs no compiler on the machine."""
    noisy, _, prompts, _, _ = batch
    options, counter = ways(batch)[way], CompileCounter()
    compiled = torch.compile(fast.predict_step, fullgraph=True, dynamic=False, backend=counter)
    for g, z, c in ((2.0, noisy, prompts), (8.5, noisy, prompts.flip(1)), (8.5, -noisy, prompts)):
        exact = fast.sample(unet, z, c, g, 2, **options)
        quick = fast.sample(unet, z, c, g, 2, **options, step=compiled)
        assert disagreement(quick, exact) < 1e-4
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------- packed weights


@torch.no_grad()
@pytest.mark.full
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_packed_networks_compute_the_same_at_any_size_and_batch(dtype, off):
    plain, packed = (load_base(MINI, dtype) for _ in range(2))
    guides = [load_guide(BUNDLED / "full.safetensors", plain.unet.config, dtype) for _ in range(2)]
    fast.prepack(packed.unet, packed.vae, guides[1])
    convolutions = [m for m in packed.unet.modules() if isinstance(m, nn.Conv2d)]
    c = plain.embed(["a red boat", "a green tree"])
    for seeds, sides in ((1, (8, 8)), (2, (8, 8)), (2, (16, 8)), (1, (8, 8))):
        z = ppdd.noise(range(seeds), (4, *sides))
        t = torch.tensor([600] * seeds)
        g = torch.full((seeds,), 4.0)
        outputs = [guided(base.unet, guide, z.to(dtype), t, c[:seeds], g).float()
                   for base, guide in zip((plain, packed), guides)]
        outputs += [base.vae.decode(z.to(dtype)).float() for base in (plain, packed)]
        for a, b in zip(outputs[::2], outputs[1::2]):
            assert (a - b).abs().max() < off * a.abs().max()
    ops = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or ops._is_mkldnn_bf16_supported()):
        assert all(isinstance(m, fast.PackedConv2d) and m.weight.is_mkldnn for m in convolutions)
        assert {m.sides for m in convolutions} == {(8, 8), (4, 4)}


@torch.no_grad()
def test_a_packed_convolution_is_the_same_at_any_size_and_batch():
    for options in ({"padding": 1}, {"stride": 2, "padding": 1}, {"bias": False}):
        plain = nn.Conv2d(8, 16, 3, **options).requires_grad_(False)
        packed = nn.Sequential(copy.deepcopy(plain))
        fast.prepack(packed)
        for shape in ((1, 8, 8, 8), (2, 8, 8, 8), (2, 8, 16, 8), (1, 8, 8, 8)):
            x = noise(*shape)
            assert disagreement(packed(x), plain(x)) < 1e-5
        if torch.backends.mkldnn.is_available():
            assert type(packed[0]) is fast.PackedConv2d and packed[0].weight.is_mkldnn


def test_what_no_cpu_kernel_takes_is_not_packed():
    half = nn.Conv2d(4, 4, 3).half()
    elsewhere = nn.Conv2d(4, 4, 3, device="meta")
    fast.prepack(half, elsewhere)
    assert type(half) is type(elsewhere) is nn.Conv2d
