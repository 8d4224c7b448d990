"""How much of the CFG correction a guide explains, and what it adds, by g and by t.

`eval.py match` measures ‖e − e_teacher‖² / ‖ε_c − e_teacher‖², as training reports it: 100 % is no
guide at all, 0 % a perfect one. It also samples each row of Table 2, and says how far its latents
end from those of CFG in 50 steps, as a share of the unguided ones' distance. `eval.py features`
measures what Section 5.4 of the paper says of the maps of Fig. 7: how strong they are, and how much
of them lies on the edges of the image.

Shapes: B images, Z latent channels, G guidance numbers, N steps of the grid, P injection points.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import ppdd
from evaluation import sampling
from evaluation.figures import residual_maps, residual_norms
from evaluation.report import markdown_table, protocol_list, result_file, write_result
from evaluation.sampling import Prompts, Row
from mini import postcards
from support.base import Base, find_weights
from support.cli import require
from support.machine import provenance, resolve_dtype

BINS = 10                       # of t
# Training sees noised images; sampling visits other latents, where errors of a guide build up.
SOURCES = ("noised real images", "CFG's own trajectories")


def match(config) -> None:
    """`match`: the share of the CFG correction that each stage-one guide leaves unexplained, and
    how far from CFG's latents every way of sampling ends."""
    config, base, every, prompts = _prepare(config)
    rows = stage_one(every, base)
    if config.rows:
        every = sampling.named_rows(config, every)
        rows = [row for row in rows if row in every]
        require((not rows, "--rows: name a guide of stage one too"))
    others = [row for row in every if row.name not in ("none-50", "cfg-50")]
    steps = 10 if config.quick else sampling.STAGE_ONE
    grid = ppdd.step_grid(steps)
    sums = torch.zeros(len(rows), len(SOURCES), len(config.g), BINS, 2, dtype=torch.float64)
    apart = torch.zeros(len(others), len(config.g), 2, dtype=torch.float64)
    with tqdm(total=config.count, unit="image", desc="match") as bar:
        for start in range(0, config.count, config.batch):
            part = slice(start, min(start + config.batch, config.count))
            sums += squared_errors(config, base, prompts, rows, part, grid)
            apart += latents_apart(config, base, prompts, others, part, steps)
            bar.update(part.stop - start)
    result = {"protocol": _protocol(config, base, prompts, steps), "correction": {
        source: _corrections(sums[0, j]) for j, source in enumerate(SOURCES)
        if prompts.own_captions or j}, "guides": {
        row.name: {"guide": row.source} | {
            source: _shares(config.g, sums[r, j]) for j, source in enumerate(SOURCES)
            if prompts.own_captions or j} for r, row in enumerate(rows)},
        "distance": {row.name: _distances(row, config.g, apart[r])
                     for r, row in enumerate(others)}}
    write_result(result_file(config), result, match_page(result))


def _prepare(config) -> tuple[object, Base, list[Row], Prompts]:
    """Settings, the base, the rows of Table 2 and what the base is asked for."""
    base = sampling.load(config, find_weights(config.weights))
    config = sampling.resolve_defaults(config)
    return config, base, sampling.make_rows(config, base), Prompts(config, base)


def stage_one(rows: list[Row], base: Base) -> list[Row]:
    """The rows with a guide that was not halved. Raises BadInput where there is none."""
    rows = [row for row in rows if row.guide and row.stage_one]
    return sampling.require_guides(rows, base, "stage-one guide")


def _protocol(config, base: Base, prompts: Prompts, steps: int) -> dict:
    return {"base": base.name, "base hash": base.sha256, "images": config.count,
            "prompts": config.prompts or "fresh captions of postcards, as in Table 2",
            "dtype": str(resolve_dtype(config.dtype, config.device)),
            "t": f"those of a run of {steps} steps", "steps": steps,
            "noise": f"seeds from {prompts.first_noise(config.seed)}", **provenance(config)}


