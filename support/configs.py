"""What the files beside the weights, and a file's own metadata, say about a checkpoint.

Sizes are obeyed. Whatever else changes what weights mean, and the code here has in one way only,
is refused: by file, key and value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from clip_text import LENGTH
from support.cli import BadInput

PASS_SD15 = "pass a Stable Diffusion 1.5 checkpoint"


class CheckpointError(BadInput):
    """A checkpoint that can't be used; the message says what it is and what to pass instead."""


# The settings that the networks here have in one way only. A key that is absent has that value in
# diffusers and transformers too.
_UNET_ONLY = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "center_input_sample": False,
    "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False, "mid_block_only_cross_attention": None,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
    "transformer_layers_per_block": 1, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "num_attention_heads": None, "dual_cross_attention": False, "class_embed_type": None,
    "addition_embed_type": None, "num_class_embeds": None, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1, "time_embedding_dim": None,
    "time_embedding_type": "positional", "time_embedding_act_fn": None, "timestep_post_act": None,
    "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "class_embeddings_concat": False, "cross_attention_norm": None}
_VAE_ONLY = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "shift_factor": None, "latents_mean": None,
    "latents_std": None, "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True, "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D"}
# The ids of special tokens are left out: they decide how CLIP pools, which has no use here, and
# Stable Diffusion 1.5's own file has wrong ones. The vocabulary is the tokenizer's.
_TEXT_ONLY = {
    "model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "vocab_size": 49408, "max_position_embeddings": LENGTH}
# The schedule of ppdd.py. How a sampler walks it (spacing, offset, clipping) is not the weights'.
_SCHEDULE_ONLY = {
    "prediction_type": "epsilon", "predict_epsilon": True, "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "trained_betas": None, "rescale_betas_zero_snr": False, "use_flow_sigmas": False}
_DIFFUSERS_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_OTHER_CONTEXT_DIMS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
_HAVE_OUR_BETAS = ("LCMScheduler", "TCDScheduler")          # where they are absent


def require_only(values: Mapping, only: Mapping, file: str | Path) -> None:
    """Raises CheckpointError for the first setting that has another value than the one in `only`.

    A list is equal to a value that all its entries have.
    """
    for key, wanted in only.items():
        entries = _entries(values.get(key, wanted))
        if any(entry != wanted and (entry or wanted) for entry in entries):
            raise CheckpointError(f"{file} has {key} {json.dumps(values[key])}, and only "
                                  f"{json.dumps(wanted)} can be used here: {PASS_SD15}")


def read_json(file: Path) -> dict:
    """The JSON object in a file, or {} where there is no file. Raises CheckpointError."""
    try:
        values = json.loads(file.read_bytes()) if file.is_file() else {}
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read ({error}): download it again") from error


def read_sizes(file: Path, part: str) -> str:
    """The sizes in a library's config.json, for `read_config`; part is the folder it belongs into.

    "{}" where there is no such file. Raises CheckpointError for what can't be obeyed.
    """
    if not file.is_file():
        return "{}"
    translate, values = _SIZES[part], read_json(file)
    try:
        return json.dumps(translate(values, file))
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{file} can't be read ({error}): download it again") from error


def refuse_other_context(width, source: str | Path) -> None:
    """Raises CheckpointError where the width of a prompt's states is that of another base."""
    if base := next((base for dim, base in _OTHER_CONTEXT_DIMS.items() if dim == width), None):
        raise CheckpointError(f"{source} is {base}: {PASS_SD15}")


def check_schedule(file: Path) -> None:
    """Raises CheckpointError where a scheduler_config.json says that weights predict no noise, or
    were trained on another schedule than Stable Diffusion's."""
    values = read_json(file)
    if values and values.get("_class_name") not in _HAVE_OUR_BETAS:
        values = _DIFFUSERS_BETAS | values
    require_only(values, _SCHEDULE_ONLY, file)


def _unet_sizes(values: dict, file: Path) -> dict:
    """diffusers' UNet; `use_linear_projection` is another shape of the same weights."""
    values = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 1280,
        "norm_num_groups": 32, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3} | values
    refuse_other_context(values["cross_attention_dim"], file)
    require_only(values, _UNET_ONLY, file)
    width, mult = _widths(values, file)
    attention = [kind.startswith("CrossAttn") for kind in values["down_block_types"]]
    for key, kind, levels in (("down_block_types", "DownBlock2D", attention),
                              ("up_block_types", "UpBlock2D", attention[::-1])):
        if values[key] != ["CrossAttn" * with_attention + kind for with_attention in levels]:
            raise CheckpointError(f"{file} has {key} {json.dumps(values[key])}, which can't be "
                                  f"used here: {PASS_SD15}")
    return {"in_channels": values["in_channels"], "out_channels": values["out_channels"],
            "model_channels": width, "channel_mult": mult, "attention": attention,
            "num_res_blocks": _one(values, "layers_per_block", file),
            # Named for the channels of a head, it has been their number since diffusers began.
            "num_heads": _one(values, "attention_head_dim", file),
            "context_dim": _one(values, "cross_attention_dim", file),
            "norm_groups": values["norm_num_groups"]}


def _vae_sizes(values: dict, file: Path) -> dict:
    values = {"in_channels": 3, "out_channels": 3, "block_out_channels": [64],
              "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32,
              "scaling_factor": 0.18215} | values
    require_only(values, _VAE_ONLY, file)
    width, mult = _widths(values, file)
    return {"in_channels": values["in_channels"], "out_channels": values["out_channels"],
            "ch": width, "ch_mult": mult, "num_res_blocks": values["layers_per_block"],
            "z_channels": values["latent_channels"], "norm_groups": values["norm_num_groups"],
            "scale_factor": values["scaling_factor"]}


def _text_sizes(values: dict, file: Path) -> dict:
    values = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
              "num_attention_heads": 8} | values
    width = values["hidden_size"]
    require_only(values, _TEXT_ONLY | {"intermediate_size": 4 * width}, file)
    return {"width": width, "layers": values["num_hidden_layers"],
            "heads": values["num_attention_heads"]}


