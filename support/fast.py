"""`ppdd.sample`, faster: what no step changes is computed once, and a GPU replays the rest.

Of a run's N steps the prompt's keys and values are the same in all; the timesteps, and so all that
they add in every residual block, are known beforehand; so are a tiny guide's residuals and a full
guide's encoded hint. What is left of a step is some hundred small kernels, which at batch 1 a GPU
finishes sooner than Python can launch them: so they are recorded as a CUDA graph, and replayed.
`sample` here takes and returns what `ppdd.sample` does, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from meng import Sampler, Student
from ppdd import SAMPLERS, SeeingGuide, TinyGuide, alpha_sigma, cfg, step_grid
from support.capture import captured
from support.cli import BadInput
from unet import Attention, Encoder, ResBlock, TransformerBlock, UNet

# ------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(unet: UNet, z: Tensor, c: Tensor, g: float, steps: int, guide: nn.Module | None = None,
           empty: Tensor | None = None, sampler: str | Sampler = "ddim",
           progress: Callable[[], object] = lambda: None,
           step: Callable[..., Tensor] | None = None, grid: list[int] | None = None,
           guided: Container[int] | None = None) -> Tensor:
    """As `ppdd.sample`; CFG's two passes are one batch of 2 B. step is what to call at each step,
    by default `predict_step`, on a GPU recorded as a CUDA graph. sampler may be any function
    of (predict, z, grid). grid is the N + 1 timesteps, by default `step_grid`'s; guided the steps,
    from 0, in which CFG guides, by default all. A guide may be a student: it then takes the UNet's
    place, as in `meng.sample`.

    From here on the networks accept what was computed beforehand; otherwise they stay as they are.
    """
    step = step or captured(predict_step, z.device)
    grid = grid or step_grid(steps)
    twice = guide is None and empty is not None
    asked = grid[:-1] if grid[0] > grid[-1] else [max(t, 0) for t in grid]      # `meng.invert`'s
    times = torch.tensor(asked, device=z.device)
    guidance = torch.full((1,), g, dtype=torch.float32, device=z.device)
    if isinstance(guide, Student):
        unet, guide = guide, None
        embs = unet.embed(times, guidance)                                    # (N, E)
        known = [*zip(*alpha_sigma(times))]             # for ε̂, where it predicts v
    else:
        embs = unet.embed_time(times)                                         # (N, E)
        known = [()] * len(times)
    shifts, prompt = precompute(unet, embs, torch.cat([c, empty]) if twice else c)
    if guide is not None:
        known = precompute_guide(guide, guidance, embs, times, c, z)
    place = {t: i for i, t in enumerate(asked)}

    def predict(z: Tensor, t: int) -> Tensor:
        progress()
        i = place[t]
        if not twice or guided is None or i in guided:
            return step(unet, z, shifts[i], prompt, guidance, twice, guide, *known[i])
        return step(unet, z, shifts[i], prompt[:len(z)], guidance, False)

    return SAMPLERS.get(sampler, sampler)(predict, z, grid)


def predict_step(unet: UNet, z: Tensor, shifts: Tensor, prompt: Tensor, g: Tensor, twice: bool,
                 guide: nn.Module | None = None, *known: Tensor) -> Tensor:
    """ε̂ (B, Z, H, W), float32, at one step of a run, from what was computed before it.

    shifts (S,) and prompt (B, L, P) are `precompute`'s, known is `precompute_guide`'s, or α and σ
    where unet is a student. With a guide Eq. 4; twice is Eq. 3, both passes as one batch, and
    prompt is then of 2 B prompts. g (1,) is a tensor and nothing here waits for the device, so that
    a compiled or recorded step serves any g, prompt and noise of the same shape.
    """
    emb, c = by_layer(unet, shifts, prompt)
    features = unet.encode(torch.cat([z, z]) if twice else z, emb, c)
    residuals = None
    if isinstance(guide, SeeingGuide):
        residuals = guide.add_sight(known[0], features)
    elif isinstance(guide, TinyGuide):
        residuals = [r[..., None, None] for r in known[0].split(guide_widths(guide), dim=-1)]
    elif guide is not None:
        own_shifts, own_prompt, hint = known
        residuals = guide.control(z, *by_layer(guide, own_shifts, own_prompt), hint)
    eps = unet.decode(features, emb, c, residuals).float()
    if isinstance(unet, Student):
        return unet.eps_of(eps, z, *known)
    return cfg(*eps.chunk(2), g) if twice else eps


def compile_step(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as one compiled graph, once a shape; minutes to start with, then faster.

    Raises BadInput where this machine can't compile.
    """
    # Not "max-autotune": trying kernels out takes minutes and fills the screen, and what its own
    # CUDA graphs bring `captured` brings as well.
    graph = torch.compile(function, dynamic=False)

    def call(*args) -> Tensor:
        try:
            return graph(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).splitlines()[:2]).strip()
            raise BadInput(f"--compile can't be used here, leave it out ({reason})") from error

    return call


# ------------------------------------------------------------------------------- beforehand


