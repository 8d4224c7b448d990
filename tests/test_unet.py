"""unet.py: the network against diffusers' with the same weights, and what the method rests on.

At full size test_checkpoint.py compares them.
"""

from dataclasses import replace

import pytest
import torch
from conftest import channels_last_maps, disagreement, noise, randomised, shrink_features
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from references import diffusers_unet, with_our_weights

from unet import KEY_PREFIX, Encoder, UNet, UNetConfig, folder_names, injection_channels

FULL = UNetConfig()
MINI = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(True, True), num_heads=4,
    context_dim=64, norm_groups=16)
DEEP = replace(     # has what MINI lacks: a level without attention, two blocks a level
    MINI, channel_mult=(1, 2, 3), num_res_blocks=2, attention=(True, True, False))


def inputs(config: UNetConfig, side: int = 16, batch: int = 2):
    t = torch.tensor([999, 20, 501][:batch])
    z = noise(batch, config.in_channels, side, side)
    return z, t, noise(batch, 77, config.context_dim, seed=2)


@torch.inference_mode()
def predict(unet, z, t, c):
    out = unet(z, t, c)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.fixture(scope="module")
def mini():
    return randomised(lambda: UNet(MINI))


# ------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("config", [MINI, DEEP], ids=["mini", "deep"])
def test_it_predicts_what_diffusers_does(config):
    ours, x = randomised(lambda: UNet(config)), inputs(config)
    assert disagreement(predict(ours, *x), predict(with_our_weights(ours), *x)) < 1e-4


@torch.inference_mode()
def test_every_normalisation_has_the_epsilon_of_stable_diffusion():
    """With features this small it matters: beside a variance of 1e-6, 1e-5 is not 1e-6."""
    ours, x = randomised(lambda: UNet(MINI)), inputs(MINI)
    shrink_features(ours)
    theirs = with_our_weights(ours)
    assert disagreement(predict(ours, *x), predict(theirs, *x)) < 1e-4
    layer_norms = [{m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)}
                   for net in (ours, theirs)]
    assert layer_norms[0] == layer_norms[1]


def test_names_and_count_of_stable_diffusion():
    """diffusers' converter takes our names for those of an official checkpoint."""
    with torch.device("meta"):
        ours, theirs = UNet(), diffusers_unet(FULL)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    official = {KEY_PREFIX + name: p for name, p in ours.state_dict().items()}
    converted = convert_ldm_unet_checkpoint(official, dict(theirs.config))
    shapes = {name: p.shape for name, p in theirs.state_dict().items()}
    assert {name: p.shape for name, p in converted.items()} == shapes


@pytest.mark.parametrize("config", [MINI, DEEP, FULL], ids=["mini", "deep", "sd15"])
def test_names_of_the_folder_layout(config):
    """The table of renames brings each of diffusers' names to one of ours, and reaches them all."""
    with torch.device("meta"):
        ours, theirs = UNet(config), diffusers_unet(config)
    names = set()
    for name in theirs.state_dict():
        for old, new in folder_names(config).items():
            name = name.replace(old, new)
        names.add(name)
    assert names == ours.state_dict().keys()


@pytest.mark.parametrize("sizes, word", [
    ({"num_heads": 5}, "num_heads"), ({"attention": (True,)}, "attention")])
def test_sizes_that_make_no_network(sizes, word):
    with pytest.raises(ValueError, match=word):
        replace(MINI, **sizes)


# ------------------------------------------------------------------------------- encode and decode


def test_forward_is_encode_then_decode(mini):
    z, t, c = inputs(MINI)
    with torch.inference_mode():
        emb = mini.embed_time(t)
        features = mini.encode(z, emb, c)
        first, second = mini.decode(features, emb, c), mini.decode(features, emb, c)
        assert torch.equal(first, mini(z, t, c)) and torch.equal(first, second)
    assert emb.shape == (2, 4 * MINI.model_channels)


def test_injection_channels(mini):
    wide = [320] * 4 + [640] * 3 + [1280] * 6
    assert injection_channels(FULL) == wide
    z, t, c = inputs(MINI)
    features = mini.encode(z, mini.embed_time(t), c)
    assert injection_channels(MINI) == [x.shape[1] for x in features]


def test_residuals_of_zero_change_nothing(mini):
    x = inputs(MINI)
    zeros = [torch.zeros(2, ch, 1, 1) for ch in injection_channels(MINI)]
    with torch.inference_mode():
        assert torch.equal(mini(*x, zeros), mini(*x))


