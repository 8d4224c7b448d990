"""support/checkpoint.py: three networks through every layout of files, and what is passed for one.

The well-known libraries write the files and are the reference for what they mean.
"""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import (
    TOY_TEXT,
    TOY_UNET,
    TOY_VAE,
    disagreement,
    noise,
    randomised,
    write_single_file,
)
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from references import diffusers_unet, diffusers_vae, reference_text_encoder, text_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig

from clip_text import TextConfig, TextEncoder
from support import configs
from support.checkpoint import UNET as UNET_PART
from support.checkpoint import (
    CheckpointError,
    StateDictMismatch,
    build_on_meta,
    load_strict,
    load_text_encoder,
    load_unet,
    load_vae,
    read_checkpoint,
    read_config,
    read_tensors,
    save_checkpoint,
)
from support.cli import BadInput
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "model.diffusion_model."
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DEEP = replace(  # has what TOY_UNET lacks: a level without attention, two blocks a level
    TOY_UNET, channel_mult=(1, 2, 2), num_res_blocks=2, attention=(True, True, False))


class Network(NamedTuple):
    """One of the three: how it is loaded, the library's own, and what both make of inputs."""

    load: Callable
    theirs: nn.Module
    config: object
    folder: str
    key: str                                    # under which a single file may note its sizes
    prefixes: tuple[str, ...]                   # of its keys in a single file
    ours: Callable[[nn.Module], Tensor]
    expected: Callable[[nn.Module], Tensor]

    def check(self, loaded: nn.Module, off: float = 1e-4) -> None:
        with torch.inference_mode():
            assert disagreement(self.ours(loaded), self.expected(self.theirs)) < off
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def unet_network(config: UNetConfig) -> Network:
    z, t = noise(2, 4, 16, 16), torch.tensor([999, 20])
    c = noise(2, 77, config.context_dim, seed=2)
    return Network(
        load_unet, randomised(lambda: diffusers_unet(config)), config, "unet", "unet_config",
        (PREFIX, "state_dict." + PREFIX), lambda net: net(z.to(net.dtype), t, c.to(net.dtype)),
        lambda net: net(z, t, c).sample)


def vae_network(config: VAEConfig = TOY_VAE) -> Network:
    x, z = noise(1, 3, 32, 32).clamp(-1, 1), noise(1, 4, 4, 4)

    def ours(net: VAE) -> Tensor:
        dtype = net.quant_conv.weight.dtype
        moments, image = net.encode(x.to(dtype)), net.decode(z.to(dtype))
        return torch.cat([moments.flatten(), image.flatten()])

    def expected(net: nn.Module) -> Tensor:
        q, image = net.encode(x).latent_dist, net.decode(z / config.scale_factor).sample
        return torch.cat([q.mean.flatten(), q.logvar.flatten(), image.flatten()])

    return Network(load_vae, randomised(lambda: diffusers_vae(config)), config, "vae",
                   "vae_config", ("first_stage_model.", "vae.", "state_dict.first_stage_model."),
                   ours, expected)


def text_network(config: TextConfig = TOY_TEXT) -> Network:
    ids = torch.randint(1000, (2, 77), generator=torch.Generator().manual_seed(1))
    return Network(
        load_text_encoder, reference_text_encoder(config), config, "text_encoder",
        "text_config",
        ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
        lambda net: net(ids), lambda net: net(ids).last_hidden_state)


NETWORKS = {"unet": lambda: unet_network(TOY_UNET), "deep": lambda: unet_network(DEEP),
            "vae": vae_network, "text": text_network}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> Network:
    return NETWORKS[request.param]()


@pytest.fixture(scope="module")
def toy_unet() -> Network:
    return unet_network(TOY_UNET)


@pytest.fixture
def folder(network, tmp_path) -> Path:
    network.theirs.save_pretrained(tmp_path / network.folder)
    return tmp_path


# ------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}, {"variant": "fp16"}],
                         ids=["whole", "shards", "fp16"])