def precompute(net: Encoder, embs: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Time embeddings (N, E) of N steps and prompt c (B, L, D), projected once for every layer.

    Returns what all S channels of residual blocks add at each step, (N, S), and all P channels of
    the prompt's keys and values, (B, L, P): a single tensor each, so that a step of a recording has
    little to copy. `by_layer` takes them apart.
    """
    accept_precomputed(net)
    blocks, attentions = residual_blocks(net), cross_attentions(net)
    shifts = torch.cat([block.emb_layers(embs) for block in blocks], dim=1)
    kv = [linear(c) for attention in attentions for linear in (attention.to_k, attention.to_v)]
    return shifts, torch.cat(kv, dim=-1)


def by_layer(net: Encoder, shifts: Tensor, prompt: Tensor) -> tuple[dict, dict]:
    """One step's shifts (S,), and keys and values (B, L, P): two dictionaries to give to the
    network's layers in place of emb and c."""
    blocks, attentions = residual_blocks(net), cross_attentions(net)
    widths = [block.emb_layers[1].out_features for block in blocks]
    parts = [part.view(1, -1, 1, 1) for part in shifts.split(widths)]         # (1, C, 1, 1)
    kv = iter(prompt.split([a.to_k.out_features for a in attentions for _ in "kv"], dim=-1))
    return dict(zip(blocks, parts)), {a: (next(kv), next(kv)) for a in attentions}


def residual_blocks(net: Encoder) -> list[ResBlock]:
    return [m for m in net.modules() if isinstance(m, ResBlock)]


def cross_attentions(net: Encoder) -> list[Attention]:
    return [m.attn2 for m in net.modules() if isinstance(m, TransformerBlock)]


def precompute_guide(guide: nn.Module, g: Tensor, embs: Tensor, times: Tensor, c: Tensor,
                     z: Tensor) -> list[tuple[Tensor, ...]]:
    """What is known of a guide at each of N steps: all residuals of a tiny one, (B, ΣC_i), or the
    vector (B, C) of a seeing one; of a full one its own shifts, keys and values, and its encoded
    hint.

    g (1,) or (B,), embs (N, E) of the base, times (N,), c (B, L, D), z shaped as the latents.
    """
    if isinstance(guide, SeeingGuide):
        return [(v,) for v in guide.mix(g, embs[:, None], c)]
    if isinstance(guide, TinyGuide):
        residuals = [r[..., 0, 0] for r in guide(g, embs[:, None], c)]        # (N, B, C_i)
        return [(step,) for step in torch.cat(residuals, dim=-1)]
    shifts, prompt = precompute(guide, guide.embed_time(times), c)
    hint = guide.encode_hint(g, z)
    return [(step, prompt, hint) for step in shifts]


def guide_widths(guide: TinyGuide) -> list[int]:
    return [theta.out_features for theta in guide.theta_z3]


class _ResBlock(ResBlock):
    """A residual block that looks up what it adds for the time, where that was computed."""

    def project_time(self, emb: Tensor | dict) -> Tensor:
        return super().project_time(emb) if isinstance(emb, Tensor) else emb[self]


class _Attention(Attention):
    """Attention that looks up its keys and values, where those were computed."""

    def project_kv(self, context: Tensor | dict) -> tuple[Tensor, Tensor]:
        if isinstance(context, Tensor):
            return super().project_kv(context)
        k, v = context[self]
        return self._split(k), self._split(v)


def accept_precomputed(net: nn.Module) -> None:
    """Has a network's layers take dictionaries of `by_layer` as well as tensors."""
    # Changing the class of a layer leaves its weights, hooks and name where they are, and unet.py
    # free of all this.
    for layer in net.modules():
        layer.__class__ = {ResBlock: _ResBlock, Attention: _Attention}.get(
            type(layer), layer.__class__)


# ------------------------------------------------------------------------------- on a CPU


class PackedConv2d(nn.Conv2d):
    """A frozen convolution whose weights lie in the order in which a CPU's kernel reads them.

    Conv2d has oneDNN reorder them at every call, which costs the more, the smaller the input is.
    The best order depends on the sides of the input, not on the batch.
    """

    sides: tuple[int, ...] = ()                         # of the input that it is packed for

    def forward(self, x: Tensor) -> Tensor:
        options = self.padding, self.stride, self.dilation, self.groups
        if x.shape[2:] != self.sides:
            weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, *options, [1, *x.shape[1:]])
            self.weight, self.sides = nn.Parameter(weight, requires_grad=False), x.shape[2:]
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *options, "none", [], "")


def prepack(*modules: nn.Module) -> None:
    """Packs the convolutions of modules, for inference: they compute the same but for rounding.

    Only on a CPU, in float32 or bfloat16, where this PyTorch can; else they are left as they are.
    What is packed can't be trained, cast, merged with a LoRA, compiled or saved any more.
    """
    ops = torch.ops.mkldnn
    able = torch.backends.mkldnn.is_available() and hasattr(ops, "_convolution_pointwise")
    dtypes = {torch.float32}
    if able and ops._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    for conv in (layer for module in modules for layer in module.modules()):
        if able and type(conv) is nn.Conv2d and conv.weight.is_cpu and conv.weight.dtype in dtypes:
            conv.__class__ = PackedConv2d
