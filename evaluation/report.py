"""Where results go, and how they are written: JSON for programs, a page of Markdown for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from support.files import expand, write_json, write_text

RUNS = Path("runs/eval")        # images of the tables' cells, and results of --quick


def result_file(config) -> Path:
    """The JSON file of a command's result. That of --quick never overwrites a real result."""
    if not config.quick:
        return expand(config.out or f"results/{config.command}.json")
    path = expand(config.out or RUNS / f"{config.command}.json")
    return path.with_stem(f"{path.stem.removesuffix('-quick')}-quick")


def write_result(file: Path, result: dict, page: str = "") -> None:
    """Writes a result as JSON; a page of Markdown is written beside it and printed."""
    write_json(file, result)
    if page:
        write_text(file.with_suffix(".md"), page)
    print(page or f"written to {file}")


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
