"""The autoencoder against diffusers with the same weights, through every file layout it reads."""

import dataclasses

import pytest
import torch
from conftest import channels_last_maps, disagreement, noise, randomised, write_single_file
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from unet import CheckpointError
from vae import VAE, VAEConfig, load_vae

FULL = VAEConfig()
MINI = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, norm_groups=16)
DEEP = VAEConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=2, norm_groups=16)
OLD = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def diffusers_vae(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.ch_mult)
    return AutoencoderKL(
        in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=[config.ch * m for m in config.ch_mult],
        layers_per_block=config.num_res_blocks, latent_channels=config.z_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, norm_num_groups=config.norm_groups,
    )


@torch.inference_mode()
def check_parity(ours: VAE, theirs: AutoencoderKL, image_side: int = 32, latent_side: int = 8):
    x = noise(1, 3, image_side, image_side).clamp(-1, 1)
    q = theirs.encode(x).latent_dist
    assert disagreement(ours.encode(x), torch.cat([q.mean, q.logvar], dim=1)) < 1e-4
    z = noise(1, 4, latent_side, latent_side)
    decoded = theirs.decode(z / ours.config.scale_factor).sample
    assert disagreement(ours.decode(z), decoded) < 1e-4


@pytest.fixture(scope="module", params=[MINI, DEEP], ids=["mini", "deep"])
def reference(request):
    """A small diffusers autoencoder with its configuration."""
    return randomised(lambda: diffusers_vae(request.param)), request.param


@pytest.fixture(scope="module")
def mini():
    return randomised(lambda: VAE(MINI))


# ----------------------------------------------------------------------- parity through the files


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "500KB"}, {"variant": "fp16"}],
    ids=["whole", "shards", "fp16"],
)
@pytest.mark.parametrize("inside", [True, False], ids=["model-folder", "vae-folder"])
def test_folder(reference, tmp_path, options, inside):
    theirs, config = reference
    theirs.save_pretrained(tmp_path / "vae", **options)
    ours = load_vae(tmp_path if inside else tmp_path / "vae", config=config)
    check_parity(ours, theirs)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("ndim", [2, 4])
@pytest.mark.parametrize("spelling", [{}, OLD], ids=["new", "old"])
def test_folder_attention_spellings(reference, tmp_path, spelling, ndim):
    theirs, config = reference
    theirs.save_pretrained(tmp_path)
    file, respelt = tmp_path / "diffusion_pytorch_model.safetensors", {}
    for name, tensor in load_file(file).items():
        if ".attentions.0." in name:
            for new, old in spelling.items():
                name = name.replace(new, old)
            if ndim == 4 and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        respelt[name] = tensor
    assert ("encoder.mid_block.attentions.0.query.weight" in respelt) == bool(spelling)
    save_file(respelt, file)
    check_parity(load_vae(tmp_path, config=config), theirs)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "state_dict.first_stage_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_single_file(reference, tmp_path, dtype, prefix):
    theirs, config = reference
    theirs.save_pretrained(tmp_path / "vae")
    file = write_single_file(
        tmp_path / "model.safetensors", load_vae(tmp_path, config=config), prefix, dtype,
        {"vae_config": dataclasses.asdict(config)},
        **{"model.diffusion_model.out.2.bias": torch.ones(4), "model_ema.decay": torch.ones(()),
           prefix + "loss.logvar": torch.ones(())},
    )
    ours = load_vae(file)
    assert ours.config == config
    check_parity(ours, randomised(lambda: diffusers_vae(config)).to(dtype).float())


def test_single_file_names_are_official(reference, tmp_path):
    """The converter of diffusers reads our names for official ones, and gets its weights back."""
    theirs, config = reference
    theirs.save_pretrained(tmp_path / "vae")
    official = load_vae(tmp_path, config=config).state_dict()
    converted = convert_ldm_vae_checkpoint(
        {"first_stage_model." + name: tensor for name, tensor in official.items()},
        dict(theirs.config),
    )
    expected = theirs.state_dict()
    assert converted.keys() == expected.keys()
    same = (torch.equal(converted[name].flatten(), expected[name].flatten()) for name in expected)
    assert all(same)


def test_full_size_names_and_count():
    with torch.device("meta"):
        ours, theirs = VAE(), diffusers_vae(FULL)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    official = {"first_stage_model." + name: p for name, p in ours.state_dict().items()}
    converted = convert_ldm_vae_checkpoint(official, dict(theirs.config))
    sizes = {name: p.numel() for name, p in theirs.state_dict().items()}
    assert {name: p.numel() for name, p in converted.items()} == sizes


def test_full_size(tmp_path):
    theirs = randomised(lambda: diffusers_vae(FULL))
    theirs.save_pretrained(tmp_path / "vae")
    check_parity(load_vae(tmp_path), theirs, image_side=256, latent_side=32)
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()


# ------------------------------------------------------------------------------------ what it means


def test_sample(mini):
    moments = torch.cat([noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=2)], dim=1)
    mean, logvar = moments.chunk(2, dim=1)
    scale = MINI.scale_factor
    zero = torch.zeros_like(mean)
    torch.testing.assert_close(mini.sample(moments, zero), scale * mean)
    std = (mini.sample(moments, zero + 1) - mini.sample(moments, zero)) / scale
    torch.testing.assert_close(std.square(), logvar.exp())


@pytest.mark.parametrize("bias, bound", [(1e3, 20.0), (-1e3, -30.0)])
def test_log_variance_is_clamped_and_the_mean_is_not(bias, bound):
    vae = randomised(lambda: VAE(MINI))
    vae.quant_conv.bias.fill_(bias)
    mean, logvar = vae.encode(noise(1, 3, 16, 16)).chunk(2, dim=1)
    assert (logvar == bound).all() and (mean.abs() > 900).all()


def test_sides(mini):
    moments = mini.encode(noise(2, 3, 32, 16))
    assert moments.shape == (2, 8, 16, 8)
    assert mini.decode(moments[:, :4]).shape == (2, 3, 32, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(mini, tmp_path, dtype):
    metadata = {"vae_config": dataclasses.asdict(MINI)}
    file = write_single_file(tmp_path / "m.safetensors", mini, "vae.", metadata=metadata)
    half, z = load_vae(file, dtype), noise(1, 4, 8, 8)
    out = half.decode(z.to(dtype))
    assert out.dtype == dtype and disagreement(out, mini.decode(z)) < 0.05


def test_channels_last_from_the_latent_to_the_picture():
    last = randomised(lambda: VAE(MINI)).to(memory_format=torch.channels_last)
    maps = channels_last_maps(last)
    last.decode(noise(1, 4, 8, 8))
    assert len(maps) > 20 and all(maps)


def test_channels_last_and_compile(mini):
    last = randomised(lambda: VAE(MINI)).to(memory_format=torch.channels_last)
    decode = torch.compile(last.decode, fullgraph=True, backend="aot_eager")
    z = noise(1, 4, 8, 8)
    with torch.no_grad():
        assert disagreement(decode(z), mini.decode(z)) < 1e-4


# -------------------------------------------------------------------------------------- wrong files


def test_wrong_models(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.ones(4)}, file)
    with pytest.raises(CheckpointError, match="holds no VAE .*first_stage_model. or vae."):
        load_vae(file)
    save_file({"vae.encoder.conv_in.bias": torch.ones(5)}, file)
    with pytest.raises(CheckpointError, match=r"missing: .*conv_in.bias \(5,\) for \(128,\)"):
        load_vae(file)
    with pytest.raises(CheckpointError, match="has no vae/diffusion_pytorch_model.safetensors"):
        load_vae(tmp_path)
