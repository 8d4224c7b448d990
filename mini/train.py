"""Train the miniature Stable Diffusion from nothing: `python mini/train.py`.

Stage by stage, each resumable at any point and skipped once done:

    pictures   postcards in all styles are drawn and kept
    vae        the autoencoder, f = 8, 4 latent channels
    decoder    its decoder alone, longer: the latents stay what they are
    clip       a text and an image tower, contrastively, through open_clip; the text tower is frozen
    judge      the classifier that measures whether a picture, of any style, follows its caption
    unet       ε-prediction in the latents, 10 % empty captions
    styles     three fine-tuned bases, one a style: the UNet alone trains on

Then one file in the official single-file layout is packed, fp16, with the configurations in its
metadata, and the logs' figures beside it in training.json: in WORK/made, for the bundled miniature
is what the bundled guides were trained for. `python mini/check.py` measures whether it is good
enough. Every update draws from a generator of its own (seed, stage, update), so a resumed run
continues exactly; files in WORK are named after what they were made from, so nothing stale is
taken up. Shapes as in unet.py, vae.py and clip_text.py.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip_text import TextConfig, TextEncoder, Tokenizer  # noqa: E402
from mini import postcards  # noqa: E402
from mini.judge import Judge  # noqa: E402
from ppdd import (  # noqa: E402
    MINI,
    add_noise,
    load_base,
    load_optimizer,
    optimizer_tensors,
    quick_attention,
    save_base,
    save_tensors,
    written,
)
from unet import CheckpointError, UNet, UNetConfig  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402

VAE_CONFIG = VAEConfig(ch=16, ch_mult=(1, 2, 4, 6), num_res_blocks=1, norm_groups=8)
TEXT_CONFIG = TextConfig(width=64, layers=3, heads=4)
UNET_CONFIG = UNetConfig(model_channels=64, channel_mult=(1, 2), num_res_blocks=1,
                         attention=(False, True), num_heads=4, context_dim=64, norm_groups=16)
LONGEST = 32                            # tokens of the longest caption, with room to spare
CLIP_CONFIG = {
    "embed_dim": 128, "quick_gelu": True,
    "vision_cfg": {"image_size": postcards.SIZE, "patch_size": 16, "width": 128, "layers": 3,
                   "head_width": 32},
    "text_cfg": {"context_length": TEXT_CONFIG.positions, "vocab_size": TEXT_CONFIG.vocab_size,
                 "width": TEXT_CONFIG.width, "heads": TEXT_CONFIG.heads,
                 "layers": TEXT_CONFIG.layers},
}


STAGES = ("pictures", "vae", "decoder", "clip", "judge", "unet", "styles")


@dataclass(frozen=True)
class Config:
    """Settings of a run; out/training.json says how the bundled miniature came about."""

    out: str = ""                       # where the finished weights go; WORK/made, styles to mini/
    work: str = "runs/mini"             # checkpoints and caches
    until: str = "styles"               # the last stage to run
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = False               # torch.compile: 1.3 × on a CPU, needs a C++ compiler
    bf16: bool = True                   # autocast
    seed: int = 0
    pictures: int = 32_000              # postcards; each style has an eighth of that
    captions: int = 60_000
    vae_updates: int = 10_000
    vae_batch: int = 8
    decoder_updates: int = 0            # for sharper pictures; 0: no such stage
    clip_updates: int = 2_000
    clip_batch: int = 128
    judge_updates: int = 3_000
    judge_batch: int = 64
    unet_updates: int = 11_500
    unet_batch: int = 64
    style_updates: int = 600
    style_pictures: int = 3_000
    styles_only: bool = False           # just the three styles, from the bundled miniature
    lies: float = .3                    # share of captions that describe another picture
    save_every: int = 60                # seconds between checkpoints


# ------------------------------------------------------------------ one loop for all stages

LOGS: dict[str, dict] = {}              # of this run's stages, by name


def key(*parts: object) -> str:
    """A short hash of what something was made from: modules by their weights, the rest as told."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for tensor in part.state_dict().values():
                digest.update(tensor.cpu().contiguous().numpy())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:12]


