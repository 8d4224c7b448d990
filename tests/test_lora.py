"""support/lora.py: LoRA files of every spelling, merged as the well-known libraries mean them."""

# ruff: noqa: F811 (the fixtures' names)

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import disagreement, noise
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from loras import (  # noqa: F401 (fixtures)
    RANK,
    base,
    folder,
    full_name,
    kohya,
    lora_of,
    peft,
    theirs,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from toys import UNET, command, difference, here, toys  # noqa: F401 (fixtures)

import sample
from support.base import Base, base_sha256, merge_loras
from support.checkpoint import CheckpointError, rename
from support.cli import BadInput
from support.lora import merge_lora, parse_lora
from unet import folder_names


def merge_by_hand(layer: nn.Module, down, up, factor: float) -> None:
    """A layer followed by another is one whose weights are these sums, whatever the kernel."""
    sums = "or,ri->oi" if down.ndim == 2 else "orxy,rikl->oikl"
    layer.weight += factor * torch.einsum(sums, up, down)


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


@torch.inference_mode()
def check_merged(base: Base, theirs: dict) -> None:
    z, t, c = noise(2, 4, 16, 16), torch.tensor([999, 20]), noise(2, 77, 32, seed=2)
    assert disagreement(base.unet(z, t, c), theirs["unet"](z, t, c).sample) < 1e-4
    ids = torch.arange(77)[None]
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
    notes = [] if spelling == "kohya" else ["no alpha found, strength 1"]
    assert merge_lora(base.unet, base.text, tmp_path / "style.safetensors", 0.7) == notes
    check_merged(base, theirs)
    changed = [not torch.equal(v, before["unet"][k]) for k, v in base.unet.state_dict().items()]
    assert sum(changed) == sum(part == "unet" for part, _ in lora)


def test_diffusers_takes_kohyas_and_the_old_names_for_the_same(theirs):
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
        merge_by_hand(theirs[part].get_submodule(name), *pair, alpha / RANK ** (0.5 if root else 1))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, layers["unet"], layers["text_encoder"],
        unet_lora_adapter_metadata=alphas["unet"],
        text_encoder_lora_adapter_metadata=alphas["text_encoder"])
    assert merge_lora(base.unet, base.text, tmp_path / "pytorch_lora_weights.safetensors") == []
    check_merged(base, theirs)


def test_loras_add_up_and_are_reported(base, theirs, tmp_path):
    for k, only in enumerate(("attn2.to_q$", "(attn2.to_q|fc1)$")):
        lora = lora_of(theirs, only)
        save_file(peft(lora) | {"unet.colour.lora_A.weight": torch.ones(1, 1)} if k else
                  {name.removeprefix("unet."): v for name, v in peft(lora).items()},
                  tmp_path / f"{k}.safetensors")
        for (part, name), pair in lora.items():
            merge_by_hand(theirs[part].get_submodule(name), *pair, -2 if k else 1)
    name = base.name
    messages = merge_loras(base, [f"{tmp_path}/0.safetensors", f"{tmp_path}/1.safetensors:-2"])
    check_merged(base, theirs)
    assert messages == [
        f"LoRA: {tmp_path}/0.safetensors, merged at 1; no alpha found, strength 1",
        f"LoRA: {tmp_path}/1.safetensors, merged at -2; no alpha found, strength 1; "
        "names not known: unet.colour.lora_A.weight"]
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


# ------------------------------------------------------------------------------- peft's adapters

PEFT = {"plain": {"lora_alpha": 4}, "alpha": {"lora_alpha": 16},
        "rank-stabilised": {"lora_alpha": 8, "use_rslora": True},
        "patterns": {"lora_alpha": 8, "rank_pattern": {"to_q": 2},
                     "alpha_pattern": {"^up_blocks.0.*to_q": 2, "attn2.to_k": 3, "to_[kv]": 1,
                                       "0": 5, "out.0": 7}},
        "transposed": {"lora_alpha": 8, "fan_in_fan_out": True}}
PARTS = {"unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1"],
         "text_encoder": ["q_proj", "k_proj", "fc1"]}


@pytest.fixture
def adapter(theirs, tmp_path):
    """Has peft save an adapter with settings, merges it into `theirs`, and returns its folder."""
    peft_library = pytest.importorskip("peft")

    @torch.enable_grad()
    def make(part: str = "unet", **settings) -> Path:
        config = peft_library.LoraConfig(r=4, target_modules=PARTS[part], **settings)
        model = peft_library.get_peft_model(theirs[part], config)
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.data = noise(*p.shape, seed=i) * 0.1
        model.save_pretrained(tmp_path / part)
        theirs[part] = model.merge_and_unload()
        return tmp_path / part
    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", PEFT)
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(base, theirs, adapter, settings):
    folder = adapter(**PEFT[settings])
    file = folder / "adapter_model.safetensors"
    assert merge_lora(base.unet, base.text, file if settings == "plain" else folder) == []
    check_merged(base, theirs)


