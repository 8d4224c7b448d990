"""The UNet against diffusers with the same weights, through every file layout its loader reads."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import channels_last_maps, disagreement, noise, randomised, write_single_file
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

from unet import CheckpointError, Encoder, UNet, UNetConfig, injection_channels, load_unet

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "model.diffusion_model."
FULL = UNetConfig()
MINI = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(True, True), num_heads=4,
    context_dim=64, norm_groups=16,
)
DEEP = dataclasses.replace(  # has what MINI lacks: a level without attention, two blocks a level
    MINI, channel_mult=(1, 2, 3), num_res_blocks=2, attention=(True, True, False)
)


def diffusers_unet(config: UNetConfig) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)]
    return UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=[config.model_channels * m for m in config.channel_mult],
        layers_per_block=config.num_res_blocks, down_block_types=down, up_block_types=up,
        cross_attention_dim=config.context_dim, attention_head_dim=config.num_heads,
        norm_num_groups=config.norm_groups,
    )


def inputs(config: UNetConfig, side: int = 16, batch: int = 2):
    t = torch.tensor([999, 20, 501][:batch])
    z = noise(batch, config.in_channels, side, side)
    return z, t, noise(batch, 77, config.context_dim, seed=2)


@torch.inference_mode()
def predict(unet, z, t, c):
    out = unet(z, t, c)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.fixture(scope="module", params=[MINI, DEEP], ids=["mini", "deep"])
def reference(request):
    """A small diffusers UNet with its configuration."""
    return randomised(lambda: diffusers_unet(request.param)), request.param


@pytest.fixture(scope="module")
def mini():
    return randomised(lambda: UNet(MINI))


# ----------------------------------------------------------------------- parity through the files


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "2MB"}, {"variant": "fp16"}], ids=["whole", "shards", "fp16"]
)
@pytest.mark.parametrize("inside", [True, False], ids=["model-folder", "unet-folder"])
def test_folder(reference, tmp_path, options, inside):
    theirs, config = reference
    theirs.save_pretrained(tmp_path / "unet", **options)
    assert bool(list(tmp_path.glob("unet/*.index.json"))) == ("max_shard_size" in options)
    ours = load_unet(tmp_path if inside else tmp_path / "unet", config=config)
    x = inputs(config)
    assert disagreement(predict(ours, *x), predict(theirs, *x)) < 1e-4
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_folder_prefers_full_precision(reference, tmp_path):
    theirs, config = reference
    theirs.save_pretrained(tmp_path / "unet")
    save_file({}, tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors")
    load_unet(tmp_path, config=config)


def test_folder_with_linear_projections(reference, tmp_path):
    theirs, config = reference
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".proj_in.weight" in name or ".proj_out.weight" in name:
            tensors[name] = tensors[name][:, :, 0, 0]
    assert tensors["mid_block.attentions.0.proj_in.weight"].ndim == 2
    save_file(tensors, file)
    x = inputs(config)
    assert disagreement(predict(load_unet(tmp_path, config=config), *x), predict(theirs, *x)) < 1e-4


@pytest.mark.parametrize("nested", ["", "state_dict."], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_single_file(reference, tmp_path, dtype, nested):
    theirs, config = reference
    theirs.save_pretrained(tmp_path / "unet")
    named = load_unet(tmp_path, config=config)
    file = write_single_file(
        tmp_path / "model.safetensors", named, nested + PREFIX, dtype,
        {"unet_config": dataclasses.asdict(config)}, betas=torch.ones(1000),
        **{"model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout0bias": torch.ones(4),
           PREFIX + "model_ema.decay": torch.ones(()), "first_stage_model.x": torch.ones(1)},
    )
    ours = load_unet(file)  # the sizes are in the file
    assert ours.config == config and ours.out[2].weight.dtype == torch.float32
    rounded = randomised(lambda: diffusers_unet(config)).to(dtype).float()
    x = inputs(config)
    assert disagreement(predict(ours, *x), predict(rounded, *x)) < 1e-4


def test_single_file_names_are_official(reference, tmp_path):
    """The converter of diffusers reads our names for official ones, and gets its weights back."""
    theirs, config = reference
    theirs.save_pretrained(tmp_path / "unet")
    official = load_unet(tmp_path, config=config).state_dict()
    converted = convert_ldm_unet_checkpoint(
        {PREFIX + name: tensor for name, tensor in official.items()}, dict(theirs.config)
    )
    expected = theirs.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_full_size_names_and_count():
    with torch.device("meta"):
        ours, theirs = UNet(), diffusers_unet(FULL)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    official = {PREFIX + name: p for name, p in ours.state_dict().items()}
    converted = convert_ldm_unet_checkpoint(official, dict(theirs.config))
    shapes = {name: p.shape for name, p in theirs.state_dict().items()}
    assert {name: p.shape for name, p in converted.items()} == shapes


def test_full_size(tmp_path):
    x = inputs(FULL, side=64, batch=1)
    theirs = randomised(lambda: diffusers_unet(FULL))
    expected = predict(theirs, *x)
    theirs.save_pretrained(tmp_path / "unet", max_shard_size="1GB")
    del theirs  # two of them are 7 GB
    ours = load_unet(tmp_path)
    shutil.rmtree(tmp_path / "unet")  # the weights are mapped, so the space comes back with `ours`
    assert disagreement(predict(ours, *x), expected) < 1e-4


# ------------------------------------------------------------------------- what the method rests on


def test_forward_is_encode_then_decode(mini):
    z, t, c = inputs(MINI)
    with torch.inference_mode():
        emb = mini.embed_time(t)
        skips, h = mini.encode(z, emb, c)
        first, second = mini.decode(skips, h, emb, c), mini.decode(skips, h, emb, c)
        assert torch.equal(first, mini(z, t, c)) and torch.equal(first, second)
    assert emb.shape == (2, 4 * MINI.model_channels)


def test_time_and_prompt_prepared_for_a_run_are_those_of_every_step(mini):
    z, _, c = inputs(MINI)
    with torch.inference_mode():
        times = torch.tensor([999, 500, 20])
        embs, prompt = mini.prepare(mini.embed_time(times), c)
        for emb, t in zip(embs, times, strict=True):
            skips, h = mini.encode(z, emb, prompt)
            out = mini.decode(skips, h, emb, prompt)
            assert disagreement(out, mini(z, t.expand(2), c)) < 1e-5


def test_injection_channels(mini):
    wide = [320] * 4 + [640] * 3 + [1280] * 6
    assert injection_channels(FULL) == wide
    z, t, c = inputs(MINI)
    skips, h = mini.encode(z, mini.embed_time(t), c)
    assert injection_channels(MINI) == [x.shape[1] for x in [*skips, h]]


def test_zero_injection_changes_nothing(mini):
    x = inputs(MINI)
    y = [torch.zeros(2, ch, 1, 1) for ch in injection_channels(MINI)]
    with torch.inference_mode():
        assert torch.equal(mini(*x, y), mini(*x))


def test_injection_broadcasts_and_every_point_counts(mini):
    z, t, c = inputs(MINI)
    y = [noise(2, ch, 1, 1) for ch in injection_channels(MINI)]
    with torch.inference_mode():
        emb = mini.embed_time(t)
        skips, h = mini.encode(z, emb, c)
        broadcast = mini.decode(skips, h, emb, c, y)
        spread = [g.expand_as(x).clone() for g, x in zip(y, [*skips, h], strict=True)]
        assert torch.equal(mini.decode(skips, h, emb, c, spread), broadcast)
        for i in range(len(y)):
            others = [torch.zeros_like(g) if i == j else g for j, g in enumerate(y)]
            assert not torch.equal(mini.decode(skips, h, emb, c, others), broadcast)


def test_injection_of_another_length_is_refused(mini):
    y = [torch.zeros(2, ch, 1, 1) for ch in injection_channels(MINI)]
    with pytest.raises(ValueError):
        mini(*inputs(MINI), y[:-1])


def test_gradient_reaches_the_injection_through_a_frozen_decoder(mini):
    z, t, c = inputs(MINI)
    with torch.no_grad():
        emb = mini.embed_time(t)
        skips, h = mini.encode(z, emb, c)
    y = [torch.zeros(2, ch, 1, 1, requires_grad=True) for ch in injection_channels(MINI)]
    mini.decode(skips, h, emb, c, y).square().mean().backward()
    assert all(g.grad.abs().max() > 0 for g in y)
    assert all(p.grad is None for p in mini.parameters())


def test_encoder_is_half_a_unet():
    with torch.device("meta"):
        half, whole = Encoder(MINI).state_dict(), UNet(MINI).state_dict()
    decoder = ("output_blocks.", "out.")
    assert half.keys() == {name for name in whole if not name.startswith(decoder)}


def test_fresh_network_predicts_zero():
    with torch.inference_mode():
        assert UNet(MINI)(*inputs(MINI)).abs().max() == 0


# ------------------------------------------------------------------------------- how it may be run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(mini, tmp_path, dtype):
    metadata = {"unet_config": dataclasses.asdict(MINI)}
    file = write_single_file(tmp_path / "m.safetensors", mini, PREFIX, metadata=metadata)
    half = load_unet(file, dtype)
    z, t, c = inputs(MINI)
    out = predict(half, z.to(dtype), t, c.to(dtype))
    assert out.dtype == dtype and disagreement(out, predict(mini, z, t, c)) < 0.05


def test_half_precision_takes_a_float32_injection(mini):
    z, t, c = (x.bfloat16() if x.is_floating_point() else x for x in inputs(MINI))
    y = [noise(2, ch, 1, 1) for ch in injection_channels(MINI)]
    half = randomised(lambda: UNet(MINI)).bfloat16()
    with torch.inference_mode():
        assert half(z, t, c, y).dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype, copies", [("float16", 0), ("float32", 2)])
def test_loading_holds_no_second_copy(tmp_path, dtype, copies):
    """The file, mapped, and what the model takes in another dtype: nothing of either twice."""
    config, file = UNetConfig(model_channels=128), tmp_path / "m.safetensors"
    with torch.device("meta"):
        state = UNet(config).state_dict()
    metadata = {"unet_config": json.dumps(dataclasses.asdict(config))}
    save_file({PREFIX + k: torch.ones(p.shape).half() for k, p in state.items()}, file, metadata)
    code = f"""if True:
        import re, torch, unet
        def peak():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        before = peak()
        model = unet.load_unet({str(file)!r}, torch.{dtype})
        assert all(p.dtype == torch.{dtype} and p.amax() == 1 for p in model.parameters())
        print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True,
                          cwd=ROOT)
    assert int(done.stdout) < (1.2 + copies) * file.stat().st_size > 2e8


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