def fit(config: Config, name: str, module: nn.Module, loss: Callable[[torch.Generator], Tensor],
        updates: int, lr: float, made_from: tuple, warmup: int = 200, final: float = .02
        ) -> nn.Module:
    """AdamW with warmup and cosine decay; the module ends with the average (EMA) of its weights.

    loss(generator) is one batch's loss. One file in `work`, named after the stage and what it is
    `made_from`, holds the last checkpoint and its log.
    """
    path = Path(config.work) / f"{name}-{key(config.seed, updates, lr, *made_from)}.safetensors"
    params = {k: p for k, p in module.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr, betas=(.9, .99), weight_decay=.01,
                                  fused=True)
    done, seconds, recent, curve, kept = 0, 0., [], {}, {}
    if path.exists():
        tensors = load_file(path, config.device)
        module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
        average = {k: tensors[f"average.{k}"] for k in params}
        load_optimizer(optimizer, tensors)
        with safe_open(path, framework="pt") as opened:
            kept = json.loads(opened.metadata()["log"])
        done, seconds, curve = kept["updates"], kept["seconds"], kept["curve"]
    on = kept["hardware"] if done == updates else hardware(config.device)

    def log() -> dict:
        return {"updates": done, "seconds": round(seconds, 1), "curve": curve, "hardware": on}

    def save() -> None:
        tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in average.items()}
        save_tensors(path, tensors | optimizer_tensors(optimizer), {"log": json.dumps(log())})

    stage = sum(map(ord, name))
    start, saved = time.time() - seconds, time.time()
    with tqdm(total=updates, initial=done, desc=name, mininterval=5) as bar:
        while done < updates:
            for group in optimizer.param_groups:
                decay = final + (1 - final) * .5 * (1 + math.cos(math.pi * done / updates))
                group["lr"] = lr * min(1, (done + 1) / warmup) * decay
            seed = config.seed * 10**9 + stage * 10**6 + done
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)
            autocast = torch.autocast(config.device, torch.bfloat16, enabled=config.bf16)
            with autocast, quick_attention(config.device):
                value = loss(generator)
            optimizer.zero_grad(set_to_none=True)
            with quick_attention(config.device):
                value.backward()
            nn.utils.clip_grad_norm_(params.values(), 1.)
            optimizer.step()
            done += 1
            keep = min(.9995, (1 + done) / (10 + done))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(params.values()), 1 - keep)
            recent.append(value.detach())
            bar.update()
            if done % 100 == 0 or done == updates:
                mean, recent, seconds = torch.stack(recent).mean().item(), [], time.time() - start
                if not math.isfinite(mean):
                    raise SystemExit(f"{name}: the loss is not finite at update {done}")
                bar.set_postfix(loss=f"{mean:.4f}")
                if done % 500 == 0 or done == updates:
                    curve[str(done)] = round(mean, 5)
                if time.time() - saved > config.save_every or done == updates:
                    save()
                    saved = time.time()
    LOGS[name] = log()
    module.load_state_dict(average, strict=False)
    return module.eval().requires_grad_(False)


def write_json(path: Path, value: dict) -> None:
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def pick(n: int, total: int, generator: torch.Generator) -> Tensor:
    return torch.randint(total, (n,), generator=generator)


# ------------------------------------------------------------------ stages

def pictures(config: Config) -> dict[str, Tensor]:
    """{style}.attributes (N, 6) and {style}.images (N, 3, 64, 64) uint8, drawn once."""
    path = Path(config.work) / f"pictures-{key(drawn(config))}.safetensors"
    if not path.exists():
        tensors = {}
        for i, style in enumerate(postcards.STYLES):
            generator = torch.Generator().manual_seed(config.seed + i)
            total = config.pictures if i == 0 else config.pictures // 8
            a = postcards.sample_attributes(total, generator)
            images = [(postcards.draw(part, style, generator) * 255).round().byte()
                      for part in tqdm(a.split(500), desc=f"pictures, {style}")]
            tensors |= {f"{style}.attributes": a, f"{style}.images": torch.cat(images)}
        save_tensors(path, tensors)
    return load_file(path, config.device)


def drawn(config: Config) -> tuple:
    """What `pictures` are made from."""
    return "pictures", config.seed, config.pictures


