"""Tables 2 and 3: distance, CLIP score and caption accuracy of every way of sampling.

A cell is one row at one g from one seed. Its folder below runs/eval holds its images and cell.json,
with all that determines them and, once measured, their scores. A table is a fold over those files:
a cell whose settings did not change is neither sampled nor measured again, and a killed run goes
on where it was.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from evaluation import report, sampling
from evaluation.metrics import JUDGE_ACCURACY, Metrics
from evaluation.report import RUNS, bullet_list, markdown_table, plus_minus
from evaluation.sampling import Prompts, Row
from mini import postcards
from support import images
from support.base import Base, base_name, find_weights
from support.cli import BadInput, require
from support.distributed import barrier, broadcast, init_distributed, rank, world_size
from support.files import write_json
from support.machine import commit, hardware, provenance, resolve_dtype

TITLES = {"table2": "Table 2: guides, CFG and their numbers of steps",
          "table3": "Table 3: guides of the plain base, plugged into fine-tuned bases untrained",
          "few": "Few steps: a distilled UNet, and guides beside it"}
ONE_PER_FILE = ("prompts", "images a cell and seed", "seeds", "g", "size")    # of the protocol


# ------------------------------------------------------------------------------- cells

class Cell(NamedTuple):
    """Images of one row, at one g, from one seed."""

    row: Row
    g: float
    seed: int


class Cells:
    """The cells of one base: where they are, what determines them, and their scores."""

    def __init__(self, config, base: Base, real: str = ""):
        self.config = config
        self.base = base
        self.base_hash = base.sha256            # read once: a checkpoint has gigabytes
        self.side = sampling.image_side(config, base)
        self.prompts = Prompts(config, base)
        self.metrics = Metrics(config, base, self.prompts, self.side, real)

    def settings(self, cell: Cell) -> dict:
        """All that changes a cell's images."""
        prompts = json.dumps(self.prompts.of(cell.seed)[0]).encode()
        row = cell.row
        return {"base": self.base_hash, "kind": row.kind, "steps": row.steps,
                "sampler": row.sampler, "guide": row.guide_hash, "g": cell.g,
                "first noise seed": self.prompts.first_noise(cell.seed),
                "prompts": hashlib.sha256(prompts).hexdigest(), "size": self.side,
                "batch": self.config.batch, "device": self.config.device.split(":")[0],
                "dtype": str(resolve_dtype(self.config.dtype, self.config.device)),
                "torch": torch.__version__, **row.unusual}

    def folder(self, cell: Cell) -> Path:
        """The cell's folder; a hash of its settings is in the name, so that they never mix."""
        key = hashlib.sha256(json.dumps(self.settings(cell)).encode()).hexdigest()[:12]
        name = f"{cell.row.name}-g{cell.g:g}-seed{cell.seed}"
        return RUNS / self.base.name / key / name

    def read(self, cell: Cell) -> dict:
        """What the cell's file says; nothing where there is none, or none that can be read."""
        try:
            return json.loads((self.folder(cell) / "cell.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell has scores, by the present metrics."""
        stored = self.read(cell)
        return "scores" in stored and stored.get("measured by") == self.metrics.settings

    def sample(self, cell: Cell, progress: Callable[[int], object]) -> None:
        """This process's share of a cell's batches, where they are not on disk yet.

        Batch b always holds the same images, as rounding depends on the batch: so neither a
        resumed run nor the number of processes changes a bit. progress(n) follows n images.
        """
        folder = self.folder(cell)
        prompts, _ = self.prompts.of(cell.seed)
        first = self.prompts.first_noise(cell.seed)
        if rank() == 0 and not self.read(cell):
            write_json(folder / "cell.json", {"settings": self.settings(cell), "commit": commit(),
                                              "hardware": hardware(self.config.device)})
        for b, start in enumerate(range(0, len(prompts), self.config.batch)):
            part = prompts[start:start + self.config.batch]
            files = [folder / f"{start + i:05d}.png" for i in range(len(part))]
            if b % world_size() == rank() and not all(file.exists() for file in files):
                seeds = range(first + start, first + start + len(part))
                batch = sampling.generate(self.base, cell.row, part, cell.g, seeds, self.side)
                for file, image in zip(files, batch):
                    images.save_png(file, images.to_image(image))
            progress(len(part))

    def measure(self, cell: Cell) -> None:
        """Scores a cell whose images are there, and notes the scores in its file."""
        folder = self.folder(cell)
        scores = self.metrics.score(folder, *self.prompts.of(cell.seed))
        write_json(folder / "cell.json", self.read(cell) | {
            "measured by": self.metrics.settings, "scores": scores})

    def run(self, cells: list[Cell], bar: tqdm) -> None:
        """Brings every cell to its scores: all processes sample it, the first measures it."""
        done = broadcast([self.is_done(cell) for cell in cells] if rank() == 0 else None)
        for cell, is_done in zip(cells, done):
            if is_done:
                bar.update(self.config.count)
                continue
            self.sample(cell, bar.update)
            barrier()
            if rank() == 0:
                self.measure(cell)

    def fold(self, cells: list[Cell]) -> dict:
        """The rows of a result, from the cells' files: scores by g, over the seeds."""
        rows: dict[str, dict] = {}
        for cell in cells:
            row = rows.setdefault(cell.row.name, describe_row(cell.row))
            seeds = row["cells"].setdefault(f"{cell.g:g}", {"seeds": {}})["seeds"]
            stored = self.read(cell)
            seeds[str(cell.seed)] = {"key": self.folder(cell).parent.name,
                                     "commit": stored["commit"], **stored["scores"]}
        for row in rows.values():
            row["cells"] = {g: summary(entry["seeds"]) for g, entry in row["cells"].items()}
        return rows

    def time_rows(self, rows: list[Row]) -> dict[str, dict]:
        """Milliseconds an image, from prompt to pixels: rounds of one batch a row, in turn.

        In turn, so that what slows the machine for a while slows all rows alike. The first round
        only warms up.
        """
        times: dict[str, list[float]] = {row.name: [] for row in rows}
        prompts = self.prompts.of(self.config.seed)[0][:self.config.batch]
        for k in tqdm(range(self.config.repeats + 1), desc="timing", unit="round"):
            for row in rows:
                start = time.perf_counter()
                timed = row if k else row._replace(steps=2)
                g = row.g_values(self.config.g)[-1]
                sampling.generate(self.base, timed, prompts, g, range(len(prompts)), self.side)
                if k:
                    elapsed = time.perf_counter() - start
                    times[row.name].append(1000 * elapsed / len(prompts))
        return {name: {"median": round(statistics.median(rounds), 2), "spread": _spread(rounds, 2),
                       "rounds": [round(value, 2) for value in rounds]}
                for name, rounds in times.items()}


def describe_row(row: Row) -> dict:
    """A row of a result, still without cells."""
    unet, guide = row.passes
    return {"title": row.title, "steps": row.steps, "UNet passes": unet, "guide passes": guide,
            "guide": row.source, **row.unusual, "cells": {}}


def summary(seeds: dict[str, dict]) -> dict:
    """Mean and spread (standard deviation, n − 1) of every score over the seeds."""
    names = [name for name, value in next(iter(seeds.values())).items()
             if not isinstance(value, str)]
    values = {name: [scores[name] for scores in seeds.values()] for name in names}
    return {"mean": {name: round(statistics.fmean(v), 6) for name, v in values.items()},
            "spread": {name: _spread(v, 6) for name, v in values.items()}, "seeds": seeds}


def _spread(values: list[float], digits: int) -> float | None:
    return round(statistics.stdev(values), digits) if len(values) > 1 else None


# ------------------------------------------------------------------------------- the commands

def table2(config) -> None:
    """`table2`: every row for one base, into results/table2.json and .md."""
    _tabulate_one_base(config, sampling.make_rows)


def few(config) -> None:
    """`few`: a distilled UNet, and guides in 8 steps and fewer, into results/few.json and .md."""
    _tabulate_one_base(config, sampling.few_rows)


def _tabulate_one_base(config, rows_of: Callable[[object, Base], list[Row]]) -> None:
    with init_distributed(config.device) as device:
        config = replace(config, device=device)
        base = sampling.load(config, find_weights(config.weights))
        require((len(config.real) > 1,
                 f"--real: {config.command} has one base, and one set of real images"))
        rows = rows_of(config, base)
        tabulate(sampling.resolve_defaults(config), rows, [base], [base.name])


def table3(config) -> None:
    """`table3`: the plain base's guides in fine-tuned bases, into results/table3.json and .md."""
    paths = sampling.style_files(config)
    with init_distributed(config.device) as device:
        config = replace(config, device=device)
        first = sampling.load(config, paths[0])
        bases = (sampling.load(config, path) if k else first for k, path in enumerate(paths))
        tabulate(sampling.resolve_defaults(config), sampling.plugged_in_rows(config, first), bases,
                 [base_name(path) for path in paths])


def tabulate(config, rows: list[Row], bases: Iterable[Base], names: list[str]) -> None:
    """Samples, measures and times all rows on all bases, and writes the table."""
    file = report.result_file(config)
    previous = read_result(file)
    require((len(config.real) not in (0, 1, len(names)),
             f"--real: one set of images for all bases, or {len(names)}, one each"))
    check_kept(file, "bases", previous["bases"], names)
    every, rows = rows, [row for row in rows if row.g_values(config.g)]
    measured = sampling.named_rows(config, rows)
    cells = [Cell(row, g, seed) for row in measured for g in row.g_values(config.g)
             for seed in range(config.seed, config.seed + config.seeds)]
    result: dict[str, dict] = {"protocol": {}, "bases": {}}
    shapes = set()
    with tqdm(total=len(names) * len(cells) * config.count, unit="image", desc=config.command,
              disable=rank() > 0) as bar:
        for k, base in enumerate(bases):
            shapes.add(base.unet.config)
            require((len(shapes) > 1, f"{base.path} has another size than a base before it: give "
                                      "fine-tunes of one base"))
            work = Cells(config, base, config.real[k % len(config.real)] if config.real else "")
            if rank() == 0:
                result["protocol"] = protocol(work)
                check_same(file, previous, result["protocol"], work, rows)
                kept, times = {}, {}
                if config.rows:
                    kept = kept_rows(work, every, previous)
                    times = kept_times(work, measured, previous, result["protocol"])
                if kept:                # which may have been measured at more g
                    result["protocol"]["g"] = sorted({*config.g, *previous["protocol"]["g"]})
            here = {row.name: row.on(base) for row in rows}
            cells = [cell._replace(row=here[cell.row.name]) for cell in cells]
            work.run(cells, bar)
            if rank() == 0:
                order = [row.name for row in every]
                result["bases"][base.name] = finished_base(
                    work, cells, [here[row.name] for row in measured], kept, times, order)
            barrier()
    if rank() == 0:
        report.write_result(file, result, table_page(config.command, result))
        print("images in", ", ".join(str(RUNS / name) for name in result["bases"]))


def finished_base(work: Cells, cells: list[Cell], rows: list[Row], kept: dict, times: dict,
                  order: list[str]) -> dict:
    """A base's part of a result, once the cells of these rows have their scores.

    Kept rows come with it, in the order given; rows whose times are kept are not timed again.
    """
    untimed = [row for row in rows if row.name not in times]
    times |= work.time_rows(untimed) if untimed else {}
    folded = kept | {name: row | {"milliseconds": times[name]}
                     for name, row in work.fold(cells).items()}
    names = dict.fromkeys((*(name for name in order if name in folded), *folded))
    return {"base hash": work.base_hash, "measured by": work.metrics.describe(),
            "rows": {name: folded[name] for name in names}}


def origin(protocol: dict) -> dict:
    """What a row that is kept says of the run that measured it."""
    return {"torch": protocol["versions"]["torch"], "commit": protocol["commit"],
            "hardware": protocol["hardware"]}


def kept_times(work: Cells, rows: list[Row], previous: dict, now: dict) -> dict:
    """The times that the file has of these rows, by name.

    All rows of a table should be timed in turn: times of another day can't be compared with them.
    A time is not kept where the guide, the base, the dtype or the hardware has changed.
    """
    before, made = previous["bases"].get(work.base.name, {}), previous["protocol"]
    if before.get("base hash") != work.base_hash or made["dtype"] != now["dtype"]:
        return {}
    times = {row.name: {"kept from": origin(made)} | before["rows"][row.name]["milliseconds"]
             for row in rows if before["rows"].get(row.name, {}).get("guide", "") == row.source}
    return {name: time for name, time in times.items()
            if time["kept from"]["hardware"] == now["hardware"]}


def kept_rows(work: Cells, rows: list[Row], previous: dict) -> dict:
    """The file's rows that --rows leaves out; each says what it was made with.

    A row whose guide is not at hand is kept too. Raises BadInput where one is of another base or
    guide than this run's, and where one to measure would lose a g that the file has.
    """
    before, made = previous["bases"].get(work.base.name, {}), previous["protocol"]
    config, here, result = work.config, {row.name: row for row in rows}, {}
    from_before = {"kept from": origin(made)} if made else {}
    for name, found in before.get("rows", {}).items():
        row = here.get(name)
        if name in config.rows:
            check_kept(f"--rows {name}: the file", "g", found["cells"],
                       [f"{g:g}" for g in row.g_values(config.g)])
            continue
        same = not row or (found["guide"], found.get("moved from")) == (
            row.source, row.unusual.get("moved from"))
        require((not same or before["base hash"] != work.base_hash,
                 f"--rows leaves out {name}, which the file has of another base or guide: name it "
                 "too, or pass --out for a file of its own"))
        result[name] = from_before | found | {"milliseconds": from_before | found["milliseconds"]}
    return result


def read_result(file: Path) -> dict:
    """What an earlier run wrote, or an empty result. Raises BadInput for anything else."""
    if not file.exists():
        return {"protocol": {}, "bases": {}}
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        return {"protocol": result["protocol"], "bases": dict(result["bases"])}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} is no result of this command: move it away") from error


def check_kept(file: Path | str, what: str, before: Iterable[str], now: Iterable[str]) -> None:
    """Raises BadInput where a result file holds something that this run would drop."""
    lost = [name for name in before if name not in {*now}]
    require((lost, f"{file} holds other {what} too ({', '.join(lost)}): pass --out for a file of "
                   "its own, or move that one away"))


def check_same(file: Path, previous: dict, now: dict, work: Cells, rows: list[Row]) -> None:
    """Raises BadInput where a result file was made with other settings, metrics or more rows."""
    before = previous["bases"].get(work.base.name, {})
    changed = [k for k in ONE_PER_FILE
               if previous["protocol"] and previous["protocol"].get(k) != now[k]
               and not (work.config.rows and k == "g")]     # a row may have fewer
    require((changed, f"{file} holds a result of another setting ({', '.join(changed)}): pass "
                      "--out for a file of its own, or move that one away"))
    if not work.config.rows:
        check_kept(file, "rows", before.get("rows", {}), [row.name for row in rows])
    metrics = work.metrics.settings
    measured = before.get("measured by", metrics)
    changed = [k for k in metrics if measured.get(k) != metrics[k]]
    require((changed, f"{file} was measured by another {', '.join(changed)}: pass --out for a "
                      "file of its own, or move that one away"))


def protocol(work: Cells) -> dict:
    """What a reader must know to make a table again, or to compare it with another."""
    config = work.config
    return {
        "prompts": config.prompts or "fresh captions of postcards that name all six attributes",
        "images a cell and seed": config.count,
        "seeds": list(range(config.seed, config.seed + config.seeds)), "g": list(config.g),
        "noise": f"image k of seed s starts from noise {sampling.FIRST_NOISE} + "
                 f"{sampling.NOISE_PER_SEED} s + k",
        "spread": "standard deviation over the seeds, n − 1",
        "size": f"{work.side} × {work.side}, batches of {config.batch}",
        "steps": "t_i = round(1000 i / N) − 1; on SD's own spacing t = 981, 961 … 1",
        "milliseconds": f"an image, from prompt to pixels; median of {config.repeats} rounds of "
                        f"one batch of {min(config.batch, config.count)}, rows in turn",
        "dtype": str(resolve_dtype(config.dtype, config.device)), "processes": world_size(),
        **provenance(config)}


# ------------------------------------------------------------------------------- the page

def table_page(command: str, result: dict) -> str:
    """A result in Markdown: the table, then its protocol."""
    rows = [(name, row) for name, base in result["bases"].items() for row in base["rows"].values()]
    gs = sorted({g for _, row in rows for g in row["cells"]}, key=float)
    measured = next(iter(result["bases"].values()))["measured by"]
    scores = [measured["distance"], "CLIP score"]
    scores += ["caption accuracy in %"] if JUDGE_ACCURACY in measured else []
    cells = [[name, row["title"], report.passes_text(row["UNet passes"], row["guide passes"]),
              plus_minus(row["milliseconds"]["median"], row["milliseconds"]["spread"]),
              *(_cell_text(row["cells"].get(g)) for g in gs)] for name, row in rows]
    lines = [f"# {TITLES[command]}", "", f"Cells: {' / '.join(scores)}; mean ± spread.", "",
             *markdown_table(["base", "method", "passes", "ms", *(f"g = {g}" for g in gs)], cells),
             "", "Protocol:", "", *report.protocol_list(result["protocol"])]
    for name, base in result["bases"].items():
        lines += _base_lines(name, base)
    return "\n".join(lines) + "\n"


def _cell_text(cell: dict | None) -> str:
    """Distance / CLIP score / caption accuracy; nothing where none was measured."""
    names = [name for name in cell["mean"] if name not in postcards.ATTRIBUTES] if cell else []
    return " / ".join(plus_minus(cell["mean"][name], cell["spread"][name],
                                 4 if name == "CLIP-FID" else 2) for name in names)


def _base_lines(name: str, base: dict) -> list[str]:
    """A base's hash, what it was measured by, and its guides."""
    measured = base["measured by"]
    networks = {key: ", ".join(f"{k} {v}" for k, v in measured[key].items())
                for key in ("features", "CLIP")}
    guides = {name: row["guide"] for name, row in base["rows"].items() if row["guide"]}
    for what, rows in (("scores", base["rows"]), ("times", {
            name: row["milliseconds"] for name, row in base["rows"].items()})):
        kept = {name: row["kept from"] for name, row in rows.items() if "kept from" in row}
        measured = measured | {f"{what} kept from a run at commit {made['commit']}, torch "
                               f"{made['torch']}, {made['hardware']}": ", ".join(
                                   name for name, other in kept.items() if other == made)
                               for made in kept.values()}
    entries = bullet_list({"SHA-256": base["base hash"]} | measured)
    return ["", f"Base {name}:", "", *entries, *bullet_list(networks | guides)]
