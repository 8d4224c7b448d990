"""Files from anywhere: LoRAs into the base, guides out to other tools, damaged files of every kind.

The well-known libraries write the files and are the reference for what they mean.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import disagreement, noise, randomised
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes
from test_clip_text import reference_encoder
from test_sample import (  # noqa: F401 (fixtures)
    TEXT,
    UNET,
    VAE_CONFIG,
    command,
    difference,
    here,
    refusal,
    toys,
    write_base,
    write_guide,
)
from test_unet import diffusers_unet, inputs, predict
from test_vae import diffusers_vae
from torch import nn

import ppdd
import sample
import unet
from unet import CheckpointError, UNet, UNetConfig, load_unet, lora_scale, merge_lora

RANK = 3

# ------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet and a text encoder as the libraries save them."""
    folder = tmp_path_factory.mktemp("base")
    randomised(lambda: diffusers_unet(UNET)).save_pretrained(folder / "unet")
    reference_encoder(TEXT).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def base(folder):
    text = ppdd.load_text_encoder(folder, config=TEXT)
    return ppdd.Base(load_unet(folder, config=UNET), None, text, None, folder)


@pytest.fixture
def theirs():
    """The same two networks, the libraries' own, to merge into by hand."""
    unet = randomised(lambda: diffusers_unet(UNET))
    return {"unet": unet, "text_encoder": reference_encoder(TEXT)}


def layers_of(network: nn.Module, only: str = "") -> dict[str, nn.Module]:
    """Linear layers and convolutions, by name; those whose names the expression finds."""
    return {name: layer for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and re.search(only, name)}


def random_lora(layer: nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) of rank RANK, shaped as trainers shape them."""
    out, into, *kernel = layer.weight.shape
    down = noise(RANK, into, *kernel, seed=seed) * 0.1
    return down, noise(out, RANK, *(1 for _ in kernel), seed=seed + 1) * 0.1


def merge_by_hand(layer: nn.Module, down, up, factor: float) -> None:
    """A layer followed by another is one whose weights are these sums, whatever the kernel."""
    sums = "or,ri->oi" if down.ndim == 2 else "orxy,rikl->oikl"
    layer.weight += factor * torch.einsum(sums, up, down)


def lora_of(theirs: dict, only: str) -> dict[tuple[str, str], tuple]:
    named = [(part, name, layer) for part, network in theirs.items()
             for name, layer in layers_of(network, only).items()]
    return {(part, name): random_lora(layer, 2 * i) for i, (part, name, layer) in enumerate(named)}


def full_name(part: str, name: str) -> str:
    """As files spell it; recent transformers leave "text_model." out of the module's own names."""
    if part == "text_encoder":
        name = "text_model." + name.removeprefix("text_model.")
    return f"{part}.{name}"


def kohya(lora: dict) -> dict:
    tensors = {}
    for i, ((part, name), (down, up)) in enumerate(lora.items()):
        name = full_name(part, name).replace("text_encoder", "te").replace(".", "_")
        tensors |= {f"lora_{name}.lora_down.weight": down, f"lora_{name}.lora_up.weight": up,
                    f"lora_{name}.alpha": torch.tensor(float(i % 3 + 1))}
    return tensors


def peft(lora: dict) -> dict:
    return {f"{full_name(*key)}.lora_{half}.weight": tensor
            for key, pair in lora.items() for half, tensor in zip("AB", pair)}


def newer(lora: dict) -> dict:
    return {name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor
            for name, tensor in peft(lora).items()}


def old(lora: dict) -> dict:
    """Attention layers alone, under their processor; those of the text encoder as in the UNet."""
    tensors = {}
    for key, pair in lora.items():
        name = full_name(*key).replace("to_out.0", "to_out")
        name = re.sub("self_attn.(q|k|v|out)_proj", r"self_attn.to_\1", name)
        name = re.sub("(attn[12])", r"\1.processor", name)
        tensors |= {f"{name}_lora.{half}.weight": t for half, t in zip(("down", "up"), pair)}
    return tensors


ATTENTION = "(to_q|to_k|to_v|to_out.0|[qkv]_proj|out_proj)$"
SPELLINGS = {"kohya": (kohya, ""), "peft": (peft, ""), "newer": (newer, ""),
             "old": (old, ATTENTION)}


