"""The README agrees with the code and with the result files."""

import json
import re
from pathlib import Path

from mini.check import table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_line_of_the_equation_table_is_where_the_table_says():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 12
    for name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", text), (name, file, line, text)


def test_the_results_table_is_made_from_the_result_file():
    result = json.loads((ROOT / "results" / "mini.json").read_text())
    assert table(result) in README
    assert str(result["pictures"]) in README and result["hardware"] in README


def test_every_picture_and_file_the_readme_names_is_there():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
