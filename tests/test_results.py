"""RESULTS.md and README.md show the numbers of the result files, digit for digit."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean, median, stdev

import pytest

import train
from evaluation.report import passes_text
from mini.judge import judge_hash
from mini.study import batches_study, longer_study, looking_study, seeds_study, student_study

ROOT = Path(__file__).resolve().parent.parent
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
ACCURACY = "caption accuracy"
JUDGED = "judge on real images, %"
NOISED, TRAJECTORIES = "noised real images", "CFG's own trajectories"
# Options that trials of results/tuning.json used, and that train.py no longer has.
REMOVED = {"ema", "form: product", "pool: mean", "pool: end"}


def results(name: str):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def cell_of(row: dict, g: str = "8") -> dict:
    """A row's measurements at one g; those without guidance are at g = 0."""
    return row["cells"].get(g) or row["cells"]["0"]


def score(row: dict, name: str = ACCURACY, g: str = "8", spread: bool = False) -> str:
    cell, digits = cell_of(row, g), 4 if name == "CLIP-FID" else 1
    mean = f"{cell['mean'][name]:.{digits}f}"
    return f"{mean} ± {cell['spread'][name]:.{digits}f}" if spread else mean


def passes(row: dict) -> str:
    return passes_text(row["UNet passes"], row["guide passes"])


def table2_rows() -> dict:
    return results("table2")["bases"]["mini"]["rows"]


# ------------------------------------------------------------------------------- tables

def table1() -> Iterator[str]:
    for row in results("table1")["rows"]:
        paper = row.get("paper")
        theirs = (f"{paper['parameters'] / 1e6:g} M", f"{paper['GMACs']:g}") if paper else "––"
        yield (f"| {row['network']} | {row['parameters']:,} | {row['GMACs']:,.5g} "
               f"| {' | '.join(theirs)} |")


def table2() -> Iterator[str]:
    for row in table2_rows().values():
        scores = (score(row, name, spread=True) for name in ("CLIP-FID", "CLIP", ACCURACY))
        yield (f"| {row['title']} | {passes(row)} | {row['milliseconds']['median']:.0f} "
               f"| {' | '.join(scores)} |")


def table3_rows() -> dict[str, dict]:
    """Rows by name, of every style."""
    return {style: base["rows"] for style, base in results("table3")["bases"].items()}


def table3() -> Iterator[str]:
    """A line a method, a column a style."""
    styles = table3_rows()
    for name, first in styles["watercolor"].items():
        cells = (f"{score(rows[name], 'CLIP-FID')} / {score(rows[name], spread=True)}"
                 for rows in styles.values())
        yield f"| {first['title']} | {' | '.join(cells)} |"


def few_steps() -> Iterator[str]:
    """The student beside CFG and guides, from 50 steps to one."""
    for row in results("few")["bases"]["mini"]["rows"].values():
        yield (f"| {row['title']} | {passes(row)} | {score(row, 'CLIP-FID', spread=True)} "
               f"| {score(row, spread=True)} |")


def match() -> Iterator[str]:
    for name, shares in results("match")["guides"].items():
        yield f"| {name} | {shares[NOISED]['all']:.1f} | {shares[TRAJECTORIES]['all']:.1f} |"


def studied(groups: Iterator[list[dict]], states: int = 25_600) -> Iterator[dict]:
    """The rows of results/study.json that a study of mini/study.py asks for."""
    for settings in chain.from_iterable(groups):
        (row,) = (row for row in results("study")
                  if (row["settings"], row["states"]) == (settings, states))
        yield row


def batch_sizes() -> Iterator[str]:
    """A column for each batch size; a line for each kind of guide, and for its lower rates and its
    higher ones."""
    lines: dict[tuple, dict] = {}
    for row in studied(batches_study()):
        made = row["settings"]
        name = "full" if made["guide"] == "full" else made["form"]
        name += ", AdamW" if made["optimizer"] == "adamw" else ""
        k = 1 if made["batch"] in lines.get((name, 0), {}) else 0
        lines.setdefault((name, k), {})[made["batch"]] = row
    for (name, _), by_batch in lines.items():
        rows = [by_batch.get(batch) for batch in (32, 128, 512)]
        rates = ", ".join(f"{row['settings']['lr']:g}" for row in rows if row)
        left = (f"{100 * row['unexplained']:.1f}" if row else "" for row in rows)
        yield f"| {name} | {rates} | {' | '.join(left)} |"


def longer() -> Iterator[str]:
    """A line for each kind of guide and number of images, a column for each batch size."""
    for kind, name in (("tiny", "seeing"), ("full", "full")):
        for states in (25_600, 60_000):
            left = left_by_batch(kind, states)
            cells = (f"{100 * left[batch]:.1f}" for batch in (32, 128, 512))
            yield f"| {name} | {states:,} | {' | '.join(cells)} |"


def left_by_batch(kind: str, states: int) -> dict[int, float]:
    return {row["settings"]["batch"]: row["unexplained"]
            for row in studied(longer_study(), states) if row["settings"]["guide"] == kind}


def looking() -> Iterator[str]:
    """Forms, and the seeing one with one thing changed."""
    for row in studied(looking_study()):
        name = row["settings"].get("variant") or row["settings"]["form"]
        yield f"| {name} | {row['parameters']:,} | {100 * row['unexplained']:.1f} |"


def students() -> Iterator[str]:
    """Students beside full guides that trained on the same images."""
    for row in studied(student_study()):
        made = row["settings"]
        name = "student" if made["guide"] == "whole" else "full guide"
        optimizer = {"muon": "Muon", "adamw": "AdamW"}[made["optimizer"]]
        yield (f"| {name}, {optimizer}, {made['lr']:g} | {row['parameters']:,} "
               f"| {100 * row['unexplained']:.1f} |")


def over_trainings() -> Iterator[str]:
    """Mean and standard deviation over the trainings that differ in nothing but their seed."""
    kinds: dict[str, list[dict]] = {}
    for row in studied(seeds_study()):
        made = row["settings"]
        name = f"{made['form']}, trained at g = 8 only" if "g" in made else made["form"]
        kinds.setdefault(name, []).append(row)
    for name, rows in kinds.items():
        cells = [mean_sd([100 * row["unexplained"] for row in rows])]
        for setting in (f"g = {g}, {steps} steps" for g in (2, 8) for steps in (16, 8)):
            values = [100 * row[ACCURACY][setting] for row in rows if setting in row[ACCURACY]]
            cells.append(mean_sd(values) if values else "")
        yield f"| {name} | {' | '.join(cells)} |"