def test_residuals_broadcast_and_every_one_counts(mini):
    z, t, c = inputs(MINI)
    vectors = [noise(2, ch, 1, 1) for ch in injection_channels(MINI)]
    with torch.inference_mode():
        emb = mini.embed_time(t)
        features = mini.encode(z, emb, c)
        broadcast = mini.decode(features, emb, c, vectors)
        maps = [r.expand_as(x).clone() for r, x in zip(vectors, features, strict=True)]
        assert torch.equal(mini.decode(features, emb, c, maps), broadcast)
        for i in range(len(vectors)):
            others = [torch.zeros_like(r) if i == j else r for j, r in enumerate(vectors)]
            assert not torch.equal(mini.decode(features, emb, c, others), broadcast)


def test_another_number_of_residuals_is_refused(mini):
    zeros = [torch.zeros(2, ch, 1, 1) for ch in injection_channels(MINI)]
    for wrong in (zeros[:-1], [*zeros, zeros[-1]]):
        with pytest.raises(ValueError):
            mini(*inputs(MINI), wrong)


def test_the_gradient_reaches_the_residuals_through_a_frozen_decoder(mini):
    z, t, c = inputs(MINI)
    with torch.no_grad():
        emb = mini.embed_time(t)
        features = mini.encode(z, emb, c)
    zeros = [torch.zeros(2, ch, 1, 1, requires_grad=True) for ch in injection_channels(MINI)]
    mini.decode(features, emb, c, zeros).square().mean().backward()
    assert all(r.grad.abs().max() > 0 for r in zeros)
    assert all(p.grad is None for p in mini.parameters())


def test_an_encoder_is_half_a_unet():
    with torch.device("meta"):
        half, whole = Encoder(MINI).state_dict(), UNet(MINI).state_dict()
    decoder = ("output_blocks.", "out.")
    assert half.keys() == {name for name in whole if not name.startswith(decoder)}


def test_a_fresh_network_predicts_zero():
    with torch.inference_mode():
        assert UNet(MINI)(*inputs(MINI)).abs().max() == 0


# ------------------------------------------------------------------------------- how it may be run


def test_half_precision_takes_float32_residuals(mini):
    z, t, c = (x.bfloat16() if x.is_floating_point() else x for x in inputs(MINI))
    residuals = [noise(2, ch, 1, 1) for ch in injection_channels(MINI)]
    half = randomised(lambda: UNet(MINI)).bfloat16()
    with torch.inference_mode():
        assert half(z, t, c, residuals).dtype == torch.bfloat16


def test_autocast(mini):
    x = inputs(MINI)
    with torch.autocast("cpu", torch.bfloat16):
        out = predict(mini, *x)
    assert disagreement(out, predict(mini, *x)) < 0.05


def test_channels_last(mini):
    z, t, c = inputs(MINI)
    last = randomised(lambda: UNet(MINI)).to(memory_format=torch.channels_last)
    maps = channels_last_maps(last)
    assert disagreement(predict(last, z, t, c), predict(mini, z, t, c)) < 1e-4
    assert len(maps) > 30 and all(maps)


@pytest.mark.full
def test_compiles_without_graph_breaks(mini):
    """The backend needs no compiler on the machine; what is tested is the capture as one graph."""
    compiled = torch.compile(mini, fullgraph=True, backend="aot_eager")
    x = inputs(MINI)
    residuals = [noise(2, ch, 1, 1) for ch in injection_channels(MINI)]
    with torch.no_grad():
        assert disagreement(compiled(*x), mini(*x)) < 1e-4
        assert disagreement(compiled(*x, residuals), mini(*x, residuals)) < 1e-4


def test_timesteps_between_whole_ones(mini):
    with torch.inference_mode():
        whole = mini.embed_time(torch.tensor([7, 8]))
        assert torch.equal(whole, mini.embed_time(torch.tensor([7.0, 8.0])))
        between = mini.embed_time(torch.tensor([7.5]))
    assert not torch.equal(between, whole[:1]) and not torch.equal(between, whole[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_timesteps_differ_in_half_precision_too(dtype):
    """In half precision itself 998 and 999 would have the same angles; in bfloat16 be the same."""
    half = randomised(lambda: UNet(MINI)).to(dtype)
    with torch.inference_mode():
        late = half.embed_time(torch.tensor([998, 999]))
    assert late.dtype == dtype and not torch.equal(late[0], late[1])