def check_merged(base, theirs) -> None:
    x, ids = inputs(UNET), torch.arange(77)[None]
    assert disagreement(predict(base.unet, *x), predict(theirs["unet"], *x)) < 1e-4
    expected = theirs["text_encoder"](ids).last_hidden_state
    assert disagreement(base.text(ids), expected) < 1e-4


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_is_merged_in_every_spelling(base, theirs, tmp_path, spelling):
    write, only = SPELLINGS[spelling]
    lora = lora_of(theirs, only)
    before = {part: network.state_dict() for part, network in
              (("unet", base.unet), ("text", base.text))}
    before = {part: {k: v.clone() for k, v in state.items()} for part, state in before.items()}
    save_file(write(lora), tmp_path / "style.safetensors")
    for i, ((part, name), pair) in enumerate(lora.items()):
        alpha = i % 3 + 1 if spelling == "kohya" else RANK
        merge_by_hand(theirs[part].get_submodule(name), *pair, 0.7 * alpha / RANK)
    assert merge_lora(base.unet, base.text, tmp_path / "style.safetensors", 0.7) == []
    check_merged(base, theirs)
    changed = [not torch.equal(v, before["unet"][k]) for k, v in base.unet.state_dict().items()]
    assert sum(changed) == sum(part == "unet" for part, _ in lora)


def test_kohya_s_and_the_old_names_are_what_diffusers_takes_them_for(theirs):
    lora = lora_of(theirs, ATTENTION)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(kohya(lora))
    assert converted.keys() == old(lora).keys()


@pytest.mark.parametrize("named, root", [(True, False), (False, False), (True, True)],
                         ids=["pattern", "one-alpha", "rank-stabilised"])
def test_a_lora_that_diffusers_saved_with_its_alphas(base, theirs, tmp_path, named, root):
    lora, alphas = lora_of(theirs, "(to_k|k_proj|conv1)$"), {}
    layers = {part: {name + f".lora_{half}.weight": t for (p, name), pair in lora.items()
                     if p == part for half, t in zip("AB", pair)} for part in theirs}
    for (part, name), pair in lora.items():
        alpha = 8 if named and name.endswith("attn2.to_k") else 2
        alphas.setdefault(part, {"r": RANK, "lora_alpha": 2, "use_rslora": root,
                                 "alpha_pattern": {}})
        if alpha == 8:
            alphas[part]["alpha_pattern"][name] = alpha
        merge_by_hand(theirs[part].get_submodule(name), *pair, alpha / RANK**(0.5 if root else 1))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, layers["unet"], layers["text_encoder"],
        unet_lora_adapter_metadata=alphas["unet"],
        text_encoder_lora_adapter_metadata=alphas["text_encoder"])
    assert merge_lora(base.unet, base.text, tmp_path / "pytorch_lora_weights.safetensors") == []
    check_merged(base, theirs)


def test_loras_add_up_and_are_told_of(base, theirs, tmp_path):
    for k, only in enumerate(("attn2.to_q$", "(attn2.to_q|fc1)$")):
        lora = lora_of(theirs, only)
        save_file(peft(lora) | {"unet.colour.lora_A.weight": torch.ones(1, 1)} if k else
                  {name.removeprefix("unet."): v for name, v in peft(lora).items()},
                  tmp_path / f"{k}.safetensors")
        for (part, name), pair in lora.items():
            merge_by_hand(theirs[part].get_submodule(name), *pair, -2 if k else 1)
    name = base.name
    said = ppdd.merge_loras(base, [f"{tmp_path}/0.safetensors", f"{tmp_path}/1.safetensors:-2"])
    check_merged(base, theirs)
    assert said == [f"LoRA: {tmp_path}/0.safetensors, merged at 1",
                    f"LoRA: {tmp_path}/1.safetensors, merged at -2; 1 of its tensors have no "
                    "place here: unet.colour.lora_A.weight"]
    assert base.name == f"{name}+0+1" and len(base.loras) == 2


def test_a_lora_in_half_precision_is_merged_in_float32(base, theirs, tmp_path):
    lora = lora_of(theirs, "to_v$")
    save_file({k: v.half() for k, v in kohya(lora).items()}, tmp_path / "l.safetensors")
    base.unet.bfloat16()
    key, (down, up) = next(iter(lora.items()))
    layer = theirs["unet"].get_submodule(key[1])
    layer.weight.copy_(layer.weight.bfloat16())
    merge_by_hand(layer, down.half().float(), up.half().float(), 1 / RANK)
    merge_lora(base.unet, base.text, tmp_path / "l.safetensors")
    ours = base.unet.input_blocks[1][1].transformer_blocks[0].attn1.to_v.weight
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, layer.weight.bfloat16())


