"""Train the miniature Stable Diffusion from nothing: `python mini/train.py`.

Stage by stage, each resumable at any point and skipped once done:

    images     postcards in all styles are drawn and kept
    vae        the autoencoder, f = 8, 4 latent channels
    clip       a text and an image tower, contrastively, through open_clip; the text tower is frozen
    judge      the classifier that measures whether an image, of any style, follows its caption
    unet       ε-prediction in the latents, 10 % empty captions
    styles     three fine-tuned bases, one a style: only the UNet learns

Then one file in the official single-file layout is written, fp16, with the configurations in its
metadata, and settings, times and losses beside it in training.json. They go to WORK/made: the
bundled guides were trained for the bundled miniature, and fit no other. `python mini/check.py`
measures whether it is good enough.

Every update draws from a generator of its own (seed, stage, update), so a resumed run continues
exactly. Files in WORK are named after what they were made from, so that none is used for another.

Shapes as in unet.py, vae.py and clip_text.py; images are 64 × 64, their latents 4 × 8 × 8.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from ppdd import TIMESTEPS, add_noise  # noqa: E402
from support.base import MINI, Base, load_base  # noqa: E402
from support.checkpoint import save_checkpoint  # noqa: E402
from support.cli import option, parse, require, run_command  # noqa: E402
from support.files import save_tensors, write_json  # noqa: E402
from support.machine import find_device, hardware, math_attention  # noqa: E402
from support.training_state import load_optimizer, optimizer_tensors  # noqa: E402
from unet import UNet, UNetConfig  # noqa: E402
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


@dataclass(frozen=True)
class Config:
    """Settings of a run; training.json holds those of the bundled miniature."""

    out: str = option("", "folder of the finished weights; default: WORK/made")
    work: str = option("runs/mini", "folder of checkpoints and caches")
    styles_only: bool = option(False, "only the three styles, from OUT/mini.safetensors, else the "
                                      "bundled miniature, into a folder `styles` beside it")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("bf16", "autocast; fp32: none", choices=("bf16", "fp32"))
    compile: bool = option(False, "torch.compile: 1.3 × on a CPU, needs a C++ compiler")
    seed: int = option(0, "of everything", low=0)
    images: int = option(32_000, "postcards; each other style has an eighth of that", low=8)
    captions: int = option(60_000, "captions, of all combinations of attributes together", low=1)
    caption_noise: float = option(.3, "share of captions that describe another image", low=0,
                                  high=1)
    vae_updates: int = option(10_000, "of the autoencoder", low=1)
    vae_batch: int = option(8, "images an update", low=1)
    clip_updates: int = option(2_000, "of the two towers", low=1)
    clip_batch: int = option(128, "pairs an update", low=8)
    judge_updates: int = option(3_000, "of the judge", low=1)
    judge_batch: int = option(64, "images an update", low=4)
    unet_updates: int = option(11_500, "of the UNet", low=1)
    unet_batch: int = option(64, "images an update", low=1)
    style_updates: int = option(600, "of the UNet in each style", low=1)
    style_images: int = option(3_000, "postcards of each style", low=1)
    save_every: int = option(60, "seconds between checkpoints", low=0)


# ------------------------------------------------------------------ one loop for all stages

LOGS: dict[str, dict] = {}              # of this run's stages, by name


def make_key(*parts: object) -> str:
    """A short hash of what something is made from: modules by their weights, the rest by repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for tensor in part.state_dict().values():
                digest.update(tensor.cpu().contiguous().numpy())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:12]


