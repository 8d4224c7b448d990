"""Scores of images, and the paper's tables and figures: `python eval.py COMMAND`.

    fid A B                     distance between two sets of images, folders or .npz files
    clip DIR --prompts FILE     how far images show what their prompts say
    table1                      parameters and arithmetic of networks, guides and whole images
    table2                      guides, CFG and no guidance, by number of steps and g
    table3                      the plain base's guides plugged into fine-tuned bases
    match                       how much of the CFG correction a guide explains, by g and by t
    fig5 fig6 fig7 fig8         the paper's figures
    quality                     Table 2 as a chart: quality over measured time
    method animation            the README's drawing of the method, and its animation of the steps
    speed                       what steps, images and updates take; see speed --help
    growth                      speed's result on a GPU as a chart: cost over side and batch

Each writes its result, with its protocol, to a JSON or PNG file. The distance is FID where
pytorch-fid's Inception weights are found; else it is the same distance between features of a CLIP
and is called CLIP-FID, which can't be compared with an FID. The miniature's tables have CLIP-FID of
its own CLIP unless --inception asks for FID; `fid` takes images of 64 x 64 for the miniature's
where Inception is not found, and says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from evaluation.clip_score import clip_score
from evaluation.cost import table1
from evaluation.drawings import animation, method
from evaluation.fid import fid
from evaluation.figures import fig5, fig6, fig7, fig8, quality
from evaluation.match import match
from evaluation.speed import speed
from evaluation.speed_report import growth
from evaluation.tables import table2, table3
from support.cli import option, parse, require, run_command
from support.distributed import world_size
from support.machine import DTYPES, find_device

COMMANDS = {"fid": fid, "clip": clip_score, "table1": table1, "table2": table2, "table3": table3,
            "match": match, "fig5": fig5, "fig6": fig6, "fig7": fig7, "fig8": fig8,
            "quality": quality, "method": method, "animation": animation, "speed": speed,
            "growth": growth}
MILLION = 10**6                 # no two seeds of a table share noise up to as many images


@dataclass(frozen=True)
class Config:
    """Settings of a command; the command line is generated from them, and every result has them."""

    command: str = option("", "what to measure", choices=tuple(COMMANDS))
    paths: tuple[str, ...] = option((), "fid: two folders or .npz files; clip: a folder; "
                                         "growth: a result of speed")
    weights: str = option("", "Stable Diffusion 1.5; default: looked for, else the miniature")
    clip_model: str = option("", "an open_clip model, MODEL:TAG or MODEL:FILE, or mini; default: "
                                 "mini for the miniature's images, else ViT-g-14:laion2b_s34b_b88k;"
                                 " OpenAI's weights in a file not named so: MODEL-quickgelu:FILE")
    inception: str = option("", "pytorch-fid's weight file; default: looked for in torch's cache")
    prompts: str = option("", "prompts: a text, one a line, COCO's captions .json, a .tsv or .csv")
    real: tuple[str, ...] = option((), "reference images, a folder or .npz; table3: one for all "
                                       "bases, or one each")
    count: int = option(0, "so many images, or prompts of a file; 0: all", low=0, high=MILLION)
    seed: int = option(0, "seed of what is drawn", low=0, high=2**31 - 1)
    batch: int = option(32, "images at a time", low=1, high=4096)
    size: str = option("", "side of the images; default: 512, the miniature's 64; table1: mini "
                           "for the miniature, default: Stable Diffusion 1.5")
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "of the base; auto: bf16 on CUDA, fp16 if it is old, else fp32",
                        choices=("auto", *DTYPES))
    skip_bad: bool = option(False, "leave out images that can't be read")
    guides: tuple[str, ...] = option((), "tables: more guides, by name (tiny-4) or file")
    bases: tuple[str, ...] = option((), "table3, fig8: fine-tuned bases; default: mini/styles")
    prompt: tuple[str, ...] = option((), "figures: what to paint; default: a few examples")
    g: tuple[float, ...] = option((), "guidance numbers, 0: no guidance; default: 2 4 6 8, or 8 "
                                      "where there is one", low=-1000, high=1000, type=float)
    seeds: int = option(0, "tables: seeds, each with --count images; 0: 3", low=0, high=MILLION)
    references: int = option(0, "real postcards to compare with; 0: 2000", low=0, high=MILLION)
    repeats: int = option(0, "tables: rounds of timing; 0: 3", low=0, high=MILLION)
    quick: bool = option(False, "few images, two g, two seeds; in a result file of its own")
    save: str = option("", "fid: write the first folder's statistics to this file, an .npz")
    out: str = option("", "the file; default: results/COMMAND.json, a figure's in docs/")


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of `eval.py speed`. Weights are random: they don't change what anything takes."""

    command: str = option("speed", "what to measure", choices=("speed",))
    size: str = option("sd15", "which networks: Stable Diffusion 1.5's or the miniature's",
                       choices=("sd15", "mini"))
    side: tuple[int, ...] = option((), "sides of the latents, an eighth of the images'; default: "
                                       "64; on a CPU 32 64, with --quick 16; mini: 8",
                                   low=8, high=512, type=int)
    batch: tuple[int, ...] = option((), "images at a time, in this order; default: 1 16 4; on a "
                                        "CPU or with --quick 1", low=1, high=4096, type=int)
    steps: tuple[int, ...] = option((), "numbers of steps of whole images, all but the first only "
                                        "at the first batch; default: 8 50, with --quick 8; on a "
                                        "CPU 8, with --quick 2", low=1, high=1000, type=int)
    rounds: int = option(0, "how often everything is measured; 0: 5, with --quick 3; on a CPU 3, "
                            "with --quick 1", low=0, high=MILLION)
    minutes: float = option(0.0, "what has not begun by then is left out; 0: 5, with --quick 1; "
                                 "on a CPU no limit", low=0, high=10_000)
    device: str = option("", "cuda or cpu; default: cuda where there is one")
    dtype: str = option("auto", "dtype of all networks; auto: bf16 on CUDA, fp16 if it is old, "
                                "else fp32", choices=("auto", *DTYPES))
    compile: bool = option(False, "also passes and steps compiled, ours and the baseline's; takes "
                                  "minutes")
    baseline: bool = option(False, "diffusers beside it, with the same weights")
    quick: bool = option(False, "small and once, in a result file of its own")
    out: str = option("", "the file; default: results/speed-SIZE-DEVICE.json")


def check(config: Config) -> None:
    """Raises BadInput for settings that the command has no use for."""
    command = config.command
    require(
        (command == "speed", "speed comes first, before its flags"),
        (config.paths and command not in ("fid", "clip", "growth"),
         f"{command} takes no paths, and got {' '.join(config.paths)}"),
        (config.count and command in ("fid", "clip", "table1"),
         f"--count {config.count}: {command} takes all there are; leave it out"),
        (world_size() > 1 and command not in ("table2", "table3"),
         f"{command} runs in one process: leave out torchrun"))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kind = SpeedConfig if argv[:1] == ["speed"] else Config
    config = parse(kind, "eval.py", __doc__.splitlines()[0], argv, ("command", "paths"))

    def command() -> None:
        if kind is Config:
            check(config)
        COMMANDS[config.command](replace(config, device=find_device(config.device)))

    run_command("eval.py", command, "pass a smaller --batch")


if __name__ == "__main__":
    main()
