"""Scores of images, and the paper's tables and figures: `python eval.py COMMAND`.

Without a command it lists them. Each writes its result, with its protocol, to a JSON or PNG file in
runs/eval; with --update-results in results/ and docs/, which README and RESULTS show.

The distance is FID where pytorch-fid's Inception weights are found; else it is the same distance
between features of a CLIP and is called CLIP-FID, which can't be compared with an FID. The
miniature's tables have CLIP-FID of its own CLIP unless --inception asks for FID; `fid` takes images
of 64 x 64 for the miniature's where Inception is not found, and says so.
"""

from __future__ import annotations

from support import startup

if __name__ == "__main__":
    startup.begin()

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from evaluation.clip_score import clip_score
from evaluation.cost import table1
from evaluation.drawings import animation, method
from evaluation.edits import edits, inversion, restyle
from evaluation.fid import fid
from evaluation.figures import fig5, fig6, fig7, fig8, figfew, quality
from evaluation.match import features, match
from evaluation.speed import SpeedConfig, speed
from evaluation.speed_report import growth
from evaluation.tables import few, table2, table3
from support.cli import flag_of, option, parse, require, run_command
from support.distributed import print_once, world_size
from support.machine import DTYPES, find_device

MILLION = 10**6                 # no two seeds of a table share noise up to as many images


# ------------------------------------------------------------------------------- commands

class Command(NamedTuple):
    """What runs a command, what it does, and the fields that it takes beside those of the file."""

    run: Callable[[object], None]
    about: str
    takes: str


BASE = "weights vae size device dtype g seed "
SAMPLES = BASE + "guides prompts count batch quick "
TABLES = SAMPLES + "real clip_model inception skip_bad seeds references repeats rows "
FIGURES = BASE + "guides prompt "
SCORES = "paths clip_model batch device skip_bad "
SPEED = "size side batch steps rounds minutes device dtype compile baseline quick "

COMMANDS = {name: Command(*entry) for name, entry in {
    "fid": (fid, "distance between two sets of images", SCORES + "inception save"),
    "clip": (clip_score, "how far images show what their prompts say", SCORES + "prompts seed"),
    "table1": (table1, "parameters and arithmetic of networks and whole images", "size"),
    "table2": (table2, "guides, CFG and no guidance, by number of steps and g", TABLES),
    "table3": (table3, "the plain base's guides plugged into fine-tuned bases", TABLES + "bases"),
    "few": (few, "a distilled UNet and guides in 8 steps and fewer", TABLES),
    "match": (match, "how much of the CFG correction a guide explains", SAMPLES + "rows"),
    "features": (features, "what guides add: how much by t and g, and where", SAMPLES),
    "fig5": (fig5, "the paper's Fig. 5: guides by number of steps", FIGURES),
    "fig6": (fig6, "the paper's Fig. 6: guides beside CFG", FIGURES),
    "fig7": (fig7, "the paper's Fig. 7: what guides add to the decoder", FIGURES),
    "fig8": (fig8, "the paper's Fig. 8: guides in fine-tuned bases", FIGURES + "bases"),
    "figfew": (figfew, "a distilled UNet beside guides in 8, 4, 2 and 1 steps", FIGURES),
    "edits": (edits, "image-to-image and inpainting with the tiny guide",
              "weights vae device dtype g seed"),
    "restyle": (restyle, "postcards in another style, by encoding and decoding",
                "weights vae device dtype g seed bases"),
    "inversion": (inversion, "what encoding to noise and decoding changes",
                  "weights vae device dtype g seed guides count"),
    "quality": (quality, "a result of table2 as a chart: quality over time", "quick"),
    "method": (method, "the README's drawing of the method", ""),
    "animation": (animation, "the README's animation of the steps", BASE + "prompt"),
    "speed": (speed, "time of steps, images and updates", SPEED),
    "growth": (growth, "a result of speed as a chart: cost over side and batch", "paths"),
}.items()}


# ------------------------------------------------------------------------------- settings