def pair_of(name: str, down: tuple, up: tuple, *suffixes: str) -> dict:
    suffixes = suffixes or (".lora_down.weight", ".lora_up.weight")
    return {name + suffix: torch.ones(shape) for suffix, shape in zip(suffixes, (down, up))}


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
GOOD = pair_of(TO_K, (4, 32), (32, 4))
WRONG_LORAS = {
    "base of another shape .* for Stable Diffusion 1.5": pair_of(TO_K, (4, 2048), (32, 4)),  # XL's
    "base of another": pair_of(TO_K, (4, 1024), (32, 4)),                              # SD 2's
    "of another shape": pair_of(TO_K, (0, 32), (32, 0)),
    "another": pair_of(TO_K, (32,), (32,)),
    "Stable Diffusion XL: pass one for 1.5": pair_of("lora_te2_text_model_x", (4, 8), (8, 4)),
    "holds no LoRA for": pair_of("transformer.single_blocks.0.linear", (4, 8), (8, 4)),
    "holds no LoRA": {"model.diffusion_model.out.2.bias": torch.ones(4)},
    "not finite": {k: v * torch.nan for k, v in GOOD.items()},
    "not a plain LoRA": GOOD | {TO_K + ".dora_scale": torch.ones(32)},
    "not a plain": {TO_K + ".hada_w1_a": torch.ones(32, 4)},
    "an alpha that can't be read": GOOD | {TO_K + ".alpha": torch.ones(2)},
}


@pytest.mark.parametrize("sentence", WRONG_LORAS)
def test_a_lora_of_another_kind_or_base_is_refused_whole(base, theirs, tmp_path, sentence):
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    good = peft(lora_of({"unet": theirs["unet"]}, "attn1.to_q$")) if "another" in sentence else {}
    save_file(good | WRONG_LORAS[sentence], tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=f"bad.safetensors .*{sentence}") as error:
        merge_lora(base.unet, base.text, tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value) and not base.loras
    assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())


@pytest.mark.parametrize("given, file, scale", [
    ("a.safetensors", "a.safetensors", 1), ("a.safetensors:0.5", "a.safetensors", 0.5),
    ("a:b.safetensors:-1", "a:b.safetensors", -1), ("C:/a.safetensors", "C:/a.safetensors", 1),
    ("a:b", "a:b", 1), ("~no-one/a:2", "~no-one/a", 2)])
def test_the_scale_of_a_lora(given, file, scale):
    path, factor = lora_scale(given)
    assert (str(path), factor) == (file, scale)


@pytest.mark.parametrize("given", ["", ":2", "a:nan", "a:inf", "a:1e9", "a:-101"])
def test_an_absurd_scale_of_a_lora(given):
    with pytest.raises(CheckpointError, match="FILE or FILE:scale"):
        lora_scale(given)


def test_a_guide_plugs_into_a_base_with_a_lora(here, toys, theirs, capsys):  # noqa: F811
    lora = lora_of({"unet": theirs["unet"]}, "to_(q|out.0)$")
    save_file(kohya(lora), "style.safetensors")
    plain, = command("--steps 2 --prompt tree")
    digest = ppdd.fingerprint(toys / "toy.safetensors")
    styled = command("--steps 2 --prompt tree --lora style.safetensors:0")[1]
    assert difference(plain, styled) == 0
    styled = command("--steps 2 --prompt tree --lora style.safetensors:5")[2]
    assert difference(plain, styled) > 10
    said = capsys.readouterr().out
    assert "LoRA: style.safetensors, merged at 5\n" in said and "toy+style as it is" in said
    text = Image.open(styled).text
    named = f'Model hash: {digest[:10]}, Model: toy+style, LoRA: "style:5", Guide: '
    assert named in text["parameters"]
    again = sample.Config(**json.loads(text["ppdd"]))
    sample.run(replace(again, out="again"))
    assert difference(styled, Path("again/000-tree.png")) == 0
    hashes = {ppdd.fingerprint(toys / "toy.safetensors", loras) for loras in
              ((), [(Path("style.safetensors"), 1.0)], [(Path("style.safetensors"), 0.5)])}
    assert len(hashes) == 3 and digest in hashes