@pytest.mark.parametrize("inside", [True, False], ids=["model-folder", "own-folder"])
def test_a_folder(network, tmp_path, options, inside):
    network.theirs.save_pretrained(tmp_path / network.folder, **options)
    assert bool([*tmp_path.rglob("*.index.json")]) == ("max_shard_size" in options)
    loaded = network.load(tmp_path if inside else tmp_path / network.folder)
    assert loaded.config == network.config                          # from its config.json
    network.check(loaded)


def test_a_folder_prefers_full_precision(network, folder):
    file, = folder.rglob("*.safetensors")
    save_file({}, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    network.check(network.load(folder, config=network.config))


def test_a_folder_of_newer_models_has_linear_projections(toy_unet, tmp_path):
    toy_unet.theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".proj_in.weight" in name or ".proj_out.weight" in name:
            tensors[name] = tensors[name][:, :, 0, 0]
    assert tensors["mid_block.attentions.0.proj_in.weight"].ndim == 2
    save_file(tensors, file)
    toy_unet.check(load_unet(tmp_path, config=TOY_UNET))


@pytest.mark.parametrize("ndim", [2, 4])
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_the_vae_s_attention_has_two_spellings(tmp_path, spelling, ndim):
    network = vae_network()
    network.theirs.save_pretrained(tmp_path)
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    file, respelt = tmp_path / "diffusion_pytorch_model.safetensors", {}
    for name, tensor in load_file(file).items():
        if ".attentions.0." in name:
            for before, after in old.items() if spelling == "old" else ():
                name = name.replace(before, after)
            if ndim == 4 and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        respelt[name] = tensor
    assert ("encoder.mid_block.attentions.0.query.weight" in respelt) == (spelling == "old")
    save_file(respelt, file)
    network.check(load_vae(tmp_path, config=TOY_VAE))


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_the_text_encoder_s_keys_have_two_spellings(tmp_path, prefix):
    network = text_network()
    weights = {prefix + k: v for k, v in text_weights(network.theirs).items()}
    weights[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    (tmp_path / "text_encoder").mkdir()
    save_file(weights, tmp_path / "text_encoder/model.safetensors")
    network.check(load_text_encoder(tmp_path, config=TOY_TEXT))


@pytest.mark.parametrize("options", [
    {}, {"variant": "fp16"}, {"max_shard_size": "200KB"},
    {"variant": "fp16", "max_shard_size": "200KB"}], ids=["plain", "fp16", "shards", "fp16-shards"])
def test_a_folder_that_a_pipeline_saved(tmp_path, options):
    networks = [unet_network(TOY_UNET), vae_network(), text_network()]
    unet, vae, text = (network.theirs for network in networks)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae, text, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path, **options)
    sharded = {p.parent.name for p in tmp_path.rglob("*.safetensors.index*.json")}
    assert sharded == ({"unet", "vae", "text_encoder"} if "max_shard_size" in options else set())
    assert ("variant" in options) == any(".fp16" in p.name for p in tmp_path.rglob("*"))
    for network in networks:
        network.check(network.load(tmp_path))


# ------------------------------------------------------------------------------- what lies beside

OTHER_SIZES = {
    "unet": lambda: unet_network(replace(TOY_UNET, num_heads=2, norm_groups=4, context_dim=16)),
    "vae": lambda: vae_network(replace(TOY_VAE, norm_groups=4, scale_factor=0.5, ch_mult=(1, 3))),
    "text": lambda: text_network(replace(TOY_TEXT, heads=2, layers=1))}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_what_config_json_says_of_sizes_is_obeyed(tmp_path, name):
    """Heads, groups and the scaling factor show in no shape."""
    network = OTHER_SIZES[name]()
    network.theirs.save_pretrained(tmp_path / network.folder)
    loaded = network.load(tmp_path)
    assert loaded.config == network.config
    network.check(loaded)


LIBRARIES = {
    "unet": (UNet2DConditionModel, configs._unet_sizes, configs._UNET_ONLY),
    "vae": (AutoencoderKL, configs._vae_sizes, configs._VAE_ONLY),
    "text_encoder": (CLIPTextConfig, configs._text_sizes, configs._TEXT_ONLY)}


@pytest.mark.parametrize("part", LIBRARIES)
def test_a_key_that_is_absent_means_the_library_s_default(part):
    """The libraries' own defaults, written down, are the same sizes; and nothing is refused."""
    kind, sizes, only = LIBRARIES[part]
    defaults = {key: list(p.default) if isinstance(p.default, tuple) else p.default
                for key, p in inspect.signature(kind).parameters.items()}
    assert {*only} - {*defaults} <= {"_class_name", "model_type"}
    assert sizes({}, Path("x")) == sizes(defaults, Path("x"))
    assert defaults.get("cross_attention_dim", 1280) == 1280        # not Stable Diffusion 1.5's


OFFICIAL = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": True,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
    "vae": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
        "block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "norm_num_groups": 32, "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4},
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "bos_token_id": 0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 768, "vocab_size": 49408}}


