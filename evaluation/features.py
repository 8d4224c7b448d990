"""Networks that turn images into features: FID's Inception, and CLIP through open_clip.

Both are called with images (B, 3, H, W) uint8 and return features (B, d); `protocol` says for a
result file which weights they have and how they resize.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from support.base import MINI
from support.cli import BadInput
from support.files import expand, hub_cache, sha256

# ------------------------------------------------------------------------------- Inception

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class ConvUnit(nn.Module):
    """Convolution, batch norm, ReLU. `same` pads so that the sides stay."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1,
                 same: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [k // 2 if same and stride == 1 else 0 for k in kernel]
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, concatenated over the channels, the pooled one last.

    A branch is a row of (name, channels, kernel[, stride]); a list in it is a fork whose outputs
    are concatenated too. The pooled branch ends in a 1×1 unit of `pooled` channels, unless 0.
    """

    def __init__(self, c_in: int, pool: nn.Module, pooled: int, *branches: tuple):
        super().__init__()
        self.pool = pool
        self.branches = [self._add_branch(c_in, branch) for branch in branches]
        self.branch_pool = ConvUnit(c_in, pooled, 1) if pooled else nn.Identity()

    def _add_branch(self, channels: int, branch: tuple) -> list[list[str]]:
        """Makes a branch's units; returns their names, a list for each step."""
        names = []
        for step in branch:
            fork = step if isinstance(step, list) else [step]
            for name, *sizes in fork:
                setattr(self, name, ConvUnit(channels, *sizes))
            names.append([name for name, *_ in fork])
            channels = fork[0][1]
        return names

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            h = x
            for names in branch:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            outputs.append(h)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


def _average_pool() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _mixed_5(c_in: int, pooled: int) -> Mixed:
    return Mixed(c_in, _average_pool(), pooled, (("branch1x1", 64, 1),),
                 (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
                 (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)))


def _mixed_6(c_in: int, c: int) -> Mixed:
    return Mixed(c_in, _average_pool(), 192, (("branch1x1", 192, 1),),
                 (("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))),
                 (("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)),
                  ("branch7x7dbl_3", c, (1, 7)), ("branch7x7dbl_4", c, (7, 1)),
                  ("branch7x7dbl_5", 192, (1, 7))))


def _mixed_7(c_in: int, pool: nn.Module) -> Mixed:
    return Mixed(c_in, pool, 192, (("branch1x1", 320, 1),),
                 (("branch3x3_1", 384, 1),
                  [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]),
                 (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                  [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]))


class Inception(nn.Module):
    """The Inception v3 of FID, from 2015, without its classifier; names are the weight file's keys.

    It is not torchvision's: average pooling leaves the padding out, and the last block pools by
    maximum.
    """

    def __init__(self):
        super().__init__()
        self.protocol = {"network": "Inception v3 (2015-12-05), 2048 features of the last pooling",
                         "resize": "299 x 299, bilinear, align_corners=False, no antialias"}
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c = _mixed_5(192, 32), _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, nn.MaxPool2d(3, 2), 0, (("branch3x3", 384, 3, 2),),
                              (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                               ("branch3x3dbl_3", 96, 3, 2)))
        self.Mixed_6b, self.Mixed_6c = _mixed_6(768, 128), _mixed_6(768, 160)
        self.Mixed_6d, self.Mixed_6e = _mixed_6(768, 160), _mixed_6(768, 192)
        self.Mixed_7a = Mixed(768, nn.MaxPool2d(3, 2), 0,
                              (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
                              (("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                               ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)))
        self.Mixed_7b = _mixed_7(1280, _average_pool())
        self.Mixed_7c = _mixed_7(2048, nn.MaxPool2d(3, stride=1, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 to features (B, 2048)."""
        x = F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))      # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)                                              # (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))                                                  # (B, 2048)


def find_inception(given: str = "") -> Path | None:
    """The weight file given, else one in ./weights or in torch's cache, else None."""
    if given:
        return expand(given)
    folders = (Path("weights"), Path(torch.hub.get_dir()) / "checkpoints")
    return next((f / INCEPTION for f in folders if (f / INCEPTION).is_file()), None)


def load_inception(path: str | Path, device: str | torch.device = "cpu") -> Inception:
    """FID's Inception in float32 and eval mode. Raises BadInput where the file is another one."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} is no file: pass {INCEPTION} from pytorch-fid's releases")
    digest = sha256(path)
    if digest != INCEPTION_SHA256:
        # Other weights give other numbers, which would still be called FID.
        raise BadInput(f"{path} has SHA-256 {digest[:8]}…, not {INCEPTION_SHA256[:8]}…: pass "
                       f"{INCEPTION} from pytorch-fid's releases")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = Inception()
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    network.protocol |= {"sha256": digest}
    return network.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------- CLIP

VIT_G = "ViT-g-14:laion2b_s34b_b88k"


class Clip:
    """An open_clip model. Calling it is calling `images`, so that it serves as an extractor."""

    def __init__(self, name: str, model: nn.Module, preprocess: Callable, tokenizer: Callable,
                 digest: str):
        """preprocess is open_clip's own for Pillow's images, with the normalisation last."""
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        *self.spatial, self.normalise = preprocess.transforms
        resize = [str(s) for s in self.spatial if not type(s).__name__.startswith("Maybe")]
        self.protocol = {"network": f"{name}, normalised image features", "sha256": digest,
                         "resize": "; ".join(resize), "normalisation": str(self.normalise)}

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to what the model reads: open_clip's own steps, on a whole batch.

        Equal to its preprocessing of Pillow's images where nothing is resized. Where something
        is, torchvision's 8-bit bicubic filter stands in for Pillow's: some pixels differ by a
        level or two.
        """
        for step in self.spatial:
            images = step(images)
        return self.normalise(images.float() / 255)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Features (B, d), float32, of length 1, of images (B, 3, H, W) uint8."""
        x = self.preprocess(images.to(next(self.model.parameters()).device))
        return F.normalize(self.model.encode_image(x).float(), dim=1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Features (B, d), float32, of length 1, of B texts; tokens past 77 are cut off."""
        ids = self.tokenizer(texts).to(next(self.model.parameters()).device)       # (B, 77)
        return F.normalize(self.model.encode_text(ids).float(), dim=1)

    __call__ = images


def load_clip(name: str, device: str | torch.device = "cpu") -> Clip:
    """A CLIP in float32 and eval mode: "mini", MODEL:TAG of open_clip, or MODEL:FILE.

    Raises BadInput where there is no such model, or its weights can't be had.
    """
    try:
        import open_clip
    except ImportError as error:
        raise BadInput("CLIP needs a package that is missing: pip install open_clip_torch "
                       f"({error})") from None
    with _silent_logging():
        clip = _load_mini_clip(open_clip) if name == "mini" else _load_open_clip(open_clip, name)
    clip.model.to(device).eval().requires_grad_(False)
    return clip


def _load_mini_clip(open_clip) -> Clip:
    folder = MINI.parent
    model = open_clip.CLIP(**json.loads((folder / "clip.json").read_text()))
    model.load_state_dict(load_file(folder / "clip.safetensors"))
    # It was trained on pixels in 0 … 1, without normalisation.
    preprocess = open_clip.image_transform(64, is_train=False, mean=(0., 0., 0.), std=(1., 1., 1.))
    return Clip("the miniature's CLIP", model, preprocess, open_clip.SimpleTokenizer(),
                sha256(folder / "clip.safetensors"))


def _load_open_clip(open_clip, spec: str) -> Clip:
    name, _, weights = spec.partition(":")
    if name not in open_clip.list_models() or not weights:
        raise BadInput(f"--clip-model {spec}: MODEL:TAG, MODEL:FILE or mini, for example {VIT_G}")
    known = open_clip.get_pretrained_cfg(name, weights)
    file = expand(weights)
    if not known and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise BadInput(f"--clip-model {spec}: there is no such file, nor such a tag of {name} "
                       f"({tags})")
    try:
        if known and not _is_downloaded(known):
            _announce_download(open_clip, name, weights)
        file = Path(open_clip.download_pretrained(known)) if known else file
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=weights if known else str(file), weights_only=True,
            force_quick_gelu=_wants_quick_gelu(known, weights, file))
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:          # from the network, the hub, torch.load or load_state_dict
        reason = textwrap.shorten(str(error), 140, placeholder=" …")
        raise BadInput(f"--clip-model {spec} can't be loaded ({reason}): pass weights you have as "
                       f"--clip-model {name}:FILE, .safetensors or a plain state dict") from None
    clip = Clip(spec, model, preprocess, tokenizer, sha256(file))
    used = {type(m).__name__ for m in model.modules()} & {"GELU", "QuickGELU"}
    clip.protocol["activation"] = " and ".join(sorted(used))
    return clip


def _is_downloaded(known: dict) -> bool:
    """Whether open_clip's weights are in the cache of the Hugging Face hub or in open_clip's."""
    repository = "/".join(known.get("hf_hub", "").split("/")[:2])
    snapshots = hub_cache() / f"models--{repository.replace('/', '--')}" / "snapshots"
    url = Path(known.get("url") or "none")
    weights = (file for file in snapshots.glob("*/*") if file.suffix in (".safetensors", ".bin"))
    return any(weights) or (expand("~/.cache/clip") / url.name).is_file()


def _announce_download(open_clip, name: str, weights: str) -> None:
    """Says, before a download begins, what it takes and how to do without."""
    with torch.device("meta"):          # shapes alone
        model = open_clip.create_model(name, device="meta", pretrained_hf=False)
    gigabytes = 4e-9 * sum(p.numel() for p in model.parameters())           # in float32
    print(f"downloading CLIP {name}:{weights}, about {gigabytes:.1f} GB. Without it: --clip-model "
          f"{name}:FILE for weights you have, --clip-model mini for the miniature's small CLIP, "
          f"or for FID --inception {INCEPTION}", file=sys.stderr, flush=True)


def _wants_quick_gelu(known: dict, weights: str, file: Path) -> bool:
    """Whether weights were trained with the quick GELU, as OpenAI's were.

    A weight file can't say so. OpenAI's are recognised by their name or, in the hub's cache, by
    the repository's; for other files MODEL-quickgelu says it. The result file notes which was used.
    """
    repositories = [part for part in file.absolute().parts if part.startswith("models--")]
    names = [weights] if known else [file.name, *repositories]
    return known.get("quick_gelu", False) or "openai" in "".join(names).lower()


@contextmanager
def _silent_logging() -> Iterator[None]:
    """No log lines of open_clip or the hub: whatever fails ends in a sentence of ours."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------- which one

def feature_name(distance: str, extractor: Callable) -> str:
    """The name of a distance with the very weights that its features come from."""
    return f"{distance}, weights {extractor.protocol['sha256'][:8]}"


def choose_extractor(miniature: bool, clip_model: str = "", inception: str = "",
                     device: str = "cpu", prefer_clip: bool = False) -> tuple[str, Callable]:
    """The name of the distance, and the network whose features it compares.

    FID where Inception's weights are given or, for other images than the miniature's, found. Else
    CLIP-FID, named with its CLIP, since the two can't be compared. prefer_clip takes CLIP unless
    Inception's weights are given.
    """
    path = find_inception(inception) if inception or not (miniature or prefer_clip) else None
    if path:
        return "FID", load_inception(path, device)
    try:
        clip = load_clip(clip_model or ("mini" if miniature else VIT_G), device)
    except BadInput as error:
        raise BadInput(f"{error}; or, for FID, pass --inception {INCEPTION}") from None
    return f"CLIP-FID ({clip.name})", clip
