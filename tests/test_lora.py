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
from safetensors.torch import save_file
from torch import nn
from toys import command, difference, here, toys  # noqa: F401 (fixtures)

import sample
from support.base import Base, base_sha256, merge_loras
from support.checkpoint import CheckpointError
from support.cli import BadInput
from support.lora import merge_lora, parse_lora


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
    assert merge_lora(base.unet, base.text, tmp_path / "style.safetensors", 0.7) == []
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
    assert messages == [f"LoRA: {tmp_path}/0.safetensors, merged at 1",
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