@torch.no_grad()
def squared_errors(config, base: Base, prompts: Prompts, rows: list[Row], part: slice,
                   grid: list[int]) -> Tensor:
    """‖e − e_teacher‖² and ‖ε_c − e_teacher‖² of some images: (guides, SOURCES, G, BINS, 2).

    Each is summed over the images, and over the t of the grid in each bin.
    """
    texts, attributes = prompts.of(config.seed)
    c = base.embed(texts[part])                                                    # (B, L, D)
    empty = base.embed([""]).expand_as(c)
    seed = prompts.first_noise(config.seed) + part.start
    side = sampling.image_side(config, base) // 8
    start = ppdd.noise(range(seed, seed + len(c)), (base.unet.config.in_channels, side, side))
    trajectories = [start.to(c.device)] * len(config.g)                            # (B, Z, H, W)
    noised = None
    if prompts.own_captions:
        noised = noised_postcards(base, prompts.style, attributes[part], grid, seed)
    sums = torch.zeros(len(rows), len(SOURCES), len(config.g), BINS, 2, dtype=torch.float64)
    for i, (t, t_next) in enumerate(pairwise(grid)):
        times = torch.full((len(c),), t, device=c.device)
        k = t * BINS // ppdd.TIMESTEPS
        if noised:
            errors, _ = compare_with_teacher(base, rows, config.g, noised[i], times, c, empty)
            sums[:, 0, :, k] += errors
        for j, g in enumerate(config.g):
            errors, e_teacher = compare_with_teacher(base, rows, (g,), trajectories[j], times, c,
                                                     empty)
            sums[:, 1, j, k] += errors[:, 0]
            trajectories[j] = ppdd.ddim_step(trajectories[j], e_teacher, t, t_next)
    return sums