def mean_sd(values: list[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


def inversion() -> Iterator[str]:
    for row in results("inversion")["rows"].values():
        cells = (f"{row['by g'][g]:.1f}" if g in row["by g"] else "" for g in "2468")
        yield f"| {row['title']} | {' | '.join(cells)} |"


def distances() -> Iterator[str]:
    """How far each way ends from CFG's latents."""
    for row in results("match")["distance"].values():
        cells = (f"{row['by g'][g]:.1f}" if g in row["by g"] else "" for g in ("2", "8"))
        yield f"| {row['title']} | {' | '.join(cells)} |"


def seeing() -> Iterator[str]:
    """The stage-one guides side by side, at g = 8 and 50 steps."""
    match = results("match")
    for name in ("full", "tiny", "tiny-gated", "tiny-seeing"):
        row, shares = table2_rows()[name], match["guides"][name]
        cells = (f"{shares[NOISED]['all']:.1f}", f"{shares[TRAJECTORIES]['all']:.1f}",
                 f"{match['distance'][name]['by g']['8']:.1f}", score(row),
                 score(row, "CLIP-FID"))
        yield f"| {name} | {' | '.join(cells)} |"


def other_trainings() -> Iterator[str]:
    """Bundled guides of stage one, and others of results/table2-trials.json, in 50 steps."""
    trained = results("table2-trials")["bases"]["mini"]["rows"]
    rows, bundled, others = table2_rows() | trained, results("match"), results("match-trials")
    for kind in ("tiny", "tiny-gated", "tiny-seeing"):
        for name in (kind, f"{kind}-muon", f"{kind}-further", f"{kind}-all"):
            if name in rows:
                match = bundled if name == kind else others
                shares = match["guides"][name]
                yield (f"| {name} | {shares[NOISED]['all']:.1f} "
                       f"| {shares[TRAJECTORIES]['all']:.1f} "
                       f"| {match['distance'][name]['by g']['8']:.1f} "
                       f"| {score(rows[name], g='2')} | {score(rows[name])} "
                       f"| {score(rows[name], 'CLIP-FID')} |")


def features() -> Iterator[str]:
    guides = results("features")["guides"]
    for name, guide in guides.items():
        yield f"| {name}, norm | {' | '.join(f'{v:.1f}' for v in guide['norm']['8'].values())} |"
    for name, guide in guides.items():
        if "on edges" in guide:
            shares = guide["on edges"]["8"].values()
            yield f"| {name}, share on edges | {' | '.join(f'{v:.2f}' for v in shares)} |"


def trials() -> Iterator[str]:
    """The rows of results/tuning.json that have a caption accuracy; those of 16 steps first."""
    for row in sorted(results("tuning"), key=lambda row: row.get("steps") != 16):
        if ACCURACY in row:
            shares = (f"{100 * row[ACCURACY][g]['all']:.1f}" for g in ("g = 2", "g = 8"))
            yield f"| {trial_name(row['settings'])} | {row['steps']} | {' | '.join(shares)} |"


def trial_name(settings: dict) -> str:
    if settings["guide"] == "cfg":
        return "CFG"
    if "start-steps" in settings:
        halved = settings["sampled"] == "made"
        return f"{settings['guide']} guide, " + (
            f"halved to {settings['steps']} steps" if halved else "halved to 8 steps only")
    changed = {k: v for k, v in settings.items()
               if k in ("loss", "form", "trajectories", "ema") and v != "sum"}
    name = " ".join(f"`--{k} {v}`" for k, v in changed.items()) or "as in the paper"
    if "init" in settings:
        name += f", {settings['updates']:,} updates (bundled)"
    return name + " †" * any({k, f"{k}: {v}"} & REMOVED for k, v in changed.items())


def speed() -> Iterator[str]:
    for ratio in results("speed-sd15-cpu")["ratios"]:
        yield f"| {ratio['ratio']} | {ratio['side']} × {ratio['side']} | {ratio['median']:.2f} |"


def gpu_rows() -> dict[tuple, dict]:
    """Rows of results/speed-sd15-cuda.json by what was measured, side and batch."""
    return {(row["what"], row["side"], row["batch"]): row
            for row in results("speed-sd15-cuda")["rows"]}


def speed_on_a_gpu() -> Iterator[str]:
    rows = gpu_rows()

    def ms(what: str, batch: int) -> str:
        row = rows.get((what, 64, batch))
        return f"{row['ms']:,.4g}" if row else ""

    for work in ("UNet pass", "VAE decode", "text encoding"):
        for who in ("", "diffusers: "):
            name = f"{who}{work}, captured"
            yield f"| {name} | {' | '.join(ms(name, batch) for batch in (1, 4, 16))} |"
    for method in ("CFG", "full", "tiny"):
        name = f"{method} step, captured"
        yield f"| {name} | {' | '.join(ms(name, batch) for batch in (1, 4, 16))} |"
    for steps in (8, 50):
        for method in ("CFG", "full", "tiny", "diffusers: CFG"):
            name = f"{method} image, {steps} steps"
            yield f"| {name} | {' | '.join(ms(name, batch) for batch in (1, 4, 16))} |"


def eager_on_a_gpu() -> Iterator[str]:
    for name in ("UNet pass", "diffusers: UNet pass", "CFG step", "full step", "tiny step"):
        yield f"| {name} | {gpu_rows()[name, 64, 1]['ms']:,.4g} |"


def growth_on_a_gpu() -> Iterator[str]:
    for side in (32, 64, 96):
        cells = (f"{gpu_rows()[f'{who}UNet pass, captured', side, 1]['ms']:,.4g}"
                 for who in ("", "diffusers: "))
        yield f"| {side} × {side} | {' | '.join(cells)} |"


def training_on_a_gpu() -> Iterator[str]:
    def cells(work: str, key: str) -> str:
        return " | ".join(f"{gpu_rows()[f'{guide} {work}', 64, 8][key]:.1f}"
                          for guide in ("tiny", "full"))

    for work in ("stage-one update", "stage-one update, naive", "halving update"):
        yield f"| {work}, ms | {cells(work, 'ms')} |"
    yield f"| stage one, images a second | {cells('stage-one update', 'images/s')} |"
    yield f"| peak memory, GiB | {cells('stage-one update', 'GiB')} |"


def miniature() -> Iterator[str]:
    mini = results("mini")
    styles = mini["judge on real images of other styles"]
    for name, share in (
            ("caption accuracy without guidance, 50 steps", mini["no guidance"][ACCURACY]["all"]),
            ("caption accuracy with CFG, g = 8, 50 steps", mini["CFG"][ACCURACY]["all"]),
            ("accuracy of the classifier on real postcards", mini["judge on real images"]["all"]),
            *((f"accuracy of the classifier on real {style} images", share)
              for style, share in styles.items())):
        yield f"| {name} | {100 * share:.1f} % |"
    error = mini["reconstruction error, mean absolute"]
    yield f"| mean error of the autoencoder, of a pixel's range | {error:.3f} |"


def beside_the_paper() -> Iterator[str]:
    """README's table: Table 2 at g = 8, and what the paper has there for SD 1.5."""
    paper = {"none-50": ("–", "–"), "cfg-50": ("21", "26.60"), "cfg-8": ("116.60", "24.13"),
             "full": ("18.19", "30.05"), "full-16": ("20.74", "29.91"),
             "full-8": ("29.53", "29.84"), "tiny": ("19.74", "30.23"),
             "tiny-16": ("23.14", "30.53"), "tiny-8": ("36.22", "30.23"),
             "tiny-8-g8": ("23.97", "30.45"), "tiny-seeing": ("–", "–"),
             "tiny-seeing-16": ("–", "–"), "tiny-seeing-8": ("–", "–")}
    for name, scores in paper.items():
        row = table2_rows()[name]
        yield (f"| {row['title'].replace(', DDIM', '')} | {passes(row)} "
               f"| {score(row, spread=True)} | {score(row, 'CLIP-FID', spread=True)} "
               f"| {' | '.join(scores)} |")


@pytest.mark.parametrize("page, lines", [
    *((RESULTS, lines) for lines in (table1, table2, table3, match, distances, seeing,
                                     looking, features, inversion, trials, batch_sizes, longer,
                                     other_trainings,
                                     few_steps, students, over_trainings, speed, speed_on_a_gpu,
                                     eager_on_a_gpu, growth_on_a_gpu,
                                     training_on_a_gpu, miniature)),
    (README, beside_the_paper)], ids=lambda value: getattr(value, "__name__", ""))
def test_tables_show_the_result_files(page: str, lines: Callable[[], Iterator[str]]):
    """The table is in the page, row after row, and has no other rows."""
    rows = list(lines())
    assert len(rows) >= 3
    assert "|\n\n" not in "\n".join(rows)
    head = re.escape("|---|\n") + re.escape("\n".join(rows)) + r"\n\n"
    assert re.search(head, page), rows


# ------------------------------------------------------------------------------- the text

def claims() -> Iterator[str]:
    """What "The paper's claims, one by one" says of Tables 2 and 3 and of the teacher match."""
    rows, guides = table2_rows(), results("match")["guides"]

    def accuracy(name: str, g: str = "8") -> str:
        return f"{score(rows[name], g=g)} %"

    def fid(name: str) -> str:
        return score(rows[name], "CLIP-FID")

    def clip(name: str, g: str = "8") -> str:
        return score(rows[name], "CLIP", g)

    def left(name: str, source: str) -> str:
        return f"{guides[name][source]['all']:.1f} %"

    yield f"CFG at 50 steps: caption accuracy {accuracy('cfg-50')}, CLIP-FID {fid('cfg-50')}."
    yield f"full guide: {accuracy('full')}, CLIP-FID {fid('full')}."
    yield f"caption accuracy, {accuracy('tiny')}, but its CLIP-FID is worse: {fid('tiny')}."
    yield f"to a CLIP score of {clip('tiny')} against CFG's {clip('cfg-50')}."
    yield f"has {accuracy('tiny-seeing')}, a CLIP-FID of {fid('tiny-seeing')} and a CLIP score " \
          f"of {clip('tiny-seeing')}."
    yield f"It reaches {accuracy('tiny-gated')}, with a CLIP-FID of {fid('tiny-gated')}."
    yield f"Confirmed: {accuracy('full-8')}, CLIP-FID {fid('full-8')}, with one UNet pass per step."
    yield f"CFG in 8 steps reaches {accuracy('cfg-8')}."
    yield f"{accuracy('tiny-8')} at 8 steps and {accuracy('tiny')} at 50."
    yield f"The gated variant has {accuracy('tiny-gated-8')} and {accuracy('tiny-gated')}, the " \
          f"seeing guide {accuracy('tiny-seeing-8')} and {accuracy('tiny-seeing')}."
    yield f"at g = 8 only reaches {accuracy('tiny-8-g8')}."
    yield f"from {accuracy('cfg-50', '2')} at g = 2 to {accuracy('cfg-50')} at g = 8."
    yield f"guide follows, from {accuracy('full', '2')} to {accuracy('full')}."
    yield f"responds less, from {accuracy('tiny', '2')} to {accuracy('tiny')}."
    yield f"at g = 2 is {clip('tiny', '2')}, where CFG's is {clip('cfg-50', '2')}"
    yield f"from {accuracy('tiny-gated', '2')} to {accuracy('tiny-gated')}, and its CLIP score " \
          f"at g = 2 is {clip('tiny-gated', '2')}."
    yield f"the three values are {accuracy('tiny-seeing', '2')}, {accuracy('tiny-seeing')} and " \
          f"{clip('tiny-seeing', '2')}."
    yield f"leaves {left('full', NOISED)} of the correction unexplained, the seeing guide " \
          f"{left('tiny-seeing', NOISED)}, the gated one {left('tiny-gated', NOISED)} and the " \
          f"tiny guide {left('tiny', NOISED)}."
    traced = ", ".join(left(name, TRAJECTORIES) for name in ("full", "tiny-seeing", "tiny-gated"))
    yield f"On CFG's own trajectories they leave {traced} and {left('tiny', TRAJECTORIES)}: all but"
    where = results("match")["correction"][TRAJECTORIES]
    early = sum(share for span, share in where.items() if int(span.split("–")[0]) >= 700)
    yield f"Above t = 700, which holds {early:.1f} % of the correction,"
    spans = guides["tiny-seeing"][TRAJECTORIES]["by t"]
    yield f"and the seeing guide {spans['900–999']:.1f} % at first."
    worst = max(guides["tiny-gated"][TRAJECTORIES]["by t"].values())
    yield f"up to {worst:.1f} %: the image"
    yield f"{distance('full')} for the full guide and {distance('tiny')} for the tiny one."
    yield f"no guidance ({fid('none-50')})"
    # README: nothing gets worse from 50 steps to 8.
    for name in ("full", "tiny", "tiny-seeing"):
        before, after = (cell_of(rows[n])["mean"] for n in (name, f"{name}-8"))
        assert after[ACCURACY] >= before[ACCURACY] and after["CLIP-FID"] <= before["CLIP-FID"]


def distance(name: str) -> str:
    return f"{results('match')['distance'][name]['by g']['8']:.1f} %"


def table2_claims() -> Iterator[str]:
    """What the text under Table 2 says of PLMS and of CFG that guides in some steps only."""
    rows = table2_rows()

    def accuracy(name: str, g: str = "8") -> str:
        return f"{score(rows[name], g=g)} %"

    yield f"On this spacing PLMS scores {accuracy('cfg-plms-sd-50')}, and on ours " \
          f"{accuracy('cfg-plms-50')}, against DDIM's {accuracy('cfg-50')}. At g = 2 it has " \
          f"{accuracy('cfg-plms-50', '2')} and DDIM {accuracy('cfg-50', '2')}:"
    yield f"At 16 passes they reach {accuracy('cfg-half-16')} and {accuracy('cfg-interval-16')}, " \
          f"the tiny guide {accuracy('tiny-16')}. At 8 passes they reach " \
          f"{accuracy('cfg-half-8')} and {accuracy('cfg-interval-8')}, the tiny guide " \
          f"{accuracy('tiny-8')}."
    fids = (score(rows[name], "CLIP-FID") for name in ("cfg-interval-16", "tiny-16", "cfg-half-16"))
    yield "the interval is better: {} at 16 passes, where the tiny guide has {} and the first " \
          "half {}.".format(*fids)
    for steps in (16, 8):
        for g in "2468":
            half, interval, tiny = (cell_of(rows[f"{name}-{steps}"], g)["mean"]
                                    for name in ("cfg-half", "cfg-interval", "tiny"))
            assert tiny[ACCURACY] > max(half[ACCURACY], interval[ACCURACY])
            assert g == "8" or tiny["CLIP-FID"] > max(half["CLIP-FID"], interval["CLIP-FID"])
    yield f"is correct on {results('table2')['bases']['mini']['measured by'][JUDGED]:.1f} % of"


def on_styles(name: str, what: str = ACCURACY) -> str:
    """A row's scores in the three styles: "87.2, 90.8 and 86.4 %"."""
    *first, last = (score(rows[name], what) for rows in table3_rows().values())
    return f"{', '.join(first)} and {last}{' %' * (what == ACCURACY)}"


def plugged_in_claims() -> Iterator[str]:
    """What "The paper's claims" says of Table 3."""
    yield f"CFG in 50 steps follows {on_styles('cfg-50')} of the captions, the tiny guide " \
          f"{on_styles('tiny')}, the seeing guide {on_styles('tiny-seeing')}, and the full guide " \
          f"{on_styles('full')}."
    yield f"In 8 steps the tiny guide has {on_styles('tiny-8')}, the seeing guide " \
          f"{on_styles('tiny-seeing-8')}, and the full guide {on_styles('full-8')}: each more " \
          f"than CFG in 8 steps, which has {on_styles('cfg-8')}."
    loss = {style: cell_of(rows["cfg-50"])["mean"][ACCURACY] - cell_of(rows["full"])["mean"][
        ACCURACY] for style, rows in table3_rows().items()}
    assert max(loss, key=loss.get) == "watercolor" and round(loss["watercolor"]) == 11   # README
    for rows in table3_rows().values():
        for name in ("tiny", "tiny-seeing", "full"):
            assert cell_of(rows[f"{name}-8"])["mean"][ACCURACY] > cell_of(rows["cfg-8"])["mean"][
                ACCURACY]
        for name in ("tiny", "tiny-seeing"):
            assert score(rows[name], "CLIP-FID") > score(rows["cfg-50"], "CLIP-FID")


def distance_claims() -> Iterator[str]:
    yield f"CFG in 8 steps ends nearest, at {distance('cfg-8')}."
    found = results("match")["distance"]
    of_16 = [name for name, row in table2_rows().items() if row["UNet passes"] == 16
             and name in found]
    assert min(of_16, key=lambda name: found[name]["by g"]["8"]) == "cfg-8" and len(of_16) >= 6
    yield f"in the first half ends at {distance('cfg-half-16')}, the full guide, which adds 16 " \
          f"passes of its own, at {distance('full-16')}, the seeing guide at " \
          f"{distance('tiny-seeing-16')} and the tiny guide at {distance('tiny-16')}."


def trial_claims() -> Iterator[str]:
    """What "What was tried" says of results/tuning.json and, in one place, of Table 2."""
    def accuracy(**wanted) -> float:
        return 100 * find_trial(True, **wanted)[ACCURACY]["g = 8"]["all"]

    def left(**wanted) -> str:
        return f"{100 * find_trial(False, updates=600, **wanted)['unexplained']:.1f} %"

    short, weighted = {"updates": 1000, "lr": "5e-3"}, {"loss": "root-snr"}
    long = weighted | {"updates": 6000}
    gains = (accuracy(**short, form="gated") - accuracy(**short),
             accuracy(**short, **weighted, form="gated") - accuracy(**short, **weighted),
             accuracy(**long, form="gated") - accuracy(**long, form="sum"))
    in_table2 = [cell_of(table2_rows()[name])["mean"][ACCURACY] for name in ("tiny-gated", "tiny")]
    yield f"gains {gains[0]:.1f} points after 1,000 updates, and {gains[1]:.1f} points with"
    yield f"After 6,000 updates it gains {gains[2]:.1f} points here, and " \
          f"{in_table2[0] - in_table2[1]:.1f} points in Table 2 at 50 steps."
    yield f"goes from {accuracy(**short, **weighted):.1f} % to " \
          f"{accuracy(**long, form='sum'):.1f} % and the gated guide from " \
          f"{accuracy(**short, **weighted, form='gated'):.1f} % to " \
          f"{accuracy(**long, form='gated'):.1f} %."
    muon = left(guide="full", optimizer="muon", lr="6e-3")
    adamw = left(guide="full", optimizer="adamw", lr="2e-3")
    yield f"leaves {muon} of the correction unexplained with Muon and {adamw} with AdamW."
    queries, mean, end = (left(guide="tiny", lr="2e-3", form="sum", pool=pool)
                          for pool in ("attention", "mean", "end"))
    yield f"queries leave {queries} of the correction unexplained, the mean {mean} and the " \
          f"end-of-text token {end}."
    for loss, rest in (("eps", "of the correction unexplained for the tiny guide and {} for the "
                               "full guide."), ("snr", "and {},")):
        tiny, full = (left(guide=guide, start_steps="16", loss=loss) for guide in ("tiny", "full"))
        yield f"leaves {tiny} {rest.format(full)}"


def find_trial(has_images: bool, **wanted) -> dict:
    """The row of results/tuning.json with these settings and the fewest others."""
    wanted = {k.replace("_", "-"): v for k, v in wanted.items()}
    rows = [row for row in results("tuning")
            if (ACCURACY in row) == has_images and wanted.items() <= row["settings"].items()]
    fewest = min(len(row["settings"]) for row in rows)
    (row,) = (row for row in rows if len(row["settings"]) == fewest)
    return row


def looking_claims() -> Iterator[str]:
    """What the text says of results/study.json, and of the bundled seeing guide."""
    left = {row["settings"].get("variant") or row["settings"]["form"]: 100 * row["unexplained"]
            for row in studied(looking_study())}
    rows = table2_rows()
    yield f"In 8 steps its caption accuracy is {score(rows['tiny-seeing-8'])} %, with a CLIP-FID " \
          f"of {score(rows['tiny-seeing-8'], 'CLIP-FID')}."
    yield f"has {score(rows['cfg-50'])} % and {score(rows['cfg-50'], 'CLIP-FID')}."
    pairs = [(cell_of(rows["tiny-seeing" + suffix], g)["mean"], cell_of(rows[cfg], g)["mean"])
             for suffix, cfg in (("", "cfg-50"), ("-16", "cfg-16"), ("-8", "cfg-8"))
             for g in "2468"]
    worst = max(cfg[ACCURACY] - seeing[ACCURACY] for seeing, cfg in pairs)
    above = [100 * (seeing["CLIP-FID"] / cfg["CLIP-FID"] - 1) for seeing, cfg in pairs]
    yield f"its accuracy is at most {worst:.1f} points below that of CFG with as many steps, and " \
          f"its CLIP-FID {min(above):.1f} to {max(above):.1f} % above."
    yield f"leaves {left['seeing']:.1f} % where the gated form leaves {left['gated']:.1f} %,"
    yield f"leaves {left['half as wide']:.1f} %, one twice as wide {left['twice as wide']:.1f} %."
    yield f"gains {left['seeing'] - left['depthwise 3×3']:.1f} points"
    others = ("SiLU after the product", "shared among equal widths", "scale and shift",
              "one group to normalise")
    assert all(abs(left[name] - left["seeing"]) < 1 for name in others)


def batch_claims() -> Iterator[str]:
    """What "Batch size" says of results/study.json: the better of two rates, with Muon."""
    def best(**wanted) -> str:
        return min(f"{100 * row['unexplained']:.1f}" for row in studied(batches_study())
                   if wanted.items() <= row["settings"].items())

    for guide in ({"form": "seeing"}, {"guide": "full"}):
        small, middle, large = (best(batch=batch, **guide) for batch in (32, 128, 512))
        assert small < middle < large
        yield f"{small}, {middle} and {large} %"
    full = {"guide": "full", "batch": 512}
    yield f"leaves {best(**full, lr=0.6 * 4e-2)} % with the higher one and " \
          f"{best(**full, lr=0.3 * 4e-2)} % with the lower one."
    gated = {"form": "gated", "batch": 128}
    yield f"leaves {best(**gated, optimizer='muon')} % with Muon and " \
          f"{best(**gated, optimizer='adamw')} % with AdamW."


def longer_claims() -> Iterator[str]:
    """What "Batch size" says of the longer trainings."""
    for kind, words in (
            ("tiny", "the seeing guide leaves {} points more than in batches of 32 after 25,600 "
                     "images, and {} more after 60,000;"), ("full", "the full guide {} and {}.")):
        gaps = []
        for states in (25_600, 60_000):
            left = left_by_batch(kind, states)
            assert left[32] < left[128] < left[512]
            gaps.append(100 * (left[512] - left[32]))
        assert gaps[1] < gaps[0]
        yield words.format(*(f"{gap:.1f}" for gap in gaps))


def training_spread_claims() -> Iterator[str]:
    """What "Spread over trainings" says of results/study.json."""
    lines = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
             for cells in (line.split("|") for line in over_trainings())}
    spreads = {name: [float(cell.split("±")[1]) for cell in cells if cell]
               for name, cells in lines.items()}
    widest = [max(found) for found in ([row[0] for row in spreads.values()],
                                       [x for row in spreads.values() for x in row[1:]])]
    yield f"is at most {widest[0]} points in what is left and {widest[1]} in accuracy."
    by_guide: dict[tuple, list[list[float]]] = {}
    for row in studied(seeds_study()):
        by_guide.setdefault((row["settings"]["form"], row["settings"].get("g")), []).append(
            [row["unexplained"], *row[ACCURACY].values()])
    apart = [[100 * (max(values) - min(values)) for values in zip(*rows)]
             for rows in by_guide.values()]
    yield f"differ by at most {max(values[0] for values in apart):.2f} and " \
          f"{max(x for values in apart for x in values[1:]):.1f} points."
    by_form: dict[str, list[list[float]]] = {}
    for row in studied(seeds_study()):
        if "g" not in row["settings"]:
            by_form.setdefault(row["settings"]["form"], []).append(
                [-row["unexplained"], *row[ACCURACY].values()])
    better = {(a, b): [min(one) > max(other) for one, other in zip(zip(*by_form[a]),
                                                                   zip(*by_form[b]))]
              for a, b in (("seeing", "gated"), ("gated", "sum"))}
    assert all(better["seeing", "gated"]) and better["gated", "sum"] == [True] * 4 + [False]
    yield f"it has {lines['gated'][4]} % and the sum {lines['sum'][4]} %."
    fixed = lines["sum, trained at g = 8 only"]
    yield f"{fixed[3]} % in 16 steps, where the guide for all g has {lines['sum'][3]} %, and " \
          f"{fixed[4]} % in 8 steps, where that has {lines['sum'][4]} %."
    for cells in lines.values():
        for more, fewer in ((1, 2), (3, 4)):
            if cells[more]:
                (a, da), (b, db) = (map(float, cells[k].split("±")) for k in (more, fewer))
                assert abs(a - b) < da + db + 0.1


def few_claims() -> Iterator[str]:
    """What "The predecessor" says of results/few.json."""
    rows = results("few")["bases"]["mini"]["rows"]

    def shown(*names: str) -> tuple[str, ...]:
        return tuple(f"{score(rows[name])} %" for name in names)

    student, seeing = shown("whole-8", "tiny-seeing-8")
    yield f"caption accuracy is {student} and the seeing guide's {seeing},"
    student, seeing = shown("whole-4", "tiny-seeing-4")
    yield f"in 4 steps {student} and {seeing}."
    student, tiny, seeing = shown("whole-2", "tiny-2", "tiny-seeing-2")
    yield f"the student has {student}, the tiny guide {tiny} and the seeing guide {seeing}."
    student, seeing, cfg = shown("whole-1", "tiny-seeing-1", "cfg-1")
    yield f"In one step it is {student} against the seeing guide's {seeing} and CFG's {cfg}."
    yield f"its CLIP-FID to their images is {on_styles('whole', 'CLIP-FID')}, where CFG's is " \
          f"{on_styles('cfg-50', 'CLIP-FID')}."
    yield f"caption accuracy is then {on_styles('whole-moved')} and its CLIP-FID " \
          f"{on_styles('whole-moved', 'CLIP-FID')}."
    yield f"the seeing guide has {on_styles('tiny-seeing')}, and " \
          f"{on_styles('tiny-seeing', 'CLIP-FID')}."
    anew = results("few-watercolor")["bases"]["watercolor"]["rows"]
    yield f"has {score(anew['whole'])} % and a CLIP-FID of {score(anew['whole'], 'CLIP-FID')} in " \
          f"50 steps, and {score(anew['whole-8'])} % and {score(anew['whole-8'], 'CLIP-FID')} in 8"
    left = {(row["settings"]["guide"], row["settings"]["optimizer"]): 100 * row["unexplained"]
            for row in studied(student_study())}            # of the full guide the last row
    assert all(100 * row["unexplained"] >= left["full", "muon"]
               for row in studied(student_study()) if row["settings"]["guide"] == "full")
    yield f"{left['whole', 'adamw']:.1f} % with AdamW and {left['whole', 'muon']:.1f} % with " \
          f"Muon, where the full guide leaves {left['full', 'muon']:.1f} % at the better of"
    yield f"leaves {results('match')['guides']['full'][NOISED]['all']:.1f} % ([teacher match]"
    for steps in (8, 4, 2, 1):
        assert score(rows[f"tiny-seeing-{steps}"], "CLIP-FID") < score(rows[f"whole-{steps}"],
                                                                       "CLIP-FID")


def inversion_claims() -> Iterator[str]:
    rows = {name: {g: f"{error:.1f}" for g, error in row["by g"].items()}
            for name, row in results("inversion")["rows"].items()}
    names = "cfg-8", "cfg-8-end", "full-8", "tiny-8"
    cfg, at_end, full, tiny = (rows[name]["8"] for name in names)
    yield f"CFG's error is {cfg}, or {at_end} where it is asked at a step's end; the full " \
          f"guide's is {full} and the tiny guide's {tiny}."
    cfg, full = rows["cfg-50"], rows["full"]
    yield f"between g = 4 and g = 6, from {cfg['4']} to {cfg['6']};"
    yield f"between g = 2 and g = 4, from {rows['cfg-8']['2']} to {rows['cfg-8']['4']}."
    for name, first in (("cfg-50", 4), ("cfg-8", 2)):
        by_g = {int(g): error for g, error in results("inversion")["rows"][name]["by g"].items()}
        assert max(by_g, key=lambda g: by_g.get(g + 2, 0) - by_g[g]) == first
    yield f"CFG's grows from {cfg['2']} at g = 2 to {cfg['8']} at g = 8, the full guide's from " \
          f"{full['2']} to {full['8']}."
    yield f"steps is worse: {rows['tiny-seeing-16']['2']} against {rows['cfg-16-end']['2']}."
    worse = []
    for name, row in results("inversion")["rows"].items():
        steps = re.search("-16|-8|$", name)[0] or "-50"
        for g in "468":
            cfg = (results("inversion")["rows"][f"cfg{steps}{way}"]["by g"][g]
                   for way in ("", "-end"))
            if row["guide"] and row["by g"].get(g, 0) >= min(cfg):
                worse.append((name, g))
    assert worse == [("tiny-seeing", "4")]


def other_training_claims() -> Iterator[str]:
    """What "Other trainings of the tiny guides" says of its table, and of 8 steps."""
    lines = {name.strip(): [cell.strip() for cell in cells] for name, *cells in (
        line[1:-1].split("|") for line in other_trainings())}
    eight = [score((table2_rows() | results("table2-trials")["bases"]["mini"]["rows"])[name])
             for name in ("tiny-muon-8", "tiny-gated-muon-8", "tiny-8", "tiny-gated-8")]
    noised, traced, apart, low, high, fid = zip(*(lines[name] for name in (
        "tiny", "tiny-muon", "tiny-further", "tiny-gated", "tiny-gated-muon", "tiny-gated-further",
        "tiny-seeing", "tiny-seeing-further", "tiny-seeing-all")))
    suits = train.DEFAULTS["mini", "tiny", "cpu"]
    assert suits.optimizer == "muon"
    for form in ("gated", "seeing"):
        best = min((row for row in studied(batches_study()) if row["settings"]["form"] == form
                    and row["settings"]["guide"] == "tiny"), key=lambda row: row["unexplained"])
        assert (best["settings"]["batch"], best["settings"]["lr"]) == (suits.batch, suits.lr)
    yield f"Muon, batches of {suits.batch} and a rate of {suits.lr:g}. In {suits.updates:,} " \
          f"updates, a guide sees {suits.updates * suits.batch:,} noised images, drawn from " \
          f"{suits.images:,} postcards."
    yield f"leave {noised[1]} and {noised[4]} % on noised images, where the bundled guides leave " \
          f"{noised[0]} and {noised[3]} %."
    yield f"At g = 8 they follow {high[1]} and {high[4]} % of the captions in 50 steps, and " \
          f"{eight[0]} and {eight[1]} % in 8; the bundled ones {high[0]} and {high[3]} %, and " \
          f"{eight[2]} and {eight[3]} %."
    yield f"falls from {traced[1]} to {traced[2]} % for Eq. 5's guide, from {traced[4]} to " \
          f"{traced[5]} % for the gated one and from {traced[6]} to {traced[7]} % for the seeing " \
          "one."
    yield f"caption accuracy at g = 8 falls from {high[1]} to {high[2]} %, from {high[4]} to " \
          f"{high[5]} % and from {high[6]} to {high[7]} %."
    yield f"it leaves {traced[8]} % there but {noised[8]} % on noised images, and follows " \
          f"{high[8]} % of the captions."
    for before, after in ((1, 2), (4, 5), (6, 7)):
        assert float(apart[after]) < float(apart[before])
        assert (fid[after] < fid[before]) == (after != 7)
    for name, shared in (("table2", ("images a cell and seed", "seeds", "noise", "prompts")),
                         ("match", ("base hash", "images", "prompts", "noise", "t"))):
        ours, others = (results(n)["protocol"] for n in (name, f"{name}-trials"))
        assert all(ours[key] == others[key] for key in shared)


def feature_claims() -> Iterator[str]:
    """What the text says of results/features.json: at g = 8, and in the first steps."""
    guides = results("features")["guides"]
    norm = {(name, g): [*values.values()] for name, guide in guides.items()
            for g, values in guide["norm"].items()}
    tiny, full, seeing = (norm[name, "8"] for name in ("tiny", "full", "tiny-seeing"))
    edges, seen = ([*guides[name]["on edges"]["8"].values()] for name in ("full", "tiny-seeing"))
    yield f"norm falls from {max(tiny):.1f} to {tiny[-1]:.1f}, and for the seeing one, from " \
          f"{max(seeing):.1f} to {seeing[-1]:.1f}."
    yield f"full guide's is {full[0]:.1f} in the first steps, {full[1]:.1f} after them and " \
          f"{full[-1]:.1f} in the last."
    yield f"In the last steps edges get {edges[-1]:.2f} times their share from the full guide " \
          f"and {seen[-1]:.2f} times from the seeing one; in the first, {edges[0]:.2f} and " \
          f"{seen[0]:.2f} times."
    yield f"grows from {norm['full', '2'][0]:.1f} at g = 2 to {full[0]:.1f} at g = 8, and the " \
          f"tiny guide's from {norm['tiny', '2'][0]:.1f} to {tiny[0]:.1f}."


def speed_claims() -> Iterator[str]:
    """What "On two CPU threads" says of results/speed-sd15-cpu.json."""
    ratio = {(r["ratio"], r["side"]): f"{r['median']:.2f}" for r in
             results("speed-sd15-cpu")["ratios"]}
    step, unet = "tiny step / CFG step", "UNet pass / diffusers: UNet pass"
    image = "tiny image, 8 steps / diffusers: CFG image, 8 steps"
    tiny, full = (ratio[f"{guide} stage-one update / {guide} stage-one update, naive", 32]
                  for guide in ("tiny", "full"))
    yield f"{ratio[step, 32]} of it at 32 × 32, and {ratio[step, 64]} at 64 × 64."
    yield f"still takes {ratio[image, 32]} of the time of diffusers' CFG."
    yield f"takes {ratio[unet, 32]} and {ratio[unet, 64]} of diffusers' time"
    rows = {row["what"]: row["rounds"] for row in results("speed-seeing")["rows"]}
    apart = [seeing / tiny for seeing, tiny in zip(rows["seeing step"], rows["tiny step"])]
    assert len(apart) == 5
    yield f"measured {median(apart):.2f} times a tiny step"
    yield f"they range from {min(apart):.2f} to {max(apart):.2f}"
    yield f"{tiny} of the naive time for the tiny guide and {full} for the full guide."


def gpu_claims() -> Iterator[str]:
    """What "On an H100" says of results/speed-sd15-cuda.json."""
    measured, rows = results("speed-sd15-cuda"), gpu_rows()
    medians = {(r["ratio"], r["batch"]): f"{r['median']:.2f}" for r in measured["ratios"]
               if r["side"] == 64}

    def ratios(ours: str, theirs: str) -> list[str]:
        return [medians[f"{ours} / {theirs}", batch] for batch in (1, 16)]

    unet, decode = "UNet pass, captured", "VAE decode, captured"
    one, sixteen = ratios(unet, f"diffusers: {unet}")
    yield f"takes {one} of diffusers' time at batch 1 and {sixteen} at batch 16,"
    yield f"{100 * rows[unet, 64, 16]['of the matrix rate']:.1f} % of the card's matrix rate"
    yield f"decode takes {' and '.join(ratios(decode, f'diffusers: {decode}'))} of diffusers' time"
    tiny = "tiny image, 8 steps"
    yield f"with the tiny guide takes {rows[tiny, 64, 1]['ms']:.4g} ms,"
    yield f"{rows[tiny, 64, 16]['images/s']:.1f} images a second"
    one, sixteen = ratios("full step, captured", "CFG step, captured")
    yield f"a step takes {one} of a CFG step"
    yield f"At batch 16 it is {sixteen}, and the tiny guide's step is " \
          f"{medians['tiny step, captured / CFG step, captured', 16]} of a CFG step"
    assert "H100" in measured["protocol"]["hardware"] and not measured["left out"]


def cost_claims() -> Iterator[str]:
    """What the text under Table 1 says of whole images."""
    images = results("table1")["GMACs per image"]
    share = {steps: round(100 * images["tiny"][steps] / images["cfg"][steps])
             for steps in ("8", "50")}
    yield f"costs {share['8']} % of CFG's arithmetic, and a 50-step image costs {share['50']} %."
    seeing, base = (next(row["GMACs"] for row in results("table1")["rows"]
                         if row["network"] == name) for name in ("seeing guide", "base UNet"))
    yield f"The seeing guide adds {100 * seeing / base:.1f} % to a pass of the UNet."


def reliability_claims() -> Iterator[str]:
    measured = results("reliability")
    assert measured["equal"]
    yield f"with {measured['kills']} kills at random moments of {measured['runs']} small runs, " \
          f"{measured['of them after the first update']} of them after the first update"
    yield f"at commit {measured['commit'][:7]}"


def training_claims() -> Iterator[str]:
    training = json.loads((ROOT / "mini" / "training.json").read_text(encoding="utf-8"))
    seconds = sum(part["seconds"] for name, part in training.items()
                  if name in ("vae", "clip", "judge", "unet", "watercolor", "cartoon", "realistic"))
    yield f"{results('mini')['images']:,} captions that name all six attributes"
    yield f"about {seconds / 3600:.1f} hours"


@pytest.mark.parametrize("begin, end, expected, others", [
    ("## Table 1", "## Table 2", cost_claims, []),
    ("## Table 2", "## Table 3", table2_claims, []),
    ("## Teacher match", "## A tiny guide that sees", distance_claims, []),
    ("## A tiny guide that sees", "## The predecessor", looking_claims, ["2.8 million"]),
    ("## The predecessor", "## The paper's claims", few_claims, []),
    ("## The paper's claims", "## How the paper was read",
     lambda: chain(claims(), plugged_in_claims()), ["81.0 %", "87.2 %"]),
    ("## What was tried", "## Batch size", trial_claims,
     ["114.5 %", "43.2 %", "82.8 %", "43.6 %", "AdamW at 0.005", "AdamW at 0.001"]),
    ("## Spread over trainings", "## Other trainings", training_spread_claims, []),
    ("## Other trainings", "## Figures", other_training_claims,
     ["--trajectories 0.5"]),
    ("## Batch size", "## Spread over trainings", lambda: chain(batch_claims(), longer_claims()),
     ["43.6 %", "25.7 %", "2.4 million", "5.7 million", "24.6 %", "35.2 %", "82.8 %",
      "23.8 % and 39.8 %"]),
    ("### What the guides add", "## Editing images", feature_claims, ["Section 5.4"]),
    ("## Editing images", "## Speed", inversion_claims, ["0.4 and 0.6"]),
    ("### On two CPU threads", "### On an H100", speed_claims,
     ["0.51 and 0.49", "0.99 and 1.06", "1.3 % by its arithmetic"]),
    ("### On an H100", "## Reliability", gpu_claims, ["torch 2.11"]),
    ("## Reliability", "## The miniature", reliability_claims, []),
    ("## The miniature", "## How to remake", training_claims, ["9.0 million", "Diffusion 1.5"])])
def test_the_text_states_the_numbers_of_the_result_files(begin, end, expected, others):
    """Each phrase stands in its section as the files have it, and no other number with a decimal.

    `others` are numbers of results at other commits, and versions.
    """
    section = RESULTS[RESULTS.index(f"\n{begin}"):RESULTS.index(f"\n{end}")]
    text = " ".join(re.sub(r"(?m)^\|.*$", "", section).split())         # without its tables
    phrases = list(expected())
    missing = [phrase for phrase in phrases if phrase not in text]
    assert phrases and not missing, missing
    for phrase in (*phrases, *others, "Diffusion 1.5"):
        text = text.replace(phrase, "")
    assert not re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text)