@pytest.mark.parametrize("kind", [UNetConfig, VAEConfig, TextConfig])
def test_stable_diffusion_1_5_s_own_files_say_our_defaults(tmp_path, kind):
    part = {UNetConfig: "unet", VAEConfig: "vae", TextConfig: "text_encoder"}[kind]
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL[part]))
    stored = configs.read_sizes(tmp_path / "config.json", part)
    assert stored != "{}" and read_config(kind, stored, "x") == kind()


REFUSED = [
    ("unet", "act_fn", "gelu"), ("unet", "dual_cross_attention", True),
    ("unet", "class_embed_type", "timestep"), ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("unet", "attention_head_dim", [5, 10, 20, 20]), ("unet", "layers_per_block", [1, 2, 2, 2]),
    ("unet", "block_out_channels", [320, 480, 640, 640]), ("unet", "time_cond_proj_dim", 256),
    ("unet", "transformer_layers_per_block", [1, 1, 2, 2]), ("unet", "mid_block_type", None),
    ("unet", "up_block_types", ["UpBlock2D"] * 4), ("unet", "norm_eps", 1e-6),
    ("unet", "down_block_types", ["AttnDownBlock2D"] * 4), ("unet", "only_cross_attention", True),
    ("vae", "act_fn", "relu"), ("vae", "shift_factor", 0.1159), ("vae", "use_quant_conv", False),
    ("vae", "latents_mean", [0.1, 0, 0, 0]), ("vae", "_class_name", "AutoencoderTiny"),
    ("text_encoder", "hidden_act", "gelu"), ("text_encoder", "intermediate_size", 3000),
    ("text_encoder", "model_type", "bert"), ("text_encoder", "vocab_size", 49409),
    ("text_encoder", "max_position_embeddings", 248)]