@pytest.mark.parametrize("inner", ["text_model.", ""])
def test_peft_s_adapter_of_the_text_encoder(base, theirs, adapter, inner):
    """Of both kinds of names: transformers 5 left out "text_model."."""
    file = adapter("text_encoder", lora_alpha=16) / "adapter_model.safetensors"
    tensors = {name.replace("text_model.", "").replace("model.model.", f"model.model.{inner}"): t
               for name, t in load_file(file).items()}
    save_file(tensors, file)
    assert merge_lora(base.unet, base.text, file) == []
    check_merged(base, theirs)


def test_an_adapter_without_its_settings_has_strength_1(base, theirs, adapter, tmp_path):
    folder = adapter(lora_alpha=4)                                          # of rank 4
    (folder / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    (folder / "adapter_model.safetensors").rename(tmp_path / "renamed.safetensors")
    messages = merge_loras(base, [f"{tmp_path}/renamed.safetensors"])
    assert messages == [f"LoRA: {tmp_path}/renamed.safetensors, merged at 1; no alpha found, "
                        "strength 1"]
    check_merged(base, theirs)


@pytest.mark.parametrize("key, value", [
    ("use_dora", True), ("peft_type", "LOHA"), ("bias", "all"), ("modules_to_save", ["conv_in"]),
    ("init_lora_weights", "pissa_niter_4")])
def test_settings_of_peft_that_are_no_plain_lora_s_are_refused(base, tmp_path, key, value):
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "lora_alpha": 8, key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as error:
        merge_lora(base.unet, base.text, tmp_path)
    assert f"adapter_config.json has {key} {json.dumps(value)}" in str(error.value)


@pytest.mark.parametrize("settings", ["{", '{"lora_alpha": "x"}', '{"lora_alpha": null}',
                                      '{"alpha_pattern": {"(": 1}}', '{"alpha_pattern": [1]}'])
def test_damaged_settings_of_peft(base, theirs, tmp_path, settings):
    lora = lora_of({"unet": theirs["unet"]}, "attn1.to_q$")
    save_file(peft(lora), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match="can't be read"):
        merge_lora(base.unet, base.text, tmp_path)


def test_the_folder_of_a_lora(base, tmp_path):
    with pytest.raises(CheckpointError, match="holds no adapter_model.safetensors or pytorch_lora"):
        merge_lora(base.unet, base.text, tmp_path)
    save_file(GOOD, tmp_path / "pytorch_lora_weights.safetensors")
    merge_loras(base, [f"{tmp_path}:0.5"])
    assert base.loras == ((tmp_path, 0.5),)
    base.path = tmp_path / "base.safetensors"
    base.path.touch()
    digest = base.sha256
    (tmp_path / "adapter_config.json").write_text("{}")
    assert base.sha256 == digest                # it is read beside adapter_model.safetensors only
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    digest = base.sha256
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4}')
    assert base.sha256 != digest


# ------------------------------------------------------------------------------- other names


def comfy(name: str) -> str:
    """A layer's name in the single file, as ComfyUI saves it."""
    part, _, name = name.partition(".")
    if part == "text_encoder":
        return f"text_encoders.clip_l.transformer.{name}"
    ours = rename({name + ".": None}, folder_names(UNET))
    return "diffusion_model." + next(iter(ours))[:-1]


OTHER_NAMES = {
    "comfy": comfy, "lycoris": lambda name: "lycoris_" + name.partition(".")[2].replace(".", "_")}


@pytest.mark.parametrize("spelling", OTHER_NAMES)
def test_a_lora_under_other_prefixes_is_merged(base, theirs, tmp_path, spelling):
    lora, tensors = lora_of(theirs, ""), {}
    for (part, name), (down, up) in lora.items():
        layer = OTHER_NAMES[spelling](full_name(part, name))
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up,
                    f"{layer}.alpha": torch.tensor(2.0)}
        merge_by_hand(theirs[part].get_submodule(name), down, up, 2 / RANK)
    save_file(tensors, tmp_path / "l.safetensors")
    assert merge_lora(base.unet, base.text, tmp_path / "l.safetensors") == []
    check_merged(base, theirs)


def test_full_differences_are_added_with_their_biases(base, theirs, tmp_path):
    """As LyCORIS saves full training, and differences of norms."""
    tensors = {}
    for part, network in theirs.items():
        for name, layer in network.named_modules():
            if re.search("(conv1|to_out.0|norm1|fc1|proj_in)$", name):
                flat = full_name(part, name).replace("text_encoder", "te").replace(".", "_")
                kinds = ("w_norm", "b_norm") if "norm" in name else ("diff", "diff_b")
                for k, (kind, p) in enumerate(zip(kinds, (layer.weight, layer.bias))):
                    change = noise(*p.shape, seed=len(tensors) + k) * 0.1
                    tensors[f"lora_{flat}.{kind}"] = change
                    p += 0.5 * change
    assert len(tensors) > 20
    save_file(tensors, tmp_path / "full.safetensors")
    assert merge_lora(base.unet, base.text, tmp_path / "full.safetensors", 0.5) == []
    check_merged(base, theirs)


