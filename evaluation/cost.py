"""Table 1: parameters and arithmetic of networks and guides, and of whole images.

Everything is counted on the meta device, whose tensors have shapes and no numbers. A MAC is one
multiply-accumulate; the paper's "FLOPs (trillion)" are GMACs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import ppdd
from clip_text import TextConfig, TextEncoder
from evaluation.report import markdown_table, result_file, write_result
from meng import Student
from support import fast
from support.base import MINI, load_base
from support.cli import require
from support.machine import math_attention, provenance
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

STEPS = (8, 16, 50)
PAPER = {                       # parameters in millions, GMACs
    "base UNet": (859, 338.7), "teacher": (859, 677.5), "full guide": (361, 116.5),
    "tiny guide": (8.27, 7.79)}


class Networks(NamedTuple):
    """All networks on the meta device, and the side of a latent."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    full: ppdd.FullGuide
    tiny: ppdd.TinyGuide
    seeing: ppdd.SeeingGuide
    student: Student
    side: int


def build_networks(size: str) -> Networks:
    """Stable Diffusion 1.5 at 512 pixels, or "mini": the miniature at 64. Guides by default."""
    unet, vae, text, side = UNetConfig(), VAEConfig(), TextConfig(), 64
    if size == "mini":
        base = load_base(MINI)
        unet, vae, text, side = base.unet.config, base.vae.config, base.text.config, 8
    with torch.device("meta"):
        return Networks(UNet(unet), VAE(vae), TextEncoder(text),
                        ppdd.FullGuide(unet), ppdd.TinyGuide(unet), ppdd.SeeingGuide(unet),
                        Student(unet), side)


# ------------------------------------------------------------------------------- counting

class Macs(NamedTuple):
    """Multiply-accumulates of one call: of convolutions and linear layers, and of everything."""

    layers: int
    total: int


