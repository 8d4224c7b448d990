"""Where results go, and how they are written: JSON for programs, a page of Markdown for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from support.files import expand, write_json, write_text

RUNS = Path("runs/eval")        # what commands write, and images of the tables' cells
RESULTS = Path("results")       # what README and RESULTS show, and the images of it
DOCS = Path("docs")


def result_file(config, name: str = "") -> Path:
    """The JSON file of a command's result: --out, else NAME.json in runs/eval.

    With --update-results it is in results/, and with --quick it has a name of its own.
    """
    return _output_file(config, RESULTS, f"{name or config.command}.json")


def image_file(config, name: str = "") -> Path:
    """The file of a command's image, likewise; with --update-results it is in docs/."""
    return _output_file(config, DOCS, name or f"{config.command}.png")


def _output_file(config, shown: Path, name: str) -> Path:
    path = (shown if config.update_results else RUNS) / name
    path = path.with_stem(path.stem + "-quick") if config.quick else path
    return expand(config.out) if config.out else path


def earlier_result(config, name: str) -> Path:
    """The result that another command wrote: in runs/eval, else the project's own in results/.

    An image for docs/ is drawn from results/ alone.
    """
    mine = RUNS / f"{name}{'-quick' * config.quick}.json"
    found = config.quick or mine.exists() and not config.update_results
    return mine if found else RESULTS / f"{name}.json"


def write_result(file: Path, result: dict, page: str = "") -> None:
    """Writes a result as JSON; a page of Markdown is written beside it and printed."""
    write_json(file, result)
    if page:
        write_text(file.with_suffix(".md"), page)
        print(page)
    print(f"written to {file}" + f" and {file.with_suffix('.md')}" * bool(page))


def markdown_table(head: Iterable, rows: Iterable[Iterable], align: str = "---") -> list[str]:
    """The lines of a table whose first column holds names; `align` is that of the others."""
    head = list(map(str, head))
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], "|---" + f"|{align}" * (len(head) - 1) + "|", *lines[1:]]


def bullet_list(values: dict) -> list[str]:
    """A list of the entries that are no dictionaries themselves."""
    return [f"- {name}: {value}" for name, value in values.items() if not isinstance(value, dict)]


def protocol_list(protocol: dict) -> list[str]:
    """A protocol as a list; of the packages' versions only torch's, the rest is in the JSON."""
    return bullet_list(protocol | {"torch": protocol["versions"]["torch"]})


def plus_minus(mean: float, spread: float | None, digits: int = 2) -> str:
    """"1.23 ± 0.04", or the mean alone where one value has no spread."""
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def passes_text(unet: int | str, guide: int) -> str:
    """"8 + 8 guide": passes of the UNet, and of the guide where it makes any."""
    return f"{unet} + {guide} guide" if guide else f"{unet}"