_SIZES: dict[str, Callable[[dict, Path], dict]] = {
    "unet": _unet_sizes, "vae": _vae_sizes, "text_encoder": _text_sizes}


def _entries(value) -> list:
    return value if isinstance(value, list) else [value]


def _one(values: dict, key: str, file: Path):
    """The value that all levels share: here they can't differ."""
    first, *others = _entries(values[key])
    if any(other != first for other in others):
        raise CheckpointError(f"{file} has {key} {json.dumps(values[key])}, and here all levels "
                              f"have the same: {PASS_SD15}")
    return first


def _widths(values: dict, file: Path) -> tuple[int, list[int]]:
    """The channels of the first level, and how many times as many each level has."""
    first, *_ = widths = values["block_out_channels"]
    if any(width % first for width in widths):
        raise CheckpointError(f"{file} has block_out_channels {widths}, and only multiples of "
                              f"the first can be used here: {PASS_SD15}")
    return first, [width // first for width in widths]


# ------------------------------------------------------------------------------- single files


_SD1 = re.compile(r"stable-diffusion-v1([-.]\d)?(/.*)?")
_SAID_OF_OTHERS = ("ss_v_parameterization", "ss_zero_terminal_snr", "ss_v2")    # kohya's trainer
_YAML = re.compile(r"""^\s*(\w+)\s*:\s*["']?([\w.]+)""", re.MULTILINE)
_YAML_ONLY = {"parameterization": "eps", "linear_start": 0.00085, "linear_end": 0.012,
              "timesteps": 1000, "scale_factor": 0.18215}


def refuse_markers(names: Collection[str], file: Path) -> None:
    """Raises CheckpointError for tensors that mark a model which does not predict the noise."""
    for marker in ("v_pred", "ztsnr"):
        if marker in names:
            raise CheckpointError(f"{file} has a tensor {marker}, as models with v-prediction or "
                                  f"zero terminal SNR have: {PASS_SD15}")


def check_metadata(metadata: Mapping[str, str], file: Path) -> None:
    """Raises CheckpointError where a single file, or the .yaml beside it, says that its weights
    predict no noise or were trained on another schedule or another base."""
    architecture = metadata.get("modelspec.architecture", "stable-diffusion-v1")
    if not _SD1.fullmatch(architecture):
        raise CheckpointError(f"the metadata of {file} has modelspec.architecture "
                              f"{json.dumps(architecture)}: {PASS_SD15}")
    require_only(metadata, {"modelspec.prediction_type": "epsilon"}, f"the metadata of {file}")
    for key in _SAID_OF_OTHERS:
        if metadata.get(key, "").lower() in ("true", "1"):
            raise CheckpointError(f"the metadata of {file} has {key} {metadata[key]}: {PASS_SD15}")
    yaml = file.with_suffix(".yaml")
    if yaml.is_file():
        found = dict(_YAML.findall(yaml.read_text(encoding="utf-8", errors="replace")))
        require_only({k: _number(v) for k, v in found.items()}, _YAML_ONLY, yaml)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# ------------------------------------------------------------------------------- our own


def read_config(kind: type, stored: str, source: str | Path):
    """The configuration of class `kind` that a file carries as JSON; "{}" is the default one.

    Raises CheckpointError where it is damaged, or has settings that `kind` has not.
    """
    try:
        default, values = kind(), json.loads(stored)
        for name, value in values.items():
            values[name] = value = tuple(value) if isinstance(value, list) else value
            if not (_same_type(value, getattr(default, name)) and _plausible(name, value)):
                raise ValueError(f"{name} is {value!r}")
        return kind(**values)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{source} carries settings of a {kind.__name__} that can't be read "
                              f"({error}): save it again, or {PASS_SD15}") from error


def _same_type(value, default) -> bool:
    """Whether a setting is of the type of its default; fractions must be finite and positive."""
    if isinstance(default, tuple):
        return (isinstance(value, tuple) and value != ()
                and all(_same_type(v, default[0]) for v in value))
    if isinstance(default, float):
        return isinstance(value, int | float) and math.isfinite(value) and value > 0
    return type(value) is type(default)


def _plausible(name: str, value) -> bool:
    """Whether a size could be meant. A damaged file must not cost hours or all the memory."""
    if isinstance(value, tuple):
        return len(value) <= 8 and all(_plausible(name, v) for v in value)
    most = 64 if name in ("layers", "num_res_blocks") else 1 << 16
    return not isinstance(value, int) or 0 <= value <= most