def train_vae(config: Config, data: dict[str, Tensor], trained: VAE | None = None) -> VAE:
    """Absolute and squared error of pixels, absolute error of differences, a little KL.

    With a trained autoencoder, its decoder alone learns on: the latents stay what they are.
    """
    plain = data["postcard.images"]
    styled = torch.cat([data[f"{s}.images"] for s in postcards.STYLES[1:]])
    if trained and not config.decoder_updates:
        return trained
    torch.manual_seed(config.seed)
    vae = trained or VAE(VAE_CONFIG).to(config.device, memory_format=torch.channels_last)
    if trained:
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    share = max(1, config.vae_batch // 8)

    def forward(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(not trained):
            moments = vae.encode(x).float()
        z = vae.sample(moments, noise)
        return vae.decode(z).float(), moments

    step = torch.compile(forward) if config.compile else forward

    def loss(generator: torch.Generator) -> Tensor:
        x = torch.cat([plain[pick(config.vae_batch - share, len(plain), generator)],
                       styled[pick(share, len(styled), generator)]])
        x = (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(len(x), 4, 8, 8, generator=generator).to(x.device)
        y, moments = step(x, noise)
        mean, logvar = moments.chunk(2, 1)
        kl = .5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        error = y - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 4 * error.square().mean() + edges + 3e-4 * kl

    made_from = drawn(config), config.vae_batch
    if trained:
        return fit(config, "decoder", vae, loss, config.decoder_updates, 1e-3, (*made_from, vae))
    return fit(config, "vae", vae, loss, config.vae_updates, 1.5e-3, made_from)


def build_clip(config: Config) -> nn.Module:
    import open_clip  # only here: it brings torchvision

    text = CLIP_CONFIG["text_cfg"] | {"context_length": LONGEST}
    torch.manual_seed(config.seed)
    return open_clip.CLIP(**CLIP_CONFIG | {"text_cfg": text}).to(config.device)


def train_clip(config: Config, data: dict[str, Tensor]) -> nn.Module:
    """Contrastive, captions without lies; the context cut to the longest caption, for speed.

    Half of a batch is pictures in fours that differ in position only: among pictures that differ in
    everything, nobody needs to look where the subject stands, and the text would not tell.
    """
    attributes, images = data["postcard.attributes"].cpu(), data["postcard.images"]
    clip, tokenizer = build_clip(config), Tokenizer()
    draw_fours, half = fours(attributes), config.clip_batch // 2

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.cat([pick(half, len(images), generator), draw_fours(half // 4, generator)])
        rng = random.Random(int(rows[0]) + int(rows.sum()))
        captions = [postcards.caption(attributes[i], rng, left_out=k < half)
                    for k, i in enumerate(rows)]
        ids = open_clip_ids(tokenizer(captions))
        x = images[rows].float() / 127.5 - 1
        u, v, scale = clip(x, ids[:, :LONGEST].to(x.device))[:3]
        scores = scale.clamp(max=100) * u.float() @ v.float().T
        target = torch.arange(len(rows), device=x.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    return fit(config, "clip", clip, loss, config.clip_updates, 1e-3,
               (drawn(config), config.clip_batch))


def fours(attributes: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """A function that draws (4 n,) rows: n scenes, four pictures of each, differing in position."""
    key = torch.zeros(len(attributes), dtype=torch.long)
    for (name, values), column in zip(postcards.ATTRIBUTES.items(), attributes.T):
        if name != "position":
            key = key * len(values) + column
    scenes, counts = key.unique(return_counts=True)
    order, starts = key.argsort(), counts.cumsum(0) - counts

    def draw(n: int, generator: torch.Generator) -> Tensor:
        k = pick(n, len(scenes), generator)[:, None]
        nth = (torch.rand(n, 4, generator=generator) * counts[k]).long()
        return order[starts[k] + nth].flatten()

    return draw


def open_clip_ids(ids: Tensor) -> Tensor:
    """SD pads with the end token, open_clip with 0."""
    end = ids.argmax(1, keepdim=True)
    return torch.where(torch.arange(ids.shape[1]) > end, 0, ids)


def all_positions(trained: Tensor) -> Tensor:
    """Position embeddings (LONGEST, D) continued to (77, D) as open_clip initialises them."""
    rest = torch.randn(TEXT_CONFIG.positions - len(trained), trained.shape[1],
                       generator=torch.Generator().manual_seed(0)) * .01
    return torch.cat([trained, rest.to(trained)])


def text_encoder_from(clip: nn.Module) -> TextEncoder:
    """open_clip's text tower under the names of Stable Diffusion's text encoder."""
    names = (("transformer.resblocks.", "encoder.layers."), (".attn.", ".self_attn."),
             (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".c_fc.", ".fc1."),
             (".c_proj.", ".fc2."), ("ln_final.", "final_layer_norm."),
             ("token_embedding.", "embeddings.token_embedding."))
    state = {}
    for key, value in clip.state_dict().items():
        if key == "positional_embedding":
            state["embeddings.position_embedding.weight"] = all_positions(value)
        elif key.startswith(("transformer.", "token_embedding.", "ln_final.")):
            for old, new in names:
                key = key.replace(old, new)
            if "in_proj_" in key:
                for part, piece in zip("qkv", value.chunk(3)):
                    state[key.replace("in_proj_", f"{part}_proj.")] = piece.clone()
            else:
                state[key] = value
    encoder = TextEncoder(TEXT_CONFIG)
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)


def train_judge(config: Config, data: dict[str, Tensor]) -> Judge:
    """On all styles alike: it reads what the fine-tuned bases paint as well."""
    torch.manual_seed(config.seed)
    judge, share = Judge().to(config.device), max(1, config.judge_batch // len(postcards.STYLES))

    def loss(generator: torch.Generator) -> Tensor:
        rows = {s: pick(share, len(data[f"{s}.images"]), generator) for s in postcards.STYLES}
        x = torch.cat([data[f"{s}.images"][k] for s, k in rows.items()]).float() / 255
        attributes = torch.cat([data[f"{s}.attributes"][k] for s, k in rows.items()])
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        k = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)
        x = x + k * (blurred - x)
        x = x + .05 * k * torch.randn(x.shape, generator=generator).to(x.device)
        return judge.loss(x, attributes)

    return fit(config, "judge", judge, loss, config.judge_updates, 2e-3,
               (drawn(config), config.judge_batch))


@torch.no_grad()
def latents(config: Config, vae: VAE, images: Tensor, name: str, made_from: tuple) -> Tensor:
    """Moments (N, 8, 8, 8) of pictures, cached. made_from: what the pictures were."""
    made_from = (*made_from, vae.encoder, vae.quant_conv)
    path = Path(config.work) / f"moments-{name}-{key(*made_from)}.safetensors"
    if not path.exists():
        parts = [vae.encode((x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last))
                 for x in tqdm(images.split(200), desc=f"moments, {name}")]
        save_tensors(path, {"moments": torch.cat(parts)})
    return load_file(path, config.device)["moments"]


class Captions:
    """Captions with their text states, by what they say: pool[k] describes combination k."""

    def __init__(self, config: Config, encoder: TextEncoder):
        self.radix = torch.tensor([len(v) for v in postcards.ATTRIBUTES.values()])
        rng = random.Random(config.seed)
        total = int(self.radix.prod())
        self.each = math.ceil(config.captions / total)
        texts = [postcards.caption(self.split(k // self.each), rng)
                 for k in range(total * self.each)]
        self.key = key(config.seed, config.captions, encoder)
        path, tokenizer = Path(config.work) / f"captions-{self.key}.safetensors", Tokenizer()
        if not path.exists():
            encoder = encoder.to(config.device)
            with torch.no_grad():
                parts = [encoder(tokenizer(texts[i:i + 500]).to(config.device)).half().cpu()
                         for i in tqdm(range(0, len(texts), 500), desc="captions")]
            save_tensors(path, {"states": torch.cat(parts)})
        self.states = load_file(path, config.device)["states"]                 # (K · each, 77, D)
        self.empty = encoder.to(config.device)(tokenizer("").to(config.device))

    def split(self, k: int) -> Tensor:
        values = []
        for n in self.radix.flip(0).tolist():
            k, value = divmod(k, n)
            values.append(value)
        return torch.tensor(values[::-1])

    def index(self, attributes: Tensor) -> Tensor:
        k = torch.zeros(len(attributes), dtype=torch.long)
        for column, n in zip(attributes.T, self.radix.tolist()):
            k = k * n + column
        return k

    def draw(self, attributes: Tensor, lies: float, generator: torch.Generator) -> Tensor:
        """States (B, 77, D) of captions; a share of them lies, a tenth is empty."""
        n = len(attributes)
        rows = self.index(attributes) * self.each + pick(n, self.each, generator)
        lie = torch.rand(n, generator=generator) < lies
        rows = torch.where(lie, pick(n, len(self.states), generator), rows)
        c = self.states[rows].float()
        empty = (torch.rand(n, generator=generator) < .1).to(c.device)
        return torch.where(empty[:, None, None], self.empty.float(), c)


def train_unet(config: Config, unet: UNet, name: str, moments: Tensor, attributes: Tensor,
               captions: Captions, vae: VAE, updates: int, lr: float, made_from: tuple,
               warmup: int = 200) -> UNet:
    """Eq. 1. Half of the timesteps lean to the noisy end, which decides the colours."""
    attributes = attributes.cpu()
    step = torch.compile(unet) if config.compile else unet

    def loss(generator: torch.Generator) -> Tensor:
        n = config.unet_batch
        rows = pick(n, len(moments), generator)
        eps = torch.randn(2, n, 4, 8, 8, generator=generator).to(config.device)
        x = vae.sample(moments[rows.to(moments.device)], eps[0])
        u = torch.rand(2, n, generator=generator)
        t = (1000 * torch.where(u[1] < .5, u[0], u[0].sqrt())).long().to(config.device)
        c = captions.draw(attributes[rows], config.lies, generator)
        return F.mse_loss(step(add_noise(x, eps[1], t), t, c).float(), eps[1])

    unet.train().requires_grad_(True)
    made_from = (*made_from, config.unet_batch, config.lies, captions.key, vae.encoder)
    return fit(config, name, unet, loss, updates, lr, made_from, warmup)


# ------------------------------------------------------------------ the whole

def scaled(vae: VAE, moments: Tensor) -> VAE:
    """The same autoencoder with the scale factor that brings its latents to unit variance."""
    mean, logvar = moments.chunk(2, 1)
    std = (mean.var() + logvar.exp().mean()).sqrt().item()
    vae.config = replace(vae.config, scale_factor=round(1 / std, 5))
    return vae


def train_styles(config: Config, base: Path, out: Path) -> None:
    """Three fine-tuned bases: a miniature's UNet alone trains on, a little, in each style.

    They go to `out/styles`, each a whole checkpoint. Minutes on a CPU.
    """
    base = load_base(base, device=config.device)
    captions = Captions(config, base.text)
    for i, style in enumerate(postcards.STYLES[1:]):
        generator = torch.Generator().manual_seed(config.seed + 50 + i)
        attributes = postcards.sample_attributes(config.style_pictures, generator)
        images = torch.cat([(postcards.draw(part, style, generator) * 255).round().byte()
                            for part in attributes.split(500)]).to(config.device)
        made_from = config.seed, config.style_pictures
        moments = latents(config, base.vae, images, style, made_from)
        tuned = copy.deepcopy(base.unet)
        train_unet(config, tuned, style, moments, attributes, captions, base.vae,
                   config.style_updates, 3e-4, (*made_from, base.unet), warmup=50)
        save_base(out / f"styles/{style}.safetensors", tuned, base.vae, base.text,
                  title="postcards")


def run(config: Config) -> None:
    """Every stage up to `until`; what earlier runs left on disk is read, not made again."""
    Path(config.work).mkdir(parents=True, exist_ok=True)
    if config.styles_only:
        base = Path(config.out, "mini.safetensors") if config.out else MINI
        return train_styles(config, base, base.parent)
    out = Path(config.out or Path(config.work, "made"))
    LOGS.clear()
    for stage in stage_by_stage(config, out):
        if stage == config.until:
            break
    write_json(out / "training.json", {"settings": asdict(config)} | LOGS)


def stage_by_stage(config: Config, out: Path) -> Iterator[str]:
    """Yields each stage's name once it is done, and its weights are in `out`."""
    data = pictures(config)
    yield "pictures"
    vae = train_vae(config, data)
    yield "vae"
    vae = train_vae(config, data, vae)
    yield "decoder"
    clip = train_clip(config, data)
    weights = clip.state_dict()
    weights["positional_embedding"] = all_positions(weights["positional_embedding"])
    save_tensors(out / "clip.safetensors", {k: v.half() for k, v in weights.items()})
    write_json(out / "clip.json", CLIP_CONFIG)
    yield "clip"
    judge = train_judge(config, data)
    save_tensors(out / "judge.safetensors", judge.state_dict())
    yield "judge"
    encoder = text_encoder_from(clip).half().float()                           # as it is packed
    moments = latents(config, vae, data["postcard.images"], "postcard", drawn(config))
    vae, captions = scaled(vae, moments), Captions(config, encoder)
    torch.manual_seed(config.seed)
    unet = UNet(UNET_CONFIG).to(config.device)
    train_unet(config, unet, "unet", moments, data["postcard.attributes"], captions, vae,
               config.unet_updates, 1e-3, drawn(config))
    save_base(out / "mini.safetensors", unet, vae, encoder, title="postcards")
    yield "unet"
    train_styles(config, out / "mini.safetensors", out)
    yield "styles"


def parse(argv: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Config):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        elif field.name == "until":
            parser.add_argument(flag, choices=STAGES, default=default)
        else:
            parser.add_argument(flag, type=type(default), default=default)
    return Config(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    try:
        run(parse())
    except (CheckpointError, OSError) as error:
        print(f"mini/train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