@dataclass(frozen=True)
class Config:
    """Settings of a command; the command line is generated from them, and every result has them."""

    command: str = option("", "what to measure")
    paths: tuple[str, ...] = option((), "fid: two folders or .npz files; clip: a folder; "
                                         "growth: a result of speed")
    weights: str = option("", "Stable Diffusion 1.5; default: looked for, else the miniature")
    vae: str = option("", "a VAE in place of the checkpoint's: a file, a folder, or a checkpoint")
    clip_model: str = option("", "an open_clip model, MODEL:TAG or MODEL:FILE, or mini; default: "
                                 "mini for the miniature's images, else ViT-g-14:laion2b_s34b_b88k;"
                                 " OpenAI's weights in a file not named so: MODEL-quickgelu:FILE")
    inception: str = option("", "pytorch-fid's weight file; default: looked for in torch's cache")
    prompts: str = option("", "a text, a prompt a line, COCO's captions .json, a .tsv or .csv")
    real: tuple[str, ...] = option((), "reference images, a folder or .npz; table3: one for all "
                                       "bases, or one each")
    count: int = option(0, "images, or prompts of a file; 0: 300, or the whole file",
                        low=0, high=MILLION)
    seed: int = option(0, "seed of what is drawn", low=0, high=2**31 - 1)
    batch: int = option(32, "images at a time", low=1, high=4096)
    size: str = option("", "side of the images; default: 512, the miniature's 64; for table1 "
                           "mini, or nothing for Stable Diffusion 1.5")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "of the base; auto: bf16 on CUDA, fp16 if it is old, else fp32",
                        choices=("auto", *DTYPES))
    skip_bad: bool = option(False, "leave out images that can't be read")
    guides: tuple[str, ...] = option((), "more guides, by name (tiny-4) or file")
    bases: tuple[str, ...] = option((), "fine-tuned bases; default: mini/styles")
    prompt: tuple[str, ...] = option((), "what to paint; default: a few examples")
    g: tuple[float, ...] = option((), "guidance numbers, 0: no guidance; default: 2 4 6 8, or 8 "
                                      "where there is one", low=-1000, high=1000, type=float)
    rows: tuple[str, ...] = option((), "measure only these rows, by name (cfg-16); a table's file "
                                       "keeps its others, and all times it has")
    seeds: int = option(0, "seeds, each with --count images; 0: 3", low=0, high=MILLION)
    references: int = option(0, "real postcards to compare with; 0: 2000", low=0, high=MILLION)
    repeats: int = option(0, "rounds of timing; 0: 3", low=0, high=MILLION)
    quick: bool = option(False, "few images, two g, two seeds; in a result file of its own")
    save: str = option("", "write the first folder's statistics to this file, an .npz")
    out: str = option("", "the file; default: in runs/eval")
    update_results: bool = option(False, "write to results/ or docs/, over the project's own")


# ------------------------------------------------------------------------------- the script

def configure(argv: list[str]) -> Config | SpeedConfig:
    """The configuration that a command line gives. Raises BadInput for one that can't be run."""
    name = argv[0]
    require((name.startswith("-"), f"{name}: give the command first, then its flags"),
            (name not in COMMANDS, f"{name}: no such command; `python eval.py` lists them"))
    kind = SpeedConfig if name == "speed" else Config
    command = COMMANDS[name]
    takes = (*command.takes.split(), "out", "update_results")
    unused = [f.name for f in fields(kind) if f.name not in takes]
    given = {word.partition("=")[0] for word in argv}
    require(*((flag_of(field) in given, f"{name} takes no {flag_of(field)}: `python eval.py {name} "
                                        "--help` lists its flags") for field in unused))
    config = parse(kind, f"eval.py {name}", command.about, argv[1:], ("paths",), unused)
    require((config.quick and config.update_results, "--update-results: not with --quick"),
            (name == "match" and config.rows and not (config.out or config.quick),
             "--rows: match writes these rows only, so give their file with --out"),
            (world_size() > 1 and name not in ("table2", "table3"),
             f"{name} runs in one process: leave out torchrun"))
    return replace(config, command=name)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__.splitlines()[0], *(f"    {name:10} {command.about}" for name, command in
                                         COMMANDS.items()), sep="\n")
        return print("`python eval.py COMMAND --help` lists the flags of one.")

    def command() -> None:
        config = configure(argv)
        COMMANDS[config.command].run(replace(config, device=find_device(config.device)))
        if config.quick:
            print_once("--quick: few images, measured once; not comparable with the README's table")

    run_command("eval.py", command, "pass a smaller --batch")


if __name__ == "__main__":
    startup.imported()
    main()