def test_the_limits_state_the_teacher_match():
    full, tiny = (f"{results('match')['guides'][name][NOISED]['all']:.1f} %"
                  for name in ("full", "tiny"))
    assert f"the full one leaves {full} of the CFG correction unexplained, and the tiny one " \
           f"{tiny}." in " ".join(README.split())


def test_tiny_guides_leave_more_than_all_on_trajectories_below_t_700():
    text = " ".join(RESULTS.split())
    assert re.search(r"Above t = 700, which holds \S+ % of the correction, every guide leaves less "
                     "than 100 %", text)
    assert "Below t = 700 the tiny guides and the seeing one leave more than 100 %" in text
    for name, shares in results("match")["guides"].items():
        for span, share in shares[TRAJECTORIES]["by t"].items():
            early = int(span.split("–")[0]) >= 700
            assert (share < 100) == (early or name == "full")


def test_the_classifier_is_as_good_as_the_text_says():
    assert all(base["measured by"][JUDGED] == 100
               for base in results("table3")["bases"].values())


def test_the_bundled_judge_measured_every_caption_accuracy():
    judged = [results("mini"), *(row for row in results("tuning") if ACCURACY in row),
              *(base["measured by"] for name in ("table2", "table3", "table2-trials")
                for base in results(name)["bases"].values())]
    assert {measured["judge"] for measured in judged} == {judge_hash()}


