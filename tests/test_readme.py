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


def numbers_in(value, key=""):
    """The numbers of a result as the text tells them: shares in percent, ratios, distances."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((key, part) for part in value)
        for name, part in items:
            if name not in ("spread", "seeds", "rounds", "profiles", "settings"):
                yield from numbers_in(part, name)
    elif isinstance(value, float):
        percent = value if abs(value) > 1.5 else 100 * value
        yield from (f"{percent:.1f}", f"{value:.4f}", f"{value:.2f}", f"{value:.1f}")


@pytest.mark.parametrize("begin, end, files, others", [
    ("### What this says", "### The figures", ("table2", "table3", "match", "mini", "tuning"),
     {"114.5", "43.2"}),                                    # results/match.json at an older commit
    ("## The miniature", "## Limits", ("mini", "tuning"), {"0.011", "9.0", "1.7", "0.5", "5.1"}),
    ("A tiny-guided step", "## Reliability", ("speed-sd15-cpu",),
     {"0.51", "0.49", "0.99", "1.06", "1.5", "26.2", "2.4", "12.6"})])
def test_the_numbers_in_the_text_are_in_the_result_files(begin, end, files, others):
    text = README[README.index(begin):README.index(end, README.index(begin))]
    known = {number for file in files for number in numbers_in(results(file))} | others
    told = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text)
    assert len(told) > 5 and not [number for number in told if number not in known]


def test_what_was_judged_was_judged_by_the_bundled_judge():
    judged = [results("mini"), *(row for row in results("tuning") if "right" in row),
              *(base["measured by"] for name in ("table2", "table3")
                for base in results(name)["bases"].values())]
    assert {told["judge"] for told in judged} == {judge_hash()}