@dataclass(eq=False)
class Stage:
    """A module in training: AdamW with warmup and cosine decay, and a running mean of the weights.

    The mean (EMA) is what the stage ends with: samples of a diffusion model are much better with
    it. A file in WORK, named after the stage and what it is made from, holds the last checkpoint
    and the log.
    """

    config: Config
    name: str
    module: nn.Module
    loss: Callable[[torch.Generator], Tensor]           # of one batch, drawn with the generator
    updates: int
    lr: float
    made_from: tuple
    warmup: int = 200

    def __post_init__(self):
        key = make_key(self.config.seed, self.updates, self.lr, *self.made_from)
        self.path = Path(self.config.work) / f"{self.name}-{key}.safetensors"
        self.params = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(self.params.values(), self.lr, betas=(.9, .99),
                                           weight_decay=.01, fused=True)
        self.log = {"updates": 0, "seconds": 0., "curve": {}, "hardware": ""}

    def train(self) -> nn.Module:
        """To the last update, from the last checkpoint; the module, frozen."""
        if self.path.exists():
            self.load()
        if self.log["updates"] < self.updates:
            self.log["hardware"] = hardware(self.config.device)
            self.run_updates()
        LOGS[self.name] = self.log
        self.module.load_state_dict(self.average, strict=False)
        return self.module.eval().requires_grad_(False)

    def run_updates(self) -> None:
        recent: list[Tensor] = []
        start = time.time() - self.log["seconds"]
        saved = time.time()
        bar = tqdm(range(self.log["updates"], self.updates), self.name, mininterval=5)
        for update in bar:
            recent.append(self.update(update))
            done = update + 1
            if done % 100 and done < self.updates:
                continue
            mean = torch.stack(recent).mean().item()
            recent.clear()
            require((not math.isfinite(mean), f"{self.name}: the loss is not finite at update "
                                              f"{done}: try --dtype fp32"))
            bar.set_postfix(loss=f"{mean:.4f}")
            self.log |= {"updates": done, "seconds": round(time.time() - start, 1)}
            if done % 500 == 0 or done == self.updates:
                self.log["curve"][str(done)] = round(mean, 5)
            if time.time() - saved > self.config.save_every or done == self.updates:
                self.save()
                saved = time.time()

    def update(self, update: int) -> Tensor:
        """One step of the optimiser, and of the running mean; returns the loss."""
        cosine = .5 * (1 + math.cos(math.pi * update / self.updates))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (update + 1) / self.warmup) * (.02 + .98 * cosine)
        seed = self.config.seed * 10**9 + sum(map(ord, self.name)) * 10**6 + update
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        device, bf16 = self.config.device, self.config.dtype == "bf16"
        with math_attention(device):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                loss = self.loss(generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(self.params.values(), 1.)
        self.optimizer.step()
        # At first the mean is of few weights: a decay of .9995 would keep the random ones in it.
        decay = min(.9995, (2 + update) / (11 + update))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.params.values()), 1 - decay)
        return loss.detach()

    def save(self) -> None:
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        save_tensors(self.path, tensors | optimizer_tensors(self.optimizer),
                     {"log": json.dumps(self.log)})

    def load(self) -> None:
        tensors = load_file(self.path, self.config.device)
        self.module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items()
                                     if k.startswith("module.")})
        self.average = {k: tensors[f"average.{k}"] for k in self.params}
        load_optimizer(self.optimizer, tensors)
        with safe_open(self.path, framework="pt") as opened:
            self.log = json.loads(opened.metadata()["log"])


def pick(n: int, total: int, generator: torch.Generator) -> Tensor:
    """(n,) rows of `total`."""
    return torch.randint(total, (n,), generator=generator)


# ------------------------------------------------------------------ images

def made_of_images(config: Config) -> tuple:
    """What `draw_images` depends on."""
    return "images", config.seed, config.images


def draw_images(config: Config) -> dict[str, Tensor]:
    """{style}.attributes (N, 6) and {style}.images (N, 3, 64, 64) uint8, drawn once."""
    path = Path(config.work) / f"images-{make_key(made_of_images(config))}.safetensors"
    if not path.exists():
        tensors = {}
        for i, style in enumerate(postcards.STYLES):
            generator = torch.Generator().manual_seed(config.seed + i)
            total = config.images if i == 0 else config.images // 8
            attributes = postcards.sample_attributes(total, generator)
            tensors[f"{style}.attributes"] = attributes
            tensors[f"{style}.images"] = draw_style(attributes, style, generator)
        save_tensors(path, tensors)
    return load_file(path, config.device)


def draw_style(attributes: Tensor, style: str, generator: torch.Generator) -> Tensor:
    """(N, 3, 64, 64) uint8."""
    return torch.cat([(postcards.draw(part, style, generator) * 255).round().byte()
                      for part in tqdm(attributes.split(500), f"images, {style}")])


# ------------------------------------------------------------------ autoencoder