@torch.no_grad()
def count_macs(call: Callable[[], object]) -> Macs:
    """What a call computes, on meta or on real tensors.

    `layers` comes from a hook on every Conv2d and Linear that runs, `total` from PyTorch's own
    counter, which sees matrix products and convolutions wherever they are, attention's too.
    """
    layers = 0

    def count(module: nn.Module, _, output: Tensor) -> None:
        nonlocal layers
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers += output.numel() * module.weight[0].numel()

    hook = register_module_forward_hook(count)
    try:
        # PyTorch has no formula for the fused attention of CPUs and counts it as nothing. In
        # plain products it is counted, and equally on every device.
        with (FlopCounterMode(display=False) as counter, math_attention("cpu"),
              torch.device("meta")):
            call()
    finally:
        hook.remove()
    return Macs(layers, counter.get_total_flops() // 2)


def pass_costs(nets: Networks) -> dict[str, Macs]:
    """One pass of each network for one image; of the tiny guide in two ways of running it."""
    z, t, g, c, emb = _inputs(nets)
    features = nets.unet.encode(z, emb, c)
    positions = [x[0, 0].numel() for x in features]
    calls = {
        "base UNet": lambda: nets.unet(z, t, c),
        "teacher": lambda: [nets.unet(z, t, c) for _ in range(2)],
        "full guide": lambda: nets.full(g, emb, c, z, t),
        "tiny guide, on maps": lambda: _tiny_on_maps(nets.tiny, emb, c, positions),
        "tiny guide, as computed": lambda: nets.tiny(g, emb, c),
        "seeing guide": lambda: nets.seeing(g, emb, c, z, t, features),
        "student": lambda: nets.student(z, t.long(), c, g),
        "hint encoder": lambda: nets.full.encode_hint(g, z),
        "VAE decoder": lambda: nets.vae.decode(z),
        "text encoder": lambda: nets.text(_token_ids(nets)),
    }
    costs = {name: count_macs(call) for name, call in calls.items()}
    # Tiny guides multiply by the weight of Θ_z2 without calling the layer.
    for name, guide in (("tiny guide, as computed", nets.tiny), ("seeing guide", nets.seeing)):
        layers = costs[name].layers + guide.theta_z2.weight.numel()
        costs[name] = costs[name]._replace(layers=layers)
    return costs


def _tiny_on_maps(tiny: ppdd.TinyGuide, emb: Tensor, c: Tensor, positions: list[int]) -> None:
    """Eq. 5 as convolutions over maps: of its readings, the one nearest to the paper's figure.

    The timestep goes through Θ_z1 at every position of the latent, the text through Θ_z2 token by
    token, and their sum through each Θ_z3 at every position of its injection point.
    """
    tiny.theta_z1(emb.expand(positions[0], -1))
    tiny.theta_z2(c[0])
    for theta, n in zip(tiny.theta_z3, positions):
        theta(torch.empty(n, theta.in_features))


def image_cost(nets: Networks, method: str) -> dict[int, int]:
    """MACs of one image at 8, 16 and 50 steps, from prompt to pixels, as sampled here.

    method is cfg, full, tiny or seeing. What is computed once a run (the full guide's hint, the
    empty prompt, decoding) is counted once. The cost is affine in the steps: one and two tell the
    rest.
    """
    z, *_ = _inputs(nets)
    guide = None if method == "cfg" else getattr(nets, method)

    def generate(steps: int) -> None:
        c = nets.text(_token_ids(nets))
        empty = nets.text(_token_ids(nets)) if method == "cfg" else None
        nets.vae.decode(fast.sample(nets.unet, z, c, 8.0, steps, guide, empty))

    one, two = (count_macs(lambda n=n: generate(n)).total for n in (1, 2))
    return {n: one + (n - 1) * (two - one) for n in STEPS}


def _inputs(nets: Networks) -> tuple[Tensor, ...]:
    """z, t, g, c and a time embedding for one image."""
    base = nets.unet.config
    shapes = ((1, base.in_channels, nets.side, nets.side), (1,), (1,),
              (1, nets.text.config.positions, base.context_dim), (1, 4 * base.model_channels))
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


def _token_ids(nets: Networks) -> Tensor:
    return torch.empty(1, nets.text.config.positions, dtype=torch.long, device="meta")


# ------------------------------------------------------------------------------- eval.py table1

def table1(config) -> None:
    """`table1`: the paper's Table 1 beside what the modules themselves have and compute."""
    require((config.size not in ("", "mini"),
             f"--size {config.size}: table1 takes mini, or nothing for SD 1.5"))
    nets = build_networks(config.size)
    costs = pass_costs(nets)
    result = {
        "of": "the miniature, 64 x 64" if config.size else "Stable Diffusion 1.5, 512 x 512",
        "rows": _rows(nets, costs, with_paper=not config.size),
        "notes": _notes(nets, costs),
        "GMACs per image": {method: {str(steps): macs / 1e9 for steps, macs in
                                     image_cost(nets, method).items()}
                            for method in ("cfg", "full", "tiny", "seeing")},
        "GMACs once per image": {name: costs[name].total / 1e9 for name in
                                 ("VAE decoder", "text encoder", "hint encoder")},
    }
    print(table1_page(result))
    write_result(result_file(config), result | provenance(config))


def _rows(nets: Networks, costs: dict[str, Macs], with_paper: bool) -> list[dict]:
    """One row a network: parameters, GMACs, and their differences from the paper's in percent."""
    modules = {"base UNet": nets.unet, "teacher": nets.unet, "full guide": nets.full,
               "tiny guide, on maps": nets.tiny, "tiny guide, as computed": nets.tiny,
               "seeing guide": nets.seeing, "student": nets.student}
    rows = []
    for name, module in modules.items():
        row = {"network": name, "parameters": sum(p.numel() for p in module.parameters()),
               "GMACs": costs[name].layers / 1e9, "GMACs with attention": costs[name].total / 1e9}
        paper = PAPER.get(name.partition(",")[0]) if with_paper else None
        if paper:
            row["paper"] = {"parameters": paper[0] * 1e6, "GMACs": paper[1]}
            row["difference, %"] = {k: 100 * (row[k] / v - 1) for k, v in row["paper"].items()}
        rows.append(row)
    return rows


def _notes(nets: Networks, costs: dict[str, Macs]) -> dict[str, str]:
    """What a reader must know of a row, and why it differs from the paper's by over 0.1 %."""
    queries = nets.tiny.query.numel()
    plain = sum(p.numel() for p in nets.tiny.parameters()) - queries
    return {
        "teacher": "Two passes of the base.",
        "full guide": f"With its hint encoder, {_giga(costs['hint encoder'].total)} G, which here "
                      "runs once per image and not once a step.",
        "tiny guide, on maps":
            f"Eq. 5 has {plain:,} of the parameters. The other {queries:,} are the queries by "
            "which the text becomes one vector; the paper leaves that open. Nor does the paper "
            "explain its arithmetic. Nearest to its figure is what is counted here: Θ_z1 at all "
            f"{nets.side ** 2:,} positions of the latent, Θ_z2 on all "
            f"{nets.text.config.positions} tokens, Θ_z3 at every position of its injection point.",
        "tiny guide, as computed":
            "Eq. 5 says the same at every position, so vectors are enough; adding them to the "
            "features broadcasts. Pooling the text is in the column with attention.",
        "seeing guide": "Not in the paper. It reads the encoder's features at every position.",
        "student": "Of the paper's predecessor, Meng et al. All of it is trained, and it replaces "
                   "the base.",
    }


def table1_page(result: dict) -> str:
    """Table 1 and the cost of images, in Markdown."""
    images = result["GMACs per image"]
    costs = [["CFG" if method == "cfg" else f"{method} guide",
              *(f"{_giga(g * 1e9)} ({g / images['cfg'][n]:.0%})" for n, g in cost.items())]
             for method, cost in images.items()]
    once = ", ".join(f"{name} {_giga(g * 1e9)}" for name, g in
                     result["GMACs once per image"].items())
    return "\n".join([
        f"Table 1: {result['of']}. GMACs of convolutions and linear layers, one pass; the paper "
        "calls them FLOPs (trillion).", "",
        *markdown_table(["", "parameters", "paper, M", "difference", "GMACs", "paper",
                         "difference", "with attention"], map(_row_cells, result["rows"]), "---:"),
        "", *(f"- *{name}*: {note}" for name, note in result["notes"].items()), "",
        "GMACs per image, with attention, text encoder and VAE decoder; in brackets the share of "
        "CFG's with as many steps.", "",
        *markdown_table(["", *(f"{n} steps" for n in STEPS)], costs, "---:"), "",
        f"Once per image: {once} (CFG encodes two texts; only the full guide has a hint)."])


def _row_cells(row: dict) -> list[str]:
    parameters = [f"{row['parameters']:,}", "", ""]
    gmacs = [_giga(row["GMACs"] * 1e9), "", ""]
    if paper := row.get("paper"):
        difference = row["difference, %"]
        parameters[1:] = f"{paper['parameters'] / 1e6:g}", f"{difference['parameters']:+.2f} %"
        gmacs[1:] = f"{paper['GMACs']:g}", f"{difference['GMACs']:+.2f} %"
    return [row["network"], *parameters, *gmacs, _giga(row["GMACs with attention"] * 1e9)]


def _giga(macs: float) -> str:
    """In 10⁹, five digits, or six places where it is small."""
    return f"{macs / 1e9:,.5g}" if macs >= 1e6 else f"{macs / 1e9:.6f}"