@pytest.mark.parametrize("part, key, value", REFUSED)
def test_what_config_json_says_beside_is_refused_by_name(tmp_path, part, key, value):
    load = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}[part]
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    (tmp_path / part).mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / part / f"{stem}.safetensors")
    written = {key: value} if part == "text_encoder" else {"cross_attention_dim": 768, key: value}
    (tmp_path / part / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert f"{part}/config.json has {key} {json.dumps(value)}, " in str(error.value)


@pytest.mark.parametrize("written, sentence", [
    ("{", "config.json can't be read"), ("[]", "config.json can't be read"),
    ('{"block_out_channels": 4}', "config.json can't be read"),
    ('{"block_out_channels": [0, 0]}', "config.json can't be read"),
    ('{"down_block_types": [1]}', "config.json can't be read"),
    ('{"attention_head_dim": "8"}', "carries settings of a UNetConfig"),
    ('{"cross_attention_dim": 1024}', "config.json is Stable Diffusion 2")])
def test_a_config_json_that_is_damaged_or_another_base_s(tmp_path, written, sentence):
    save_file({"x": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(CheckpointError, match=sentence):
        load_unet(tmp_path)


SCHEDULERS = {
    "": PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    "none": LCMScheduler(),
    "other": DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"),
    'prediction_type "v_prediction", and only "epsilon"':
        DDIMScheduler(**BETAS, prediction_type="v_prediction"),
    'beta_schedule "linear", and only "scaled_linear"': DDIMScheduler(),
    "beta_end 0.02, and only 0.012": DDIMScheduler(**BETAS | {"beta_end": 0.02}),
    "rescale_betas_zero_snr true": DDIMScheduler(**BETAS, rescale_betas_zero_snr=True),
    "num_train_timesteps 500": DDIMScheduler(**BETAS, num_train_timesteps=500),
    r"trained_betas \[0.1, 0.2\]": DDIMScheduler(**BETAS, trained_betas=[0.1, 0.2])}


@pytest.mark.parametrize("sentence", SCHEDULERS)
def test_the_scheduler_of_a_folder_must_be_stable_diffusion_s(toy_unet, tmp_path, sentence):
    toy_unet.theirs.save_pretrained(tmp_path / "unet")
    SCHEDULERS[sentence].save_pretrained(tmp_path / "scheduler")
    for path in (tmp_path, tmp_path / "unet"):
        if " " not in sentence:
            load_unet(path)
        else:
            with pytest.raises(CheckpointError, match=f"scheduler_config.json has {sentence}"):
                load_unet(path)


def test_a_scheduler_that_is_not_told_its_betas_has_diffusers_own(toy_unet, tmp_path):
    toy_unet.theirs.save_pretrained(tmp_path / "unet")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text('{"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}')
    with pytest.raises(CheckpointError, match='has beta_schedule "linear"'):
        load_unet(tmp_path)


METADATA = {
    'modelspec.prediction_type "v", and only "epsilon"': {"modelspec.prediction_type": "v"},
    'modelspec.architecture "stable-diffusion-v2-768-v"':
        {"modelspec.architecture": "stable-diffusion-v2-768-v"},
    "ss_v_parameterization True": {"ss_v_parameterization": "True"},
    "ss_zero_terminal_snr True": {"ss_zero_terminal_snr": "True"},
    "": {"modelspec.architecture": "stable-diffusion-v1", "modelspec.prediction_type": "epsilon",
         "ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}}


@pytest.fixture
def single_file(toy_unet, tmp_path):
    """Writes the toy UNet as a single file, with more metadata and tensors."""
    def write(more: dict | None = None, **others: Tensor) -> Path:
        toy_unet.theirs.save_pretrained(tmp_path / "unet")
        metadata = {"unet_config": json.dumps(asdict(TOY_UNET))} | (more or {})
        tensors = {PREFIX + k: v for k, v in load_unet(tmp_path).state_dict().items()}
        save_file(tensors | others, tmp_path / "model.safetensors", metadata)
        return tmp_path / "model.safetensors"
    return write


@pytest.mark.parametrize("sentence", METADATA)
def test_what_metadata_says_of_another_prediction_is_refused(single_file, sentence):
    file = single_file(METADATA[sentence])
    if not sentence:
        load_unet(file)
    else:
        with pytest.raises(CheckpointError, match=f"the metadata of .*safetensors has {sentence}"):
            load_unet(file)


@pytest.mark.parametrize("marker", ["v_pred", "ztsnr", "state_dict.v_pred"])
def test_a_tensor_that_marks_another_prediction_is_refused(single_file, marker):
    with pytest.raises(CheckpointError, match=f"has a tensor {marker.split('.')[-1]}, "):
        load_unet(single_file(**{marker: torch.ones(0)}))


def test_the_yaml_beside_a_single_file_is_read_too(single_file):
    """As of models that A1111 samples with v-prediction."""
    file, settings = single_file(), "model:\n  params:\n    linear_start: 0.00085\n"
    file.with_suffix(".yaml").write_text(settings)
    load_unet(file)
    file.with_suffix(".yaml").write_text(settings + '    parameterization: "v"\n')
    with pytest.raises(CheckpointError, match='l.yaml has parameterization "v", and only "eps"'):
        load_unet(file)


@pytest.mark.parametrize("layout", ["official", "diffusers", "folder", "checkpoint"])
def test_a_vae_that_comes_alone(tmp_path, layout):
    network = OTHER_SIZES["vae"]() if layout in ("diffusers", "folder") else vae_network()
    network.theirs.save_pretrained(tmp_path / "vae")
    path = tmp_path / ("vae" if layout == "folder" else "vae/diffusion_pytorch_model.safetensors")
    if layout in ("official", "checkpoint"):
        prefix = "first_stage_model." if layout == "checkpoint" else ""
        path = write_single_file(tmp_path / "mse.safetensors", load_vae(tmp_path), prefix,
                                 metadata={"vae_config": asdict(network.config)},
                                 **{prefix + "loss.logvar": torch.ones(())})
    loaded = load_vae(path)
    assert loaded.config == network.config
    network.check(loaded)


# ------------------------------------------------------------------------------- single files


def neighbours(network: Network, prefix: str) -> dict[str, Tensor]:
    """What an official file holds beside a network: other parts, averages, a schedule, buffers."""
    others = {"betas": torch.ones(1000), "model_ema.decay": torch.ones(()),
              "model_ema.diffusion_modelout0bias": torch.ones(4)}
    if network.folder == "unet":
        return others | {prefix + "model_ema.decay": torch.ones(()),
                         "first_stage_model.x": torch.ones(1)}
    others |= {PREFIX + "out.2.bias": torch.ones(4)}
    if network.folder == "vae":
        return others | {prefix + "loss.logvar": torch.ones(())}
    return others | {prefix + "embeddings.position_ids": torch.arange(77)[None],
                     "cond_stage_model.transformer.text_projection.weight": torch.zeros(8, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_single_file(network, folder, tmp_path, dtype):
    named = network.load(folder, config=network.config)
    for prefix in network.prefixes:
        file = write_single_file(tmp_path / "model.safetensors", named, prefix, dtype,
                                 {network.key: asdict(network.config)},
                                 **neighbours(network, prefix))
        ours = network.load(file)                                   # the sizes are in the file
        assert ours.config == network.config
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
        network.check(ours, {torch.float32: 1e-4, torch.float16: 5e-3}.get(dtype, 5e-2))
        expected = named.state_dict()
        assert all(torch.equal(v, expected[k].to(dtype).float())
                   for k, v in ours.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(network, folder, dtype):
    half = network.load(folder, dtype, config=network.config)
    assert {p.dtype for p in half.parameters()} == {dtype}
    with torch.inference_mode():
        out = network.ours(half)
    assert out.dtype == dtype
    network.check(half, 0.05)


def test_what_is_saved_comes_back(tmp_path):
    networks = [randomised(lambda: UNet(TOY_UNET)), randomised(lambda: VAE(TOY_VAE)),
                randomised(lambda: TextEncoder(TOY_TEXT))]
    file = tmp_path / "new" / "toy.safetensors"
    save_checkpoint(file, *networks, made_by="a test")
    tensors, metadata = read_tensors(file)
    assert metadata["made_by"] == "a test"
    assert {v.dtype for v in tensors.values()} == {torch.float16}
    for network, load in zip(networks, (load_unet, load_vae, load_text_encoder)):
        back = load(file)
        assert back.config == network.config
        for name, tensor in network.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor.half().float())


@pytest.mark.full
def test_full_size(tmp_path):
    z, t, c = noise(1, 4, 64, 64), torch.tensor([999]), noise(1, 77, 768, seed=2)
    theirs = randomised(lambda: diffusers_unet(UNetConfig()))
    with torch.inference_mode():
        expected = theirs(z, t, c).sample
        theirs.save_pretrained(tmp_path / "unet", max_shard_size="1GB")
        del theirs      # two of them are 7 GB
        ours = load_unet(tmp_path)
        shutil.rmtree(tmp_path / "unet")    # mapped: the space comes back with `ours`
        assert disagreement(ours(z, t, c), expected) < 1e-4


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype, copies", [("float16", 0), ("float32", 2)])
def test_loading_holds_no_second_copy(tmp_path, dtype, copies):
    """The file, mapped, and what the model takes in another dtype: nothing of either twice."""
    config, file = UNetConfig(model_channels=128), tmp_path / "m.safetensors"
    with torch.device("meta"):
        state = UNet(config).state_dict()
    metadata = {"unet_config": json.dumps(asdict(config))}
    save_file({PREFIX + k: torch.ones(p.shape).half() for k, p in state.items()}, file, metadata)
    code = f"""if True:
        import re, torch
        from support.checkpoint import load_unet
        def peak():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        before = peak()
        model = load_unet({str(file)!r}, torch.{dtype})
        assert all(p.dtype == torch.{dtype} and p.amax() == 1 for p in model.parameters())
        print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True,
                          cwd=ROOT)
    assert int(done.stdout) < (1.2 + copies) * file.stat().st_size > 2e8


# ------------------------------------------------------------------------------- wrong files

WRONG_TENSORS = {
    "Stable Diffusion 2:": {
        "cond_stage_model.model.ln_final.weight": torch.ones(1),
        PREFIX + "out.0.bias": torch.ones(320)},
    "Stable Diffusion XL:": {
        "conditioner.embedders.0.x": torch.ones(1), PREFIX + "out.0.bias": torch.ones(320)},
    "Stable Diffusion 2: pass": {
        PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(320, 1024)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(1)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": torch.ones(1)},
    "holds no UNet": {"first_stage_model.encoder.conv_in.weight": torch.ones(1)},
    "missing: time_embed.0.weight,.*1 unexpected: x;": {
        PREFIX + "x": torch.ones(1), PREFIX + "out.2.bias": torch.ones(3)},
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
def test_a_wrong_model(tmp_path, sentence):
    save_file(WRONG_TENSORS[sentence], tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_unet(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


def test_a_wrong_model_for_the_vae(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({PREFIX + "out.2.bias": torch.ones(4)}, file)
    with pytest.raises(CheckpointError, match="holds no VAE .*first_stage_model. or vae.*--vae"):
        load_vae(file)
    save_file({"vae.encoder.conv_in.bias": torch.ones(5)}, file)
    with pytest.raises(StateDictMismatch, match=r"missing: .*conv_in.bias \(5,\) for \(128,\)"):
        load_vae(file)
    with pytest.raises(CheckpointError, match="has no vae/diffusion_pytorch_model.*--vae FILE"):
        load_vae(tmp_path)


def test_a_missing_weight_is_named(network, folder):
    file, = folder.rglob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("fc1.bias") or "conv1.bias" in name)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(StateDictMismatch, match=r"does not fit \w+ \(1 missing: .*\.bias\)"):
        network.load(folder, config=network.config)


@pytest.mark.parametrize("sentence", WRONG_BYTES)
def test_a_wrong_file(tmp_path, sentence):
    file = tmp_path / "model.ckpt"
    file.write_bytes(WRONG_BYTES[sentence])
    with pytest.raises(CheckpointError, match=sentence):
        load_unet(file)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"<"], ids=str)
def test_a_good_file_that_begins_like_a_bad_one(tmp_path, start):
    """A safetensors file begins with the length of its header, which may be any number."""
    name, length = PREFIX + "out.2.bias", int.from_bytes(start, "little")
    length += length < 200 and 2 * 256
    header = json.dumps({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header.ljust(length).encode() + bytes(16))
    assert file.read_bytes().startswith(start)
    with pytest.raises(StateDictMismatch, match="does not fit UNet .*missing"):
        load_unet(file)


def test_a_missing_file_folder_and_shard(toy_unet, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_unet(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="has no unet/diffusion_pytorch_model.safetensors"):
        load_unet(tmp_path)
    toy_unet.theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    next(tmp_path.glob("*-00001-*")).unlink()
    with pytest.raises(CheckpointError, match="00001-of-.* does not exist"):
        load_unet(tmp_path, config=TOY_UNET)


def test_the_folder_of_a_controlnet(tmp_path):
    tensors = {"controlnet_cond_embedding.conv_in.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="a ControlNet"):
        load_unet(tmp_path)


def test_a_folder_of_other_sizes(toy_unet, tmp_path):
    toy_unet.theirs.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet/config.json").unlink()                # then they are Stable Diffusion 1.5's
    with pytest.raises(StateDictMismatch, match=r"of another shape: .* for \("):
        load_unet(tmp_path)


@pytest.mark.parametrize("stored", [
    '{"model_chan', "[]", '{"colour": 3}', '{"model_channels": "64"}', '{"channel_mult": 4}'])
def test_a_damaged_configuration_is_answered_with_a_sentence(tmp_path, stored):
    path = tmp_path / "base.safetensors"
    save_file({PREFIX + "out.0.weight": torch.ones(1)}, path, {"unet_config": stored})
    with pytest.raises(CheckpointError, match="carries settings of a UNetConfig"):
        load_unet(path)


# ------------------------------------------------------------------------------- the parts of it


def test_only_the_tensors_asked_for_are_read(tmp_path):
    file = tmp_path / "base.safetensors"
    save_file({PREFIX + "a": torch.ones(1), "vae.b": torch.ones(2)}, file, {"unet_config": "{}"})
    tensors, config = read_checkpoint(file, UNET_PART)
    assert tensors.keys() == {"a"} and config == "{}"
    tensors, metadata = read_tensors(file, lambda names: {"mine": "vae.b"})
    assert tensors.keys() == {"mine"} and metadata == {"unet_config": "{}"}
    assert read_tensors(file)[0].keys() == {PREFIX + "a", "vae.b"}


def test_a_configuration_is_read_over_the_defaults():
    assert read_config(UNetConfig, "{}", "x") == UNetConfig()
    stored = json.dumps(asdict(TOY_UNET))
    assert read_config(UNetConfig, stored, "x") == TOY_UNET
    assert read_config(UNetConfig, '{"num_heads": 5}', "x").num_heads == 5
    with pytest.raises(CheckpointError, match="x carries settings .*num_heads is 3"):
        read_config(UNetConfig, '{"num_heads": 3}', "x")


def test_a_module_with_memory_is_filled_in_place_and_one_without_adopts():
    tensors = {"weight": noise(3, 2, seed=5), "bias": noise(3)}
    filled, adopted = nn.Linear(2, 3), build_on_meta(lambda: nn.Linear(2, 3), "x")
    weight = filled.weight
    load_strict(filled, tensors, "x")
    load_strict(adopted, tensors, "x")
    assert filled.weight is weight and torch.equal(weight, tensors["weight"])
    assert adopted.weight.data_ptr() == tensors["weight"].data_ptr()


def test_numbers_that_are_not_finite_are_named():
    tensors = {"weight": noise(3, 2), "bias": torch.tensor([0, torch.nan, 0])}
    with pytest.raises(CheckpointError, match="x is damaged .1 with numbers .*finite: bias"):
        load_strict(nn.Linear(2, 3), tensors, "x")


def test_building_on_the_meta_device_takes_no_random_numbers():
    state = torch.get_rng_state()
    module = build_on_meta(lambda: UNet(TOY_UNET), "x")
    assert all(p.is_meta for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_its_errors_are_bad_input():
    assert issubclass(StateDictMismatch, CheckpointError) and issubclass(CheckpointError, BadInput)