def test_readme_states_the_times_on_a_gpu():
    """README's milliseconds, and its hours for the default schedule on SD 1.5."""
    rows, text = gpu_rows(), " ".join(README.split())
    images = [[f"{rows[f'{way} image, 8 steps', 64, batch]['ms']:.0f}"
               for way in ("CFG", "full", "tiny")] for batch in (1, 16)]
    seconds, halvings_take, hours = [], [], []
    for guide in ("tiny", "full"):
        one, halving = (rows[f"{guide} {name} update", 64, 8]["ms"] / 1000
                        for name in ("stage-one", "halving"))
        config = train.DEFAULTS["sd", guide, "cuda"]
        halvings = (train.Config.start_steps // train.Config.end_steps).bit_length() - 1
        total = config.updates * one + halvings * config.halving_updates * halving
        seconds.append(f"{one:.2f} s")
        halvings_take.append(f"{halving:.2f} s")
        hours.append(f"about {total * config.batch / 8 / 3600:.0f} h")
    alone, batched = images
    assert f"takes {alone[0]} ms with CFG, {alone[1]} ms with the full guide and {alone[2]} ms " \
           f"with the tiny guide" in text
    assert f"takes {batched[0]}, {batched[1]} and {batched[2]} ms" in text
    assert f"takes {seconds[0]} for the tiny guide and {seconds[1]} for the full one; a halving " \
           f"update takes {halvings_take[0]} and {halvings_take[1]}." in text
    assert f"{hours[0]} and {hours[1]} at this speed" in text