# ------------------------------------------------------------------------------------- guides out

TRAILING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}


def their_unet(unet) -> nn.Module:
    """diffusers' UNet with the weights of ours."""
    theirs = diffusers_unet(unet.config)
    prefixed = {"model.diffusion_model." + k: v for k, v in unet.state_dict().items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(prefixed, dict(theirs.config)))
    return theirs.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mini():
    return ppdd.load_base(ppdd.MINI)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the miniature's full guide as a ControlNet."""
    folder = tmp_path_factory.mktemp("exported")
    sample.main(["--guide", "full", "--weights", "mini", "--export", str(folder)])
    return folder


BUNDLED = ppdd.MINI.parent / "guides"
PROMPTS = ["a big red boat on the sea at sunset", "a tiny yellow tree in the snow"]


def ours_of(mini, name: str, g: float, steps: int = 8):
    guide = ppdd.load_guide(BUNDLED / f"{name}.safetensors", mini.unet.config)
    z, c = ppdd.noise([3, 4], (4, 8, 8)), mini.embed(PROMPTS)
    return ppdd.sample(mini.unet, z, c, g, steps, guide), z, c, guide


@pytest.mark.parametrize("size, aware", [("mini", 2), ("sd15", 12)])
def test_the_features_that_can_know_the_prompt_are_as_many_as_the_readme_says(mini, size, aware):
    config = mini.unet.config if size == "mini" else UNetConfig(
        model_channels=32, context_dim=64, norm_groups=8)
    guide, g, t = ppdd.build_guide(config, ppdd.GuideConfig(kind="full")), 8.0, torch.tensor([500])
    for p in guide.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z = ppdd.noise([3], (4, 16, 16))
    told = [guide(torch.tensor([g]), None, c[None], z, t) for c in mini.embed(PROMPTS)]
    assert sum(not torch.equal(a, b) for a, b in zip(*told)) == aware


@pytest.mark.parametrize("g", [8.0, 3.3])
@pytest.mark.parametrize("single", [False, True], ids=["folder", "single"])
def test_an_exported_guide_is_a_controlnet(mini, exported, tmp_path, g, single):
    """diffusers' pipeline with guidance off and a plain grey picture gives our latents."""
    expected, z, c, _ = ours_of(mini, "full-8", g)
    if single:
        shutil.copy(exported / "config.json", tmp_path)
        control = ControlNetModel.from_single_file(
            exported / "full-8-controlnet.safetensors", config=str(tmp_path), local_files_only=True)
    else:
        control = ControlNetModel.from_pretrained(exported, torch_dtype=torch.float32)
    vae = AutoencoderKL(block_out_channels=[4] * 4, norm_num_groups=4, layers_per_block=1,
                        down_block_types=["DownEncoderBlock2D"] * 4,      # only its 8 is asked for
                        up_block_types=["UpDecoderBlock2D"] * 4)
    pipe = StableDiffusionControlNetPipeline(
        vae, None, None, their_unet(mini.unet), control, DDIMScheduler(**TRAILING), None, None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt_embeds=c, image=torch.full((1, 3, 64, 64), g / 10), guidance_scale=1.0,
                  num_inference_steps=8, latents=z, height=64, width=64, output_type="latent")
    assert disagreement(theirs.images, expected) < 1e-4
    if g == 8.0:
        grey = Image.new("RGB", (64, 64), (204, 204, 204))
        theirs = pipe(prompt_embeds=c, image=grey, guidance_scale=1.0, latents=z, height=64,
                      width=64, num_inference_steps=8, output_type="latent")
        assert disagreement(theirs.images, expected) < 1e-4


def test_an_exported_guide_has_the_names_that_other_tools_look_for(exported):
    """At SD 1.5's size they are those of the ControlNet that everyone has."""
    single = load_file(exported / "full-8-controlnet.safetensors")
    assert {v.dtype for v in single.values()} == {torch.float16}
    assert all(name.startswith("control_model.") for name in single)
    assert "control_model.zero_convs.0.0.weight" in single
    assert "control_model.input_hint_block.14.bias" in single
    with torch.device("meta"):
        guide, theirs = ppdd.FullGuide(UNetConfig()), ControlNetModel(cross_attention_dim=768)
        config = sample._controlnet_config(guide)
        same = ControlNetModel.from_config(config)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (theirs, same)]
    assert shapes[0] == shapes[1]
    assert theirs.config.attention_head_dim == config["attention_head_dim"]