def train_vae(config: Config, data: dict[str, Tensor]) -> VAE:
    """Absolute and squared error of pixels, absolute error of differences, a little KL."""
    plain = data["postcard.images"]
    styled = torch.cat([data[f"{s}.images"] for s in postcards.STYLES[1:]])
    torch.manual_seed(config.seed)
    vae = VAE(VAE_CONFIG).to(config.device, memory_format=torch.channels_last)
    share = max(1, config.vae_batch // 8)

    def forward(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        moments = vae.encode(x).float()
        return vae.decode(vae.sample(moments, noise)).float(), moments

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

    made_from = made_of_images(config), config.vae_batch
    return Stage(config, "vae", vae, loss, config.vae_updates, 1.5e-3, made_from).train()


@torch.no_grad()
def encode_images(config: Config, vae: VAE, images: Tensor, name: str, made_from: tuple) -> Tensor:
    """Moments (N, 8, 8, 8) of images, cached. made_from: what the images depend on."""
    made_from = (*made_from, vae.encoder, vae.quant_conv)
    path = Path(config.work) / f"moments-{name}-{make_key(*made_from)}.safetensors"
    if not path.exists():
        parts = [vae.encode((x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last))
                 for x in tqdm(images.split(200), desc=f"moments, {name}")]
        save_tensors(path, {"moments": torch.cat(parts)})
    return load_file(path, config.device)["moments"]


def set_scale(vae: VAE, moments: Tensor) -> None:
    """Gives the autoencoder the scale factor that brings its latents to unit variance."""
    mean, logvar = moments.chunk(2, 1)
    std = (mean.var() + logvar.exp().mean()).sqrt().item()
    vae.config = replace(vae.config, scale_factor=round(1 / std, 5))


# ------------------------------------------------------------------ CLIP and its text encoder

def build_clip(config: Config) -> nn.Module:
    import open_clip  # only here: it brings torchvision

    text = CLIP_CONFIG["text_cfg"] | {"context_length": LONGEST}
    torch.manual_seed(config.seed)
    return open_clip.CLIP(**CLIP_CONFIG | {"text_cfg": text}).to(config.device)


def train_clip(config: Config, data: dict[str, Tensor]) -> nn.Module:
    """Contrastive, on captions that are true; their context is cut to the longest, for speed.

    Half of a batch is images in fours that differ in position only: among images that differ in
    everything, nobody needs to look where the subject stands, and the text would not tell.
    """
    attributes, images = data["postcard.attributes"].cpu(), data["postcard.images"]
    clip = build_clip(config)
    tokenizer = Tokenizer()
    draw_fours = fours(attributes)
    half = config.clip_batch // 2

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

    made_from = made_of_images(config), config.clip_batch
    return Stage(config, "clip", clip, loss, config.clip_updates, 1e-3, made_from).train()


def fours(attributes: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """A function that draws (4 n,) rows: n scenes, four images of each, differing in position."""
    scene = torch.zeros(len(attributes), dtype=torch.long)
    for (name, values), column in zip(postcards.ATTRIBUTES.items(), attributes.T):
        if name != "position":
            scene = scene * len(values) + column
    scenes, counts = scene.unique(return_counts=True)
    order = scene.argsort()
    starts = counts.cumsum(0) - counts

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
            if "in_proj_" in key:                       # open_clip keeps q, k and v in one tensor
                for part, piece in zip("qkv", value.chunk(3)):
                    state[key.replace("in_proj_", f"{part}_proj.")] = piece.clone()
            else:
                state[key] = value
    encoder = TextEncoder(TEXT_CONFIG)
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)


# ------------------------------------------------------------------ judge

def train_judge(config: Config, data: dict[str, Tensor]) -> Judge:
    """On all styles alike, so that it can read the images of fine-tuned bases as well."""
    torch.manual_seed(config.seed)
    judge = Judge().to(config.device)
    share = max(1, config.judge_batch // len(postcards.STYLES))

    def loss(generator: torch.Generator) -> Tensor:
        rows = {s: pick(share, len(data[f"{s}.images"]), generator) for s in postcards.STYLES}
        x = torch.cat([data[f"{s}.images"][k] for s, k in rows.items()]).float() / 255
        attributes = torch.cat([data[f"{s}.attributes"][k] for s, k in rows.items()])
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        k = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)
        x = x + k * (blurred - x)
        x = x + .05 * k * torch.randn(x.shape, generator=generator).to(x.device)
        return judge.loss(x, attributes)

    made_from = made_of_images(config), config.judge_batch
    return Stage(config, "judge", judge, loss, config.judge_updates, 2e-3, made_from).train()


# ------------------------------------------------------------------ UNet

class Captions:
    """Captions of every combination of attributes, with their text states, computed once."""

    def __init__(self, config: Config, encoder: TextEncoder):
        self.radix = torch.tensor([len(v) for v in postcards.ATTRIBUTES.values()])
        rng = random.Random(config.seed)
        total = int(self.radix.prod())
        self.each = math.ceil(config.captions / total)
        texts = [postcards.caption(self.attributes_of(k // self.each), rng)
                 for k in range(total * self.each)]
        self.key = make_key(config.seed, config.captions, encoder)
        path = Path(config.work) / f"captions-{self.key}.safetensors"
        tokenizer = Tokenizer()
        encoder = encoder.to(config.device)
        if not path.exists():
            with torch.no_grad():
                parts = [encoder(tokenizer(texts[i:i + 500]).to(config.device)).half().cpu()
                         for i in tqdm(range(0, len(texts), 500), desc="captions")]
            save_tensors(path, {"states": torch.cat(parts)})
        self.states = load_file(path, config.device)["states"]              # (total · each, 77, D)
        self.empty = encoder(tokenizer("").to(config.device))

    def attributes_of(self, k: int) -> Tensor:
        """(6,) the attributes of combination k."""
        values = []
        for n in self.radix.flip(0).tolist():
            k, value = divmod(k, n)
            values.append(value)
        return torch.tensor(values[::-1])

    def index(self, attributes: Tensor) -> Tensor:
        """(B,) the combination that each of (B, 6) is."""
        k = torch.zeros(len(attributes), dtype=torch.long)
        for column, n in zip(attributes.T, self.radix.tolist()):
            k = k * n + column
        return k

    def draw(self, attributes: Tensor, wrong: float, generator: torch.Generator) -> Tensor:
        """States (B, 77, D) of captions; a share `wrong` is of other images, a tenth is empty.

        Captions of the web are often wrong, and that is why guidance matters: a base trained on
        them follows its prompt only loosely. The empty ones teach CFG's second pass.
        """
        n = len(attributes)
        rows = self.index(attributes) * self.each + pick(n, self.each, generator)
        other = torch.rand(n, generator=generator) < wrong
        rows = torch.where(other, pick(n, len(self.states), generator), rows)
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
        t = (TIMESTEPS * torch.where(u[1] < .5, u[0], u[0].sqrt())).long().to(config.device)
        c = captions.draw(attributes[rows], config.caption_noise, generator)
        return F.mse_loss(step(add_noise(x, eps[1], t), t, c).float(), eps[1])

    unet.train().requires_grad_(True)
    made_from = (*made_from, config.unet_batch, config.caption_noise, captions.key, vae.encoder)
    return Stage(config, name, unet, loss, updates, lr, made_from, warmup).train()


def train_styles(config: Config, base: Base, out: Path) -> None:
    """Three fine-tuned bases, each a whole checkpoint in out/styles: the UNet alone trains on, a
    little, in each style. Minutes on a CPU."""
    captions = Captions(config, base.text)
    for i, style in enumerate(postcards.STYLES[1:]):
        generator = torch.Generator().manual_seed(config.seed + 50 + i)
        attributes = postcards.sample_attributes(config.style_images, generator)
        images = draw_style(attributes, style, generator).to(config.device)
        made_from = config.seed, config.style_images
        moments = encode_images(config, base.vae, images, style, made_from)
        unet = train_unet(config, copy.deepcopy(base.unet), style, moments, attributes, captions,
                          base.vae, config.style_updates, 3e-4, (*made_from, base.unet), warmup=50)
        save_checkpoint(out / f"styles/{style}.safetensors", unet, base.vae, base.text,
                        title="postcards")


# ------------------------------------------------------------------ the whole

def run(config: Config) -> None:
    """Every stage; what earlier runs left on disk is read, not made again."""
    config = replace(config, device=find_device(config.device))
    if config.styles_only:
        base = Path(config.out, "mini.safetensors") if config.out else MINI
        return train_styles(config, load_base(base, device=config.device), base.parent)
    out = Path(config.out or Path(config.work, "made"))
    LOGS.clear()
    data = draw_images(config)
    vae = train_vae(config, data)
    clip = train_clip(config, data)
    weights = clip.state_dict()
    weights["positional_embedding"] = all_positions(weights["positional_embedding"])
    save_tensors(out / "clip.safetensors", {k: v.half() for k, v in weights.items()})
    write_json(out / "clip.json", CLIP_CONFIG)
    save_tensors(out / "judge.safetensors", train_judge(config, data).state_dict())

    encoder = text_encoder_from(clip).half().float()            # rounded as the file will hold it
    moments = encode_images(config, vae, data["postcard.images"], "postcard",
                            made_of_images(config))
    set_scale(vae, moments)
    captions = Captions(config, encoder)
    torch.manual_seed(config.seed)
    unet = train_unet(config, UNet(UNET_CONFIG).to(config.device), "unet", moments,
                      data["postcard.attributes"], captions, vae, config.unet_updates, 1e-3,
                      made_of_images(config))
    save_checkpoint(out / "mini.safetensors", unet, vae, encoder, title="postcards")
    train_styles(config, load_base(out / "mini.safetensors", device=config.device), out)
    write_json(out / "training.json", {"settings": asdict(config)} | LOGS)


def main(argv: list[str] | None = None) -> None:
    run_command("mini/train.py",
                lambda: run(parse(Config, "mini/train.py", __doc__.splitlines()[0], argv)),
                "lower the batches", lambda: "stopped; the same command goes on from there")


if __name__ == "__main__":
    main()
