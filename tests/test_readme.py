"""The README agrees with the code and with the result files."""

import json
import re
from pathlib import Path

import pytest

from mini.judge import judge_hash

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def results(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def plus_minus(cell, score):
    return f"{cell['mean'][score]:.1f} ± {cell['spread'][score]:.1f}"


def table2_lines(g="8"):
    """Table 2 at one g: what the README shows of results/table2.json."""
    for row in results("table2")["bases"]["mini"]["rows"].values():
        cell = row["cells"].get(g) or row["cells"].get("0")
        if cell:
            passes = f"{row['UNet passes']}" + f" + {row['guide passes']} guide" * bool(
                row["guide passes"])
            scores = (f"{cell['mean'][s]:.4f} ± {cell['spread'][s]:.4f}" if s == "CLIP-FID" else
                      plus_minus(cell, s) for s in ("CLIP-FID", "CLIP", "accuracy"))
            ms = row["milliseconds"]["median"]
            yield f"| {row['title']} | {passes} | {ms:.0f} | {' | '.join(scores)} |"


def table3_lines():
    for base, told in results("table3")["bases"].items():
        for row in told["rows"].values():
            cell = row["cells"].get("8") or row["cells"]["0"]
            yield (f"| {base} | {row['title']} | {cell['mean']['CLIP-FID']:.4f} ± "
                   f"{cell['spread']['CLIP-FID']:.4f} | {plus_minus(cell, 'accuracy')} |")


def match_lines():
    for name, told in results("match")["guides"].items():
        shares = (f"{source['all']:.1f}" for source in told.values() if isinstance(source, dict))
        yield f"| {name} | {' | '.join(shares)} |"


def table1_lines():
    for row in results("table1")["rows"]:
        paper = row.get("paper")
        beside = f"{paper['parameters'] / 1e6:g} M | {paper['GMACs']:g}" if paper else "|"
        yield f"| {row['network']} | {row['parameters']:,} | {row['GMACs']:,.5g} | {beside} |"


def tried_lines():
    """What was tried, of results/tuning.json: the rows that are judged by their pictures."""
    for row in sorted(results("tuning"), key=lambda row: row.get("steps") != 16):
        if "right" in row:
            right = (f"{100 * row['right'][g]['all']:.1f}" for g in ("g = 2", "g = 8"))
            yield f"| {tried(row['settings'])} | {row['steps']} | {' | '.join(right)} |"


def tried(settings):
    if "start-steps" in settings:
        name = f"{settings['guide']} guide, halved to {settings['steps']} steps"
        return name if settings["sampled"] == "made" else f"{settings['guide']} guide for 8 steps"
    changed = [f"`--{k} {v}`" for k, v in settings.items()
               if k in ("loss", "form", "trajectories", "ema") and v != "sum"]
    changed += [f"after {settings.get('updates', 0):,} updates (bundled)"] * ("init" in settings)
    return "CFG" if settings["guide"] == "cfg" else " ".join(changed) or "as the paper has it"


def speed_lines(of="speed-sd15-cpu"):
    for ratio in results(of)["ratios"]:
        yield f"| {ratio['ratio']} | {ratio['side']} × {ratio['side']} | {ratio['median']:.2f} |"


def test_every_line_of_the_equation_table_is_where_the_table_says():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 12
    for name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", text), (name, file, line, text)


@pytest.mark.parametrize("lines", [table1_lines, table2_lines, table3_lines, match_lines,
                                   tried_lines, speed_lines])
def test_the_results_are_those_of_the_result_files(lines):
    told = list(lines())
    assert len(told) >= 2
    for line in told:
        assert line in README, line


def test_the_miniature_is_as_good_as_the_readme_says():
    mini = results("mini")
    for share in (mini["CFG"]["right"]["all"], mini["no guidance"]["right"]["all"],
                  mini["judge on real pictures"]["all"]):
        assert f"{100 * share:.1f} %" in README
    assert f"{mini['pictures']:,} captions" in README


def test_every_picture_and_file_the_readme_names_is_there():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def told_of_tables():
    """What the text says of Tables 2 and 3 and of the teacher match."""
    rows, styles = results("table2")["bases"]["mini"]["rows"], results("table3")["bases"]
    guides = results("match")["guides"]

    def score(row, g="8", name="accuracy"):
        cells = rows[row]["cells"]
        return f"{(cells.get(g) or cells['0'])['mean'][name]:.{4 if name == 'CLIP-FID' else 1}f}"

    def fid(row):
        return score(row, name="CLIP-FID")

    def plugged(style, row):
        cells = styles[style]["rows"][row]["cells"]
        return f"{(cells.get('8') or cells['0'])['mean']['accuracy']:.1f}"

    def left(guide, source):
        return f"{guides[guide][source]['all']:.1f}"

    noised, walks = "noised real pictures", "CFG's own trajectories"
    yield f"with CFG in 50 steps at {score('cfg-50')} % all right and CLIP-FID {fid('cfg-50')}"
    yield f"Borne out for the full guide: {score('full')} %, CLIP-FID {fid('full')}."
    yield f"nearly as well, {score('tiny')} %, and by CLIP-FID is further from real pictures: " \
          f"{fid('tiny')}."
    yield f"CLIP score of {score('tiny', name='CLIP')} (CFG {score('cfg-50', name='CLIP')})"
    yield f"the tiny guide has {score('tiny-gated')} %, though {fid('tiny-gated')}."
    yield f"Borne out: {score('full-8')} %, {fid('full-8')}, one UNet pass a step, where CFG cut " \
          f"to 8 steps has {score('cfg-8')} %."
    yield f"Not seen: {score('tiny-8')} % at 8 steps, {score('tiny')} % at 50; gated " \
          f"{score('tiny-gated-8')} and {score('tiny-gated')} %."
    yield f"nothing to repair: {score('tiny-8-g8')} % from a guide"
    yield f"For CFG, from {score('cfg-50', '2')} % at g = 2 to {score('cfg-50')} % at g = 8; the " \
          f"full guide follows, from {score('full', '2')} to {score('full')} %."
    yield f"does so less: {score('tiny', '2')} to {score('tiny')} %, and its CLIP score at g = 2 " \
          f"is {score('tiny', '2', 'CLIP')} where CFG's is {score('cfg-50', '2', 'CLIP')}"
    yield f"The gated one, {score('tiny-gated', '2')} to {score('tiny-gated')} %, has a CLIP " \
          f"score of {score('tiny-gated', '2', 'CLIP')} there."
    tiny, gated, full, cfg, none = ((lambda style, row=row: plugged(style, row)) for row in (
        "tiny", "tiny-gated", "full", "cfg-50", "none-50"))
    yield f"In cartoon {tiny('cartoon')} % are all right with the tiny guide, {gated('cartoon')} " \
          f"% with the gated and {full('cartoon')} % with the full one, against " \
          f"{cfg('cartoon')} % for that base's own CFG and {none('cartoon')} % unguided"
    for style in ("realistic", "watercolor"):
        yield f"{tiny(style)}, {gated(style)} and {full(style)} %, against {cfg(style)} and " \
              f"{none(style)} %"
    yield f"full guide leaves {left('full', noised)} % of the correction's energy unexplained on " \
          f"noised pictures, the tiny one {left('tiny', noised)} %, gated " \
          f"{left('tiny-gated', noised)} %."
    yield f"the full one leaves {left('full', walks)} %, and the tiny ones more than there was " \
          f"({left('tiny', walks)} and {left('tiny-gated', walks)} %)"
    yield f"CLIP-FID hardly tells no guidance ({fid('none-50')}) from CFG"


def trials():
    """Of results/tuning.json: the share that a run of 600 updates left, and all right at g = 8."""
    rows = [(row, {k: v for k, v in row["settings"].items() if k not in ("end-steps", "init")})
            for row in results("tuning")]

    def find(judged, **wanted):
        wanted = {k.replace("_", "-"): v for k, v in wanted.items()}
        fit = [(len(settings), k) for k, (row, settings) in enumerate(rows)
               if ("right" in row) == judged and wanted.items() <= settings.items()]
        fewest = min(fit)[0]                                # nothing more is set than what is asked
        (k,) = [k for n, k in fit if n == fewest]
        return rows[k][0]

    return (lambda **wanted: f"{100 * find(False, updates=600, **wanted)['unexplained']:.1f}",
            lambda **wanted: 100 * find(True, **wanted)["right"]["g = 8"]["all"])


def told_of_trials():
    """What the text says of results/tuning.json."""
    left, eighth = trials()
    first = {"updates": 1000, "lr": "5e-3"}
    heavier, long = {"loss": "root-snr"}, {"loss": "root-snr", "updates": 6000}
    plain = eighth(**first, form="gated") - eighth(**first)
    other = eighth(**first, **heavier, form="gated") - eighth(**first, **heavier)
    longer = eighth(**long, form="gated") - eighth(**long, form="sum")
    rows = results("table2")["bases"]["mini"]["rows"]
    table2 = [rows[row]["cells"]["8"]["mean"]["accuracy"] for row in ("tiny-gated", "tiny")]
    yield f"{plain:.1f} points more at g = 8 after 1,000 updates, {other:.1f} with the other " \
          f"loss; after 6,000 it is {longer:.1f} here, and {table2[0] - table2[1]:.1f} in Table 2"
    yield f"bring Eq. 5's guide from {eighth(**first, **heavier):.1f} to " \
          f"{eighth(**long, form='sum'):.1f} %, the gated one from " \
          f"{eighth(**first, **heavier, form='gated'):.1f} to {eighth(**long, form='gated'):.1f} %."
    yield f"a full guide leaves {left(guide='full', optimizer='muon', lr='6e-3')} % of the " \
          f"correction of its training data with Muon, " \
          f"{left(guide='full', optimizer='adamw', lr='2e-3')} % with AdamW"


def told_of_choices():
    """What the table of differences says of results/tuning.json."""
    left, _ = trials()
    yield "{} % of the correction unexplained against {} and {} after 600 updates".format(*(
        left(guide="tiny", lr="2e-3", form="sum", pool=p) for p in ("attention", "mean", "end")))
    (tiny, tiny_snr), (full, full_snr) = (
        [left(guide=guide, start_steps="16", loss=loss) for loss in ("eps", "snr")]
        for guide in ("tiny", "full"))
    yield f"the plain loss leaves {tiny} % of the correction unexplained with the tiny guide and " \
          f"{full} % with the full one"
    yield f"truncated SNR {tiny_snr} and {full_snr} %, in the measure"


def told_of_speed():
    """What the text says of results/speed-sd15-cpu.json."""
    told = results("speed-sd15-cpu")
    ratio = {(r["ratio"], r["side"]): f"{r['median']:.2f}" for r in told["ratios"]}
    seconds = {(r["what"], r["side"]): f"{r['ms'] / 1000:.1f}" for r in told["rows"]}
    step, pass_ = "tiny step / CFG step", "UNet pass / diffusers: UNet pass"
    yield f"half a CFG step: {ratio[step, 32]} of it at 32 × 32, {ratio[step, 64]} at 64 × 64"
    peer = ratio["tiny picture, 8 steps / diffusers: CFG picture, 8 steps", 32]
    yield f"one takes {peer} of the time of diffusers' CFG."
    yield f"ends after {seconds['sample.py, 8 steps, from start to end', 32]} s."
    yield f"Importing torch alone takes {seconds['import torch, fresh Python', 32]} s and such a " \
          f"picture in a warm process {seconds['tiny picture, 8 steps', 32]}"
    yield f"gains on diffusers ({ratio[pass_, 32]} and {ratio[pass_, 64]} of its time)"
    naive = [ratio[f"{g} stage-one update / {g} stage-one update, naive", 32]
             for g in ("tiny", "full")]
    yield f"({naive[0]} of the naive way's time for the tiny guide, {naive[1]} for the full one"


def told_of_the_miniature():
    """What the text says of results/mini.json."""
    mini = results("mini")
    right = {name: f"{100 * mini[name]['right']['all']:.1f} %" for name in ("CFG", "no guidance")}
    styles = mini["judge on real pictures of other styles"]
    other = {f"{100 * share:.1f} %" for style, share in styles.items() if style != "watercolor"}
    yield f"on {mini['pictures']:,} captions that name all six attributes, one picture each, CFG " \
          f"at g = 8 in 50 steps gets all of them right in {right['CFG']}, no guidance in " \
          f"{right['no guidance']};"
    yield f"is right on {100 * mini['judge on real pictures']['all']:.1f} % of real ones " \
          f"({100 * styles['watercolor']:.1f} % of watercolors, {' and '.join(other)} of the other"
    yield f"off by {mini['reconstruction error, mean absolute']:.3f} of a pixel's range."


@pytest.mark.parametrize("begin, end, told, others", [
    ("### What this says", "### What was tried", [told_of_tables], []),
    ("- *The loss weight.*", "### The figures", [told_of_trials],
     ["114.5", "43.2"]),                                    # results/match.json at an older commit
    ("## The miniature", "## Limits", [told_of_the_miniature, told_of_choices],
     ["9.0 million", "1.7 hours", "SD 1.5", "Section 5.1", "--trajectories 0.5"]),
    ("A tiny-guided step", "## Reliability", [told_of_speed],
     ["0.51 and 0.49", "0.99 and 1.06"])])                  # results/ at an older commit
def test_the_numbers_in_the_text_are_those_of_the_result_files(begin, end, told, others):
    """Each sentence is there as its file has it, and no number is in none of them."""
    text = " ".join(README[README.index(begin):README.index(end, README.index(begin))].split())
    phrases = [phrase for tell in told for phrase in tell()]
    missing = [phrase for phrase in phrases if phrase not in text]
    assert len(phrases) > 2 and not missing, missing
    for phrase in [*phrases, *others]:
        text = text.replace(phrase, "")
    assert not re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text)


def test_what_was_judged_was_judged_by_the_bundled_judge():
    judged = [results("mini"), *(row for row in results("tuning") if "right" in row),
              *(base["measured by"] for name in ("table2", "table3")
                for base in results(name)["bases"].values())]
    assert {told["judge"] for told in judged} == {judge_hash()}