def test_names_that_are_not_known_are_counted_and_the_first_are_named(base, tmp_path):
    others = {f"unet.extra_{i}.lora_A.weight": torch.ones(1, 1) for i in range(5)}
    save_file(GOOD | others | {TO_K + ".diff_b": torch.ones(32)}, tmp_path / "l.safetensors")
    notes = merge_lora(base.unet, base.text, tmp_path / "l.safetensors")
    assert len(notes) == 2 and notes[1].startswith("names not known: ")
    assert notes[1].endswith(", … (6 in all)") and notes[1].count(", ") == 3


def pair_of(name: str, down: tuple, up: tuple, *suffixes: str) -> dict:
    suffixes = suffixes or (".lora_down.weight", ".lora_up.weight")
    return {name + suffix: torch.ones(shape) for suffix, shape in zip(suffixes, (down, up))}


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
GOOD = pair_of(TO_K, (4, 32), (32, 4))
WRONG_LORAS = {
    "base of another shape .* for Stable Diffusion 1.5": pair_of(TO_K, (4, 2048), (32, 4)),  # XL's
    "base of another": pair_of(TO_K, (4, 1024), (32, 4)),                              # SD 2's
    "of another shape": pair_of(TO_K, (0, 32), (32, 0)),
    "LoRA for a base of another shape": {TO_K + ".diff": torch.ones(32, 16)},
    "of another shape .layer": {TO_K + ".lora_down.weight": torch.ones(()),
                                TO_K + ".lora_up.weight": torch.ones(32, 4)},
    "numbers that are not finite": {TO_K + ".diff": torch.full((32, 32), torch.inf)},
    "another": pair_of(TO_K, (32,), (32,)),
    "Stable Diffusion XL: pass one for 1.5": pair_of("lora_te2_text_model_x", (4, 8), (8, 4)),
    "names not known: transformer.*, transformer.*lora_up.weight.: pass one":
        pair_of("transformer.single_blocks.0.linear", (4, 8), (8, 4)),
    "holds no LoRA": {"model.diffusion_model.out.2.bias": torch.ones(4)},
    "not finite": {k: v * torch.nan for k, v in GOOD.items()},
    "not a plain LoRA": GOOD | {TO_K + ".dora_scale": torch.ones(32)},
    "not a plain": {TO_K + ".hada_w1_a": torch.ones(32, 4)},
    "an alpha that can't be read": GOOD | {TO_K + ".alpha": torch.ones(2)},
}


def test_a_lora_for_v_prediction_is_refused(base, tmp_path):
    save_file(GOOD, tmp_path / "v.safetensors", {"ss_v_parameterization": "True"})
    with pytest.raises(CheckpointError, match="metadata of .*v.safetensors has ss_v_param"):
        merge_lora(base.unet, base.text, tmp_path / "v.safetensors")


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
    path, factor = parse_lora(given)
    assert (str(path), factor) == (file, scale)


@pytest.mark.parametrize("given", ["", ":2", "a:nan", "a:inf", "a:1e9", "a:-101"])
def test_an_absurd_scale_of_a_lora(given):
    with pytest.raises(BadInput, match="FILE or FILE:scale"):
        parse_lora(given)


# ------------------------------------------------------------------------------- in an image


def test_a_guide_plugs_into_a_base_with_a_lora(here, toys, theirs, capsys):
    lora = lora_of({"unet": theirs["unet"]}, "to_(q|out.0)$")
    save_file(kohya(lora), "style.safetensors")
    plain, = command("--steps 2 --prompt tree")
    digest = base_sha256(toys / "toy.safetensors")
    styled = command("--steps 2 --prompt tree --lora style.safetensors:0")[1]
    assert difference(plain, styled) == 0
    styled = command("--steps 2 --prompt tree --lora style.safetensors:5")[2]
    assert difference(plain, styled) > 10
    printed = capsys.readouterr().out
    assert "LoRA: style.safetensors, merged at 5\n" in printed
    assert "plugged into toy+style as it is" in printed
    text = Image.open(styled).text
    named = f'Model hash: {digest[:10]}, Model: toy+style, LoRA: "style:5", Guide: '
    assert named in text["parameters"]
    again = sample.Config(**json.loads(text["ppdd"]))
    sample.run(replace(again, out="again"))
    assert difference(styled, Path("again/000-tree.png")) == 0
    hashes = {base_sha256(toys / "toy.safetensors", loras) for loras in
              ((), [(Path("style.safetensors"), 1.0)], [(Path("style.safetensors"), 0.5)])}
    assert len(hashes) == 3 and digest in hashes


def test_a_file_without_a_single_layer_is_refused(tmp_path, base):
    save_file({"lora_unet_x.alpha": torch.ones(())}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="holds no LoRA for a base of this kind: pass one"):
        merge_lora(base.unet, base.text, tmp_path / "empty.safetensors")
