"""vae.py: the autoencoder against diffusers' with the same weights, and what it computes."""

import pytest
import torch
from conftest import channels_last_maps, disagreement, noise, randomised, shrink_features
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from references import diffusers_vae

from vae import KEY_PREFIXES, VAE, VAEConfig, folder_names

FULL = VAEConfig()
MINI = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, norm_groups=16)
DEEP = VAEConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=2, norm_groups=16)


@pytest.fixture(scope="module")
def mini():
    return randomised(lambda: VAE(MINI))


def converted(ours: VAE, theirs) -> dict[str, torch.Tensor]:
    """Our weights by diffusers' names, through its converter of official checkpoints."""
    official = {KEY_PREFIXES[0] + name: tensor for name, tensor in ours.state_dict().items()}
    return convert_ldm_vae_checkpoint(official, dict(theirs.config))


@torch.inference_mode()
def check_parity(config: VAEConfig, image_side: int = 32, latent_side: int = 8,
                 small: bool = False) -> None:
    ours, theirs = randomised(lambda: VAE(config)), diffusers_vae(config).eval()
    if small:
        shrink_features(ours)
    theirs.load_state_dict(converted(ours, theirs))
    x = noise(1, 3, image_side, image_side).clamp(-1, 1)
    q = theirs.encode(x).latent_dist
    assert disagreement(ours.encode(x), torch.cat([q.mean, q.logvar], dim=1)) < 1e-4
    z = noise(1, 4, latent_side, latent_side)
    decoded = theirs.decode(z / config.scale_factor).sample
    assert disagreement(ours.decode(z), decoded) < 1e-4


# ------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("config", [MINI, DEEP], ids=["mini", "deep"])
def test_it_encodes_and_decodes_as_diffusers_does(config):
    check_parity(config)


def test_every_normalisation_has_the_epsilon_of_stable_diffusion():
    """With features this small it matters: beside a variance of 1e-6, 1e-5 is not 1e-6."""
    check_parity(MINI, small=True)


@pytest.mark.full
def test_full_size():
    check_parity(FULL, image_side=256, latent_side=32)


def test_names_and_count_of_stable_diffusion():
    with torch.device("meta"):
        ours, theirs = VAE(), diffusers_vae(FULL)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert ours.config.scale_factor == theirs.config.scaling_factor == 0.18215
    sizes = {name: p.numel() for name, p in theirs.state_dict().items()}
    assert {name: p.numel() for name, p in converted(ours, theirs).items()} == sizes


@pytest.mark.parametrize("config", [MINI, DEEP, FULL], ids=["mini", "deep", "sd15"])
def test_names_of_the_folder_layout(config):
    """The table of renames brings each of diffusers' names to one of ours, and reaches them all."""
    with torch.device("meta"):
        ours, theirs = VAE(config), diffusers_vae(config)
    names = set()
    for name in theirs.state_dict():
        for old, new in folder_names(config).items():
            name = name.replace(old, new)
        names.add(name)
    assert names == ours.state_dict().keys()


# ------------------------------------------------------------------------------- what it means


def test_a_latent_is_mean_plus_noise_of_the_variance_scaled(mini):
    moments = torch.cat([noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=2)], dim=1)
    mean, logvar = moments.chunk(2, dim=1)
    scale = MINI.scale_factor
    zero = torch.zeros_like(mean)
    torch.testing.assert_close(mini.sample(moments, zero), scale * mean)
    std = (mini.sample(moments, zero + 1) - mini.sample(moments, zero)) / scale
    torch.testing.assert_close(std.square(), logvar.exp())


@pytest.mark.parametrize("bias, bound", [(1e3, 20.0), (-1e3, -30.0)])
def test_the_log_variance_is_clamped_and_the_mean_is_not(bias, bound):
    vae = randomised(lambda: VAE(MINI))
    vae.quant_conv.bias.fill_(bias)
    mean, logvar = vae.encode(noise(1, 3, 16, 16)).chunk(2, dim=1)
    assert (logvar == bound).all() and (mean.abs() > 900).all()


def test_sides(mini):
    moments = mini.encode(noise(2, 3, 32, 16))
    assert moments.shape == (2, 8, 16, 8)
    assert mini.decode(moments[:, :4]).shape == (2, 3, 32, 16)


# ------------------------------------------------------------------------------- how it may be run


def test_channels_last_from_the_latent_to_the_image():
    last = randomised(lambda: VAE(MINI)).to(memory_format=torch.channels_last)
    maps = channels_last_maps(last)
    last.decode(noise(1, 4, 8, 8))
    assert len(maps) > 20 and all(maps)


@pytest.mark.full
def test_channels_last_and_compiled(mini):
    last = randomised(lambda: VAE(MINI)).to(memory_format=torch.channels_last)
    decode = torch.compile(last.decode, fullgraph=True, backend="aot_eager")
    z = noise(1, 4, 8, 8)
    with torch.no_grad():
        assert disagreement(decode(z), mini.decode(z)) < 1e-4