def test_an_export_is_rounded_once(exported, monkeypatch):
    monkeypatch.setattr(ppdd, "auto_dtype", lambda device: "bf16")
    sample.main(["--guide", "full", "--weights", "mini", "--export", str(exported / "again")])
    guide = load_file(BUNDLED / "full-8.safetensors")
    for folder in (exported, exported / "again"):
        single = load_file(folder / "full-8-controlnet.safetensors")
        assert all(torch.equal(single[f"control_model.{k}"], v) for k, v in guide.items())


def test_only_a_full_guide_is_exported(here, capsys):  # noqa: F811
    said = refusal(capsys, "--guide", "tiny", "--export", "there")
    assert "not a full guide" in said and not list(Path("there").iterdir())
    assert not Path("out").exists()


@pytest.mark.parametrize("name, steps", [("tiny-8", 8), ("tiny", 50)])
def test_a_tiny_guide_in_diffusers_own_loop(mini, name, steps):
    """With the scheduler that the README makes of what SD 1.5 comes with."""
    expected, z, c, guide = ours_of(mini, name, 6.0, steps)
    shipped = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                            skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    scheduler = DDIMScheduler.from_config(shipped.config, timestep_spacing="trailing",
                                          set_alpha_to_one=True, clip_sample=False)
    unet = their_unet(mini.unet)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            extra = ppdd.residuals(guide, unet, 6.0, t, c)
            eps = unet(z, t, encoder_hidden_states=c, **extra).sample
            z = scheduler.step(eps, t, z).prev_sample
    assert disagreement(z, expected) < 1e-4


def test_a_guide_file_is_told_about(here, toys, capsys):  # noqa: F811
    sample.main(["--about", "guides/toy/full-8.safetensors"])
    said = capsys.readouterr().out
    about = json.loads(said)
    assert about["base"] == "toy" and about["guide"]["kind"] == "full" and about["steps"] == 8
    assert about["base_shape"] == json.loads(json.dumps(asdict(UNET)))
    assert said == json.dumps(about, indent=1, sort_keys=True) + "\n"
    assert not Path("out").exists()
    assert "is not a guide" in refusal(capsys, "--about", f"{toys}/toy.safetensors")
    assert "does not exist" in refusal(capsys, "--about", "nowhere.safetensors")


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_a_guide_says_both_shapes_on_another_base(tmp_path, kind):
    path = write_guide(tmp_path / "guide.safetensors", UNET, kind, 8)
    assert ppdd.read_shape(path) == UNET
    other = replace(UNET, context_dim=48, num_heads=8)
    with pytest.raises(CheckpointError, match=r"another size \(num_heads 4 and not 8, context_dim "
                                              r"32 and not 48\)"):
        ppdd.load_guide(path, other)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    del metadata["unet_config"]                                             # as older files are
    save_file(load_file(path), path, metadata)
    assert ppdd.read_shape(path) is None and ppdd.load_guide(path, UNET).guide_config.kind == kind
    with pytest.raises(CheckpointError, match="another size: use it"):
        ppdd.load_guide(path, other)


# ----------------------------------------------------------------------------------- whole folders

@pytest.mark.parametrize("options", [
    {}, {"variant": "fp16"}, {"max_shard_size": "200KB"},
    {"variant": "fp16", "max_shard_size": "200KB"}], ids=["plain", "fp16", "shards", "fp16-shards"])