def compare_with_teacher(base: Base, rows: list[Row], gs: tuple[float, ...], z: Tensor, t: Tensor,
                         c: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (guides, G, 2) of one batch at one t, and Eq. 3 at the last g, (B, Z, H, W).

    The base runs once with the prompt and once without, for all guides and g.
    """
    unet = base.unet
    z = z.to(c)
    emb = unet.embed_time(t)
    features = unet.encode(z, emb, c)
    eps_c = unet.decode(features, emb, c).float()
    eps_empty = unet.decode(unet.encode(z, emb, empty), emb, empty).float()
    sums = torch.zeros(len(rows), len(gs), 2)
    for j, g in enumerate(gs):
        e_teacher = ppdd.cfg(eps_c, eps_empty, g)
        guidance = torch.full((len(z),), g, device=z.device)
        for r, row in enumerate(rows):
            if row.kind == "whole":
                e = row.guide(z, t, c, guidance)
            else:
                residuals = row.guide(guidance, emb, c, z, t, features)
                e = unet.decode(features, emb, c, residuals).float()
            errors = torch.stack([e - e_teacher, eps_c - e_teacher])
            sums[r, j] = errors.square().mean((2, 3, 4)).sum(1).cpu()
    return sums, e_teacher


def latents_apart(config, base: Base, prompts: Prompts, rows: list[Row], part: slice,
                  steps: int) -> Tensor:
    """‖z − z_CFG‖² and ‖z_none − z_CFG‖² of some images, summed: (rows, G, 2). z are the latents
    that a row ends with, z_CFG and z_none those of CFG and no guidance in so many steps, all from
    the same noise. A row for one g is 0 at the others."""
    texts, _ = prompts.of(config.seed)
    seed, side = prompts.first_noise(config.seed) + part.start, sampling.image_side(config, base)
    seeds = range(seed, seed + len(texts[part]))

    def sample(row: Row, g: float) -> Tensor:
        return sampling.sample_latents(base, row, texts[part], g, seeds, side)

    none, cfg = (row._replace(steps=steps) for row in sampling.WITHOUT_GUIDE[:2])
    unguided, sums = sample(none, 0.0), torch.zeros(len(rows), len(config.g), 2)
    for j, g in enumerate(config.g):
        expected = sample(cfg, g)
        for r, row in enumerate(rows):
            if g in row.g_values(config.g):
                sums[r, j] = torch.stack([(z - expected).square().sum()
                                          for z in (sample(row, g), unguided)]).cpu()
    return sums


def noised_postcards(base: Base, style: str, attributes: Tensor, grid: list[int], seed: int
                     ) -> list[Tensor]:
    """Real postcards of these attributes, noised to every t of the grid: z_t (B, Z, H, W) each."""
    generator = torch.Generator().manual_seed(seed)
    images = postcards.draw(attributes, style, generator).to(base.device)
    weight = next(base.vae.parameters())
    moments = base.vae.encode((images * 2 - 1).to(weight.dtype)).float()           # (B, 2Z, H, W)
    shape = (len(grid), len(moments), moments.shape[1] // 2, *moments.shape[2:])
    noise = torch.randn(shape, generator=generator).to(base.device)
    x = base.vae.sample(moments, noise[-1])
    return [ppdd.add_noise(x, eps, torch.full((len(x),), t, device=base.device))
            for t, eps in zip(grid[:-1], noise)]


def _shares(gs: tuple[float, ...], sums: Tensor) -> dict:
    """The shares in percent, of sums (G, BINS, 2): of all, by g and by t."""
    def share(part: Tensor) -> float:
        return round(100 * (part[..., 0].sum() / part[..., 1].sum()).item(), 2)

    return {"all": share(sums),
            "by g": {f"{g:g}": share(part) for g, part in zip(gs, sums)},
            "by t": {span: share(sums[:, b]) for b, span in enumerate(_spans())}}


def _corrections(sums: Tensor) -> dict[str, float]:
    """How much of ‖ε_c − e_teacher‖² of a whole run lies in each span of t, in percent."""
    parts = sums[..., 1].sum(0)                                                    # (BINS,)
    return {span: round(100 * (part / parts.sum()).item(), 2)
            for span, part in zip(_spans(), parts)}


def _spans() -> list[str]:
    width = ppdd.TIMESTEPS // BINS
    return [f"{b * width}–{(b + 1) * width - 1}" for b in range(BINS)]


def _distances(row: Row, gs: tuple[float, ...], sums: Tensor) -> dict:
    """Root mean square distances in percent of the unguided one, of sums (G, 2), by g."""
    return {"title": row.title, "by g": {
        f"{g:g}": round(100 * (part[0] / part[1]).sqrt().item(), 1)
        for g, part in zip(gs, sums) if g in row.g_values(gs)}}


def match_page(result: dict) -> str:
    """A table by g, one by t, and the protocol, in Markdown."""
    lines = ["# Teacher match: ‖e − e_teacher‖² / ‖ε_c − e_teacher‖² in percent", "",
             "100 is no guide at all, 0 a perfect one."]
    shares = [(name, source, guide[source]) for name, guide in result["guides"].items()
              for source in SOURCES if source in guide]
    for by in ("by g", "by t"):
        _, _, first = shares[0]
        columns = [f"{by[-1]} = {value}" for value in first[by]]
        lines += ["", *markdown_table(["guide", "on", "all", *columns],
                                      ([name, source, share["all"], *share[by].values()]
                                       for name, source, share in shares))]
    gs = list(first["by g"])
    lines += ["", "Where the correction is: the share of ‖ε_c − e_teacher‖² in each span of t, in "
              "percent:", "", *markdown_table(
                  ["on", *(f"t = {span}" for span in first["by t"])],
                  ([source, *parts.values()] for source, parts in result["correction"].items()))]
    steps = result["protocol"]["steps"]
    lines += ["", f"Distance of the final latents from those of CFG in {steps} steps, in percent "
              "of the unguided ones' distance:", "",
              *markdown_table(["", *(f"g = {g}" for g in gs)],
                              ([about["title"], *(about["by g"].get(g, "") for g in gs)]
                               for about in result["distance"].values()))]
    guides = [f"- {name}: {guide['guide']}" for name, guide in result["guides"].items()]
    return "\n".join([*lines, "", *protocol_list(result["protocol"]), *guides]) + "\n"


# ------------------------------------------------------------------------------- Section 5.4

PARTS = 5                       # of the t of a run


def features(config) -> None:
    """`features`: the norm of what each stage-one guide adds, and its share on edges."""
    config, base, rows, prompts = _prepare(config)
    rows = stage_one([row for row in rows if row.kind != "whole"], base)    # which adds nothing
    result = {"protocol": _protocol(config, base, prompts, sampling.STAGE_ONE), "guides": {}}
    for row in tqdm(rows, desc="features", unit="guide"):
        measure = tiny_features if row.kind == "tiny" else full_features
        values = {f"{g:g}": measure(config, base, row, prompts, g) for g in config.g}
        result["guides"][row.name] = {"guide": row.source} | {
            name: {g: _parts(value[name]) for g, value in values.items()}
            for name in ("norm", "on edges") if row.kind != "tiny" or name == "norm"}
    write_result(result_file(config), result, features_page(result))


@torch.no_grad()
def tiny_features(config, base: Base, row: Row, prompts: Prompts, g: float) -> dict[str, Tensor]:
    """The norm, as in `full_features`. A tiny guide adds the same everywhere: its share is 1."""
    c = base.embed(prompts.of(config.seed)[0])
    times = torch.tensor(ppdd.step_grid(row.steps)[:-1], device=c.device)
    norms = torch.stack([residual_norms(row.guide, g, base.unet.embed_time(times), prompt)
                         for prompt in c])                                         # (B, P, N)
    return {"norm": norms.square().sum(1).sqrt().mean(0)}


def full_features(config, base: Base, row: Row, prompts: Prompts, g: float) -> dict[str, Tensor]:
    """What a guide that sees the image adds in sampling: its norm (N,), its share on edges (N,).

    The squared norm is the mean over positions of a residual's square, summed over channels and
    injection points. The share is the mean square on the image's edges over that of all positions:
    1 where edges get what they would by chance.
    """
    texts, _ = prompts.of(config.seed)
    side, seed = sampling.image_side(config, base), prompts.first_noise(config.seed)
    norms, shares = [], []
    for start in range(0, len(texts), config.batch):
        maps, images = residual_maps(base, row, texts[start:start + config.batch], g, seed + start,
                                     side, lambda r: r.square().sum(1))
        edges = [edge_mask(images, part.shape[1:]) for part in maps[0]]
        everywhere = torch.stack([sum(part.mean((1, 2)) for part in step) for step in maps])
        on_edges = torch.stack([sum((part * mask).sum((1, 2)) / mask.sum((1, 2))
                                    for part, mask in zip(step, edges)) for step in maps])
        norms.append(everywhere.sqrt())                                            # (N, B)
        shares.append(on_edges / everywhere)
    return {"norm": torch.cat(norms, 1).mean(1), "on edges": torch.cat(shares, 1).mean(1)}


def edge_mask(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Where images (B, 3, S, S) have the strongest Sobel gradients: a fifth of (B, H, W) cells."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), "replicate")
    gradient = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1)  # (B, S, S)
    cells = F.adaptive_avg_pool2d(gradient, size)
    strongest = cells.flatten(1).topk(round(cells[0].numel() / 5)).indices
    return torch.zeros_like(cells).flatten(1).scatter(1, strongest, 1).view_as(cells)


def _parts(values: Tensor) -> dict[str, float]:
    """The means of values (N,) of a run's steps over PARTS ranges of t, from noise to image."""
    width = ppdd.TIMESTEPS // PARTS
    return {f"{k * width}–{(k + 1) * width - 1}": round(part.mean().item(), 3)
            for k, part in zip(reversed(range(PARTS)), values.tensor_split(PARTS))}


def features_page(result: dict) -> str:
    """A table of the norm, one of the share on edges, and the protocol, in Markdown."""
    lines = ["# What the guides add to the decoder"]
    for name, about in (("norm", "Norm of all residuals at a position, root mean square"),
                        ("on edges", "Mean square on the edges of the final image, the fifth of "
                                     "its cells with the strongest gradients, over that of all; "
                                     "Eq. 5's guide adds the same everywhere, which is 1")):
        parts = [(guide, g, values) for guide, entry in result["guides"].items()
                 for g, values in entry.get(name, {}).items()]
        if not parts:
            continue
        lines += ["", about + ":", "", *markdown_table(
            ["guide", "g", *(f"t = {t}" for t in parts[0][2])],
            ([guide, g, *values.values()] for guide, g, values in parts))]
    guides = [f"- {name}: {guide['guide']}" for name, guide in result["guides"].items()]
    return "\n".join([*lines, "", *protocol_list(result["protocol"]), *guides]) + "\n"