def test_compiles_without_graph_breaks(mini):
    """The backend needs no compiler on the machine; what is tested is the capture as one graph."""
    compiled = torch.compile(mini, fullgraph=True, backend="aot_eager")
    x = inputs(MINI)
    y = [noise(2, ch, 1, 1) for ch in injection_channels(MINI)]
    with torch.no_grad():
        assert disagreement(compiled(*x), mini(*x)) < 1e-4
        assert disagreement(compiled(*x, y), mini(*x, y)) < 1e-4


def test_timesteps_between_whole_ones(mini):
    with torch.inference_mode():
        whole = mini.embed_time(torch.tensor([7, 8]))
        assert torch.equal(whole, mini.embed_time(torch.tensor([7.0, 8.0])))
        between = mini.embed_time(torch.tensor([7.5]))
    assert not torch.equal(between, whole[:1]) and not torch.equal(between, whole[1:])


# -------------------------------------------------------------------------------------- wrong files

WRONG_TENSORS = {
    "Stable Diffusion 2:": {
        "cond_stage_model.model.ln_final.weight": torch.ones(1),
        PREFIX + "out.0.bias": torch.ones(320),
    },
    "Stable Diffusion XL:": {
        "conditioner.embedders.0.x": torch.ones(1), PREFIX + "out.0.bias": torch.ones(320)
    },
    "Stable Diffusion 2: pass": {
        PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(320, 1024)
    },
    "an inpainting model": {PREFIX + "input_blocks.0.0.weight": torch.ones(320, 9, 3, 3)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(1)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": torch.ones(1)},
    "holds no UNet": {"first_stage_model.encoder.conv_in.weight": torch.ones(1)},
    "missing: time_embed.0.weight,.*1 unexpected: x;": {
        PREFIX + "x": torch.ones(1), PREFIX + "out.2.bias": torch.ones(3)
    },
    r"1 of another shape: out.2.bias \(3,\) for \(4,\)": {PREFIX + "out.2.bias": torch.ones(3)},
}
WRONG_BYTES = {
    "a pickle": b"PK\x03\x04archive/data.pkl",
    "a pickle,": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    "a web page": b"\n<!DOCTYPE html><html></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
    "is empty": b"",
    "cut short": b"\x00\x01\x02\x03",
}


@pytest.mark.parametrize("sentence", WRONG_TENSORS)
def test_wrong_model(tmp_path, sentence):
    save_file(WRONG_TENSORS[sentence], tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_unet(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


@pytest.mark.parametrize("sentence", WRONG_BYTES)
def test_wrong_file(tmp_path, sentence):
    file = tmp_path / "model.ckpt"
    file.write_bytes(WRONG_BYTES[sentence])
    with pytest.raises(CheckpointError, match=sentence):
        load_unet(file)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"<"], ids=str)
def test_good_file_that_begins_like_a_bad_one(tmp_path, start):
    """A safetensors file begins with the length of its header, which may be any number."""
    name, length = PREFIX + "out.2.bias", int.from_bytes(start, "little")
    length += length < 200 and 2 * 256
    header = json.dumps({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header.ljust(length).encode() + bytes(16))
    assert file.read_bytes().startswith(start)
    with pytest.raises(CheckpointError, match="does not fit UNet .*missing"):
        load_unet(file)


def test_truncated_file(mini, tmp_path):
    file = write_single_file(tmp_path / "model.safetensors", mini, PREFIX)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        load_unet(file)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_unet(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="has no unet/diffusion_pytorch_model.safetensors"):
        load_unet(tmp_path)


def test_missing_shard(reference, tmp_path):
    theirs, config = reference
    theirs.save_pretrained(tmp_path, max_shard_size="2MB")
    next(tmp_path.glob("*-00001-*")).unlink()
    with pytest.raises(CheckpointError, match="00001-of-.* does not exist"):
        load_unet(tmp_path, config=config)


def test_controlnet_folder(tmp_path):
    tensors = {"controlnet_cond_embedding.conv_in.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="a ControlNet"):
        load_unet(tmp_path)


def test_folder_of_other_sizes(reference, tmp_path):
    theirs, _ = reference
    theirs.save_pretrained(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=r"of another shape: .* for \("):
        load_unet(tmp_path)


@pytest.mark.parametrize("stored", [
    '{"model_chan', "[]", '{"colour": 3}', '{"model_channels": "64"}', '{"channel_mult": 4}'])
def test_damaged_configuration_is_said_in_a_sentence(tmp_path, stored):
    path = tmp_path / "base.safetensors"
    save_file({"model.diffusion_model.out.0.weight": torch.ones(1)}, path, {"unet_config": stored})
    with pytest.raises(CheckpointError, match="carries settings of a UNetConfig"):
        load_unet(path)