def test_a_folder_that_a_pipeline_saved(theirs, tmp_path, options):
    vae = randomised(lambda: diffusers_vae(VAE_CONFIG))
    pipe = StableDiffusionPipeline(vae, theirs["text_encoder"], None, theirs["unet"],
                                   DDIMScheduler(**TRAILING, steps_offset=1), None, None,
                                   requires_safety_checker=False)
    pipe.save_pretrained(tmp_path, **options)
    sharded = {p.parent.name for p in tmp_path.rglob("*.safetensors.index*.json")}
    assert sharded == ({"unet", "vae", "text_encoder"} if "max_shard_size" in options else set())
    assert ("variant" in options) == any(".fp16" in p.name for p in tmp_path.rglob("*"))
    check_merged(ppdd.Base(load_unet(tmp_path, config=UNET), None,
                           ppdd.load_text_encoder(tmp_path, config=TEXT), None, tmp_path), theirs)
    z, ours = noise(1, 4, 8, 8), ppdd.load_vae(tmp_path, config=VAE_CONFIG)
    assert disagreement(ours.decode(z), vae.decode(z / VAE_CONFIG.scale_factor).sample) < 1e-4


# ---------------------------------------------------------------------------------- damaged files

COUNTED = Counter()


def attempt(read: Callable[[], object]) -> str:
    """The one sentence with which reading ends, or "" where it does not; quick either way."""
    start, said = time.process_time(), ""
    try:
        read()
    except CheckpointError as error:
        said = str(error)
        assert said and "\n" not in said, said
    assert time.process_time() - start < 2
    COUNTED["refused" if said else "read"] += 1
    return said


PARTS = {                                                       # each read from a base, and used
    "unet_config": lambda path: ppdd.load_unet(path)(
        torch.zeros(1, 4, 8, 8), torch.tensor([9]), torch.zeros(1, 8, 32)),
    "vae_config": lambda path: ppdd.load_vae(path).decode(torch.zeros(1, 4, 4, 4)),
    "text_config": lambda path: ppdd.load_text_encoder(path)(torch.zeros(1, 8, dtype=torch.int64))}


@torch.inference_mode()
def whole(path: Path) -> None:
    for read in PARTS.values():
        read(path)


def plugged(path: Path) -> None:
    """Reads a guide, finds it for the base and uses it."""
    guide = ppdd.load_guide(path, UNET)
    _, about = ppdd.read_about(path)
    sample.describe(path, about, ppdd.Base(None, None, None, None, path))
    sample.far(about, 8), sample.about(path)
    with torch.inference_mode():
        z = torch.zeros(1, 4, 8, 8)
        guide(torch.ones(1), torch.zeros(1, 128), torch.zeros(1, 77, 32), z)


@pytest.fixture(scope="module")
def victims(tmp_path_factory, folder):
    """One good file of each kind, as bytes, and what reads it."""
    home = tmp_path_factory.mktemp("victims")
    small = replace(TEXT, vocab_size=64)
    write_base(home / "base.safetensors", UNET, VAE_CONFIG, small, torch.float16)
    write_guide(home / "guide.safetensors", UNET, "tiny", 8)
    lora = lora_of({"unet": randomised(lambda: diffusers_unet(UNET))}, "attn2.to_[qk]$")
    save_file(kohya(lora), home / "lora.safetensors", {"lora_adapter_metadata": "{}"})
    base = ppdd.Base(load_unet(folder, config=UNET), None,
                     ppdd.load_text_encoder(folder, config=TEXT), None, folder)
    readers = {"base": whole, "guide": plugged,
               "lora": lambda path: merge_lora(base.unet, base.text, path)}
    for kind, read in readers.items():
        read(home / f"{kind}.safetensors")                                  # good, to begin with
    good = {kind: ((home / f"{kind}.safetensors").read_bytes(), read)
            for kind, read in readers.items()}
    return good | {part: (good["base"][0], read) for part, read in PARTS.items()}


KINDS = ["base", "guide", "lora"]
each = pytest.mark.parametrize("kind", KINDS)


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:size]), data[size:]


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.fixture
def try_bytes(victims, tmp_path):
    """Writes bytes in place of a good file, and returns what reading them comes to."""
    def attempt_bytes(kind: str, data: bytes) -> str:
        path = tmp_path / "bad.safetensors"
        path.write_bytes(data)
        said = attempt(lambda: victims[kind][1](path))
        assert not said or "bad.safetensors" in said
        return said
    return attempt_bytes


@each
def test_truncated_anywhere(victims, try_bytes, kind):
    data, _ = victims[kind]
    size, rng = 8 + int.from_bytes(data[:8], "little"), random.Random(0)
    cuts = [*range(9), *(rng.randrange(8, size) for _ in range(20)), size - 1, size, size + 1,
            *(rng.randrange(size, len(data)) for _ in range(20)), len(data) - 1]
    for cut in cuts:
        assert "download it again" in try_bytes(kind, data[:cut]), cut
        assert try_bytes(kind, data[:cut] + bytes(len(data) - cut) if cut < size else data + b"x")


@each
def test_a_header_with_a_flipped_bit(victims, try_bytes, kind):
    """Most are refused; some say the same as before, or another number that is as good."""
    data, _ = victims[kind]
    size, rng = 8 + int.from_bytes(data[:8], "little"), random.Random(1)
    refused = 0
    for _ in range(60 if kind == "base" else 150):
        at, bit = rng.randrange(size), 1 << rng.randrange(8)
        refused += bool(try_bytes(kind, data[:at] + bytes([data[at] ^ bit]) + data[at + 1:]))
    assert refused > 30


@each
@pytest.mark.parametrize("length", [0, 1, 7, 99_999_999, 100_000_001, 2**31, 2**32, 2**63 - 1,
                                    2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header(victims, try_bytes, kind, length):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert try_bytes(kind, length.to_bytes(8, "little") + victims[kind][0][8:])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024     # KiB


ENTRIES = {
    "whole numbers": lambda e: e | {"dtype": {"F16": "I16", "F32": "I32"}[e["dtype"]]},
    "no such type": lambda e: e | {"dtype": "F7"},
    "a type that is none": lambda e: e | {"dtype": 3},
    "flat": lambda e: e | {"shape": [math.prod(e["shape"])]},
    "backwards": lambda e: e | {"shape": [1, *e["shape"]]},
    "negative": lambda e: e | {"shape": [-n for n in e["shape"]]},
    "enormous": lambda e: e | {"shape": [2**40, 2**40]},
    "no numbers": lambda e: e | {"shape": ["a"]},
    "outside": lambda e: e | {"data_offsets": [0, 2**60]},
    "turned round": lambda e: e | {"data_offsets": e["data_offsets"][::-1]},
    "incomplete": lambda e: {"dtype": e["dtype"]},
    "no entry": lambda e: None,
    "a list": lambda e: [1, 2, 3],
}


@each
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_entry_of_the_header(victims, try_bytes, kind, entry):
    header, body = header_of(victims[kind][0])
    for name in [n for n in header if n.endswith("weight")][::40]:
        said = try_bytes(kind, with_header(header | {name: ENTRIES[entry](header[name])}, body))
        assert said or (kind, entry) == ("lora", "whole numbers")


@each
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite(victims, try_bytes, kind, number):
    """One in the middle of a tensor, of each of several."""
    header, body = header_of(victims[kind][0])
    names = [n for n, e in header.items() if n != "__metadata__" and e["dtype"] in ("F16", "F32")]
    for name in names[::max(1, len(names) // 8)]:
        start, end = header[name]["data_offsets"]
        width = 2 if header[name]["dtype"] == "F16" else 4
        at = start + (end - start) // width // 2 * width
        bad = struct.pack("<e" if width == 2 else "<f", number)
        said = try_bytes(kind, with_header(header, body[:at] + bad + body[at + width:]))
        assert "not finite" in said, name


ABSURD = [0, -1, 3, 10**9, 10**30, 1.5, math.nan, math.inf, "x", "", None, True, [], [1], [0, 0],
          [10**9] * 2, [1] * 100, {}, {"x": 1}]


@pytest.mark.parametrize("part", ["unet_config", "vae_config", "text_config"])
def test_absurd_sizes_in_a_base(victims, try_bytes, part):
    header, body = header_of(victims["base"][0])
    metadata = header["__metadata__"]
    sizes = json.loads(metadata[part])
    for name, value in ((n, v) for n in sizes for v in ABSURD if v != sizes[n]):
        said = try_bytes(part, with_header(
            header | {"__metadata__": metadata | {part: json.dumps(sizes | {name: value})}}, body))
        assert said or name == "scale_factor", (name, value)      # no shape shows it
    for stored in ("", "{", "null", "3", "[" * 5000, "9" * 5000, '{"x": 1}'):
        assert try_bytes(part, with_header(
            header | {"__metadata__": metadata | {part: stored}}, body))


@pytest.mark.parametrize("part", ["guide", "about", "unet_config"])
def test_absurd_metadata_in_a_guide(victims, try_bytes, part):
    header, body = header_of(victims["guide"][0])
    metadata = header["__metadata__"]
    values = json.loads(metadata[part])
    changed = [json.dumps(values | {n: v}) for n in values for v in ABSURD]
    for stored in [*changed, "", "{", "null", "[]", "[" * 5000, "9" * 5000]:
        try_bytes("guide", with_header(header | {"__metadata__": metadata | {part: stored}}, body))


@pytest.mark.parametrize("stored", [json.dumps(v) for v in (
    {"unet.lora_alpha": "x"}, {"unet.lora_alpha": []}, {"unet.alpha_pattern": 3}, [], 3,
    {"unet.alpha_pattern": {"to_q": None}}, {"unet.lora_alpha": math.nan})] + ["", "{", "[" * 5000])
def test_absurd_metadata_in_a_lora(victims, try_bytes, stored):
    header, body = header_of(victims["lora"][0])
    header = {k: v for k, v in header.items() if not k.endswith(".alpha")}
    tensors = {}
    for name, entry in header.items():                          # packed anew, without the alphas
        if name != "__metadata__":
            raw = body[slice(*entry["data_offsets"])]
            tensors[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(
                entry["shape"])
    data = save_bytes(tensors, {"lora_adapter_metadata": stored})
    assert try_bytes("lora", data)


@each
def test_what_is_no_file(victims, tmp_path, monkeypatch, kind):
    read = victims[kind][1]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name in ("pipe", "loop", "folder.safetensors", "file", "file/below", "nowhere", "x" * 300,
                 "/dev/null", "/dev/zero", "nul\0"):
        assert attempt(lambda name=name: read(tmp_path / name)), name
    (tmp_path / "mine").write_bytes(victims[kind][0])
    (tmp_path / "mine").chmod(0)

    def refuse(*args, **kwargs):                                      # root may read what it likes
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(unet, "safe_open", refuse)
    assert "Permission denied" in attempt(lambda: read(tmp_path / "mine"))


def test_a_damaged_index_of_shards(tmp_path):
    randomised(lambda: diffusers_unet(UNET)).save_pretrained(tmp_path, max_shard_size="100KB")
    index, = tmp_path.glob("*.index.json")
    good = json.loads(index.read_text())
    names = sorted({*good["weight_map"].values()})
    for bad in (b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"[" * 5000, *(json.dumps(v).encode()
                for v in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}},
                          {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": []}},
                          {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": names[0]}},
                          {"weight_map": {"a": "none.safetensors"}}))):
        index.write_bytes(bad)
        assert attempt(lambda: load_unet(tmp_path, config=UNET)), bad
    index.write_text(json.dumps(good))
    (tmp_path / names[0]).write_bytes((tmp_path / names[0]).read_bytes()[:-1])
    assert "cut short" in attempt(lambda: load_unet(tmp_path, config=UNET))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, legacy, nested):
    """The command of the sentence makes a file that is read."""
    unet = randomised(lambda: UNet(UNET))
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    path = tmp_path / "old model.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, path,
               _use_new_zipfile_serialization=not legacy)
    said = attempt(lambda: load_unet(path, config=UNET))
    assert "a pickle, which can run code when opened" in said
    command = re.search('python -c "(.*)"$', said)[1]
    exec(command, {})
    back = load_unet(f"{path}.safetensors", config=UNET)
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in back.state_dict().items())


@pytest.mark.parametrize("flag, kind", [("--weights", "base"), ("--guide", "guide"),
                                        ("--lora", "lora"), ("--about", "guide")])
def test_a_damaged_file_on_the_command_line(here, victims, capsys, flag, kind):  # noqa: F811
    data = victims[kind][0]
    for k, bad in enumerate((b"", data[:7], data[:50], data[:-1], b"<html>", b"PK\x03\x04",
                             b"\x80\2", b"\xff" * 8 + data[8:])):
        Path(f"{k}.safetensors").write_bytes(bad)
        said = refusal(capsys, flag, f"{k}.safetensors", "--prompt", "x")
        assert f"{k}.safetensors" in said
    assert not [*Path().glob("out/*")]


def test_so_many_damaged_files_were_tried(request):
    """Where all of them were asked for."""
    chosen = sum(item.path == request.path for item in request.session.items) < 150
    assert chosen or COUNTED["refused"] > 1200 and COUNTED["read"] > 50, COUNTED
