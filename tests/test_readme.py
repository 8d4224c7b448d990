"""README.md and RESULTS.md agree with the code: their links, line anchors, files and commands."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import eval as eval_script
import sample
import train
from mini import check as mini_check
from mini import train as mini_train
from support import editing
from support.cli import flag_of, parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md")}
README = PAGES["README.md"]
ANCHOR = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)")


def line_of(name: str, file: str) -> int:
    """Line of a function, class or method in a file; its name begins with that of the module."""
    module, *names = name.split(".")
    assert module == Path(file).stem, name
    node: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in names:
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    return node.lineno


@pytest.mark.parametrize("page", PAGES)
def test_every_anchor_is_the_line_of_its_definition(page):
    wrong = [(name, line, line_of(name, file)) for name, file, line in ANCHOR.findall(PAGES[page])
             if line_of(name, file) != int(line)]
    assert not wrong, wrong
    assert page != "README.md" or len(ANCHOR.findall(README)) >= 12


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Files exist, and so do the headings that a link goes to."""
    for target in re.findall(r"\]\((?!http)([^)]+)", PAGES[page]):
        file, _, heading = target.partition("#")
        assert (ROOT / file).exists(), target
        if heading and not file.endswith(".py"):
            assert heading in headings(PAGES[file or page]), target


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)^```.*?^```", "", text, flags=re.M))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_in_code_marks_exists(page):
    """Files and folders of this repository; those that commands make or a user has are left out."""
    named = re.findall(r"`((?:support|evaluation|mini|tests|results|docs)/[\w./-]*)`", PAGES[page])
    assert named
    for name in named:
        if name.startswith("mini/styles"):                  # not bundled
            continue
        assert (ROOT / name).exists(), name


def test_the_layout_names_every_module_at_the_top():
    layout = README[README.index("## Contributing"):]
    assert all(path.name in layout for path in ROOT.glob("*.py"))
    assert all(f"{folder}/" in layout for folder in ("support", "evaluation", "mini", "tests",
                                                     "results", "docs"))


# ------------------------------------------------------------------------------- commands

SCRIPTS = {"train.py": (train.Config, train.check, ()),
           "sample.py": (sample.Config, sample.check, ()),
           "eval.py": (None, None, ()),                   # whose own reader is called below
           "mini/check.py": (mini_check.Config, None, ()),
           "mini/train.py": (mini_train.Config, None, ())}


def commands() -> Iterator[list[str]]:
    """The words of every command of a script, in blocks of shell lines and between code marks.

    The rows of mini/tune.py's commands are looked up by test_results.py.
    """
    for text in PAGES.values():
        blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", text)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        marks = re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
        for command in "&&".join((*lines, *marks)).split("&&"):
            words = shlex.split(command, comments=True)
            if any(word in SCRIPTS for word in words[:-1]):
                yield words


@pytest.mark.parametrize("words", [*commands()], ids=" ".join)
def test_every_command_is_one_that_its_script_accepts(words, monkeypatch):
    """Each parses and passes the script's own check, and no flag is an abbreviation."""
    monkeypatch.setattr(editing, "find_images", lambda path: [])        # the reader's own images
    monkeypatch.setattr(editing, "check_files", lambda images, mask: None)
    script = next(word for word in words if word in SCRIPTS)
    before, arguments = words[:words.index(script)], words[words.index(script) + 1:]
    assert before in ([], ["python"]) or (before[0], before[-1]) == ("torchrun", "--")
    if script == "eval.py":
        config = eval_script.configure(arguments)
        kind, check = type(config), None
    else:
        kind, check, positional = SCRIPTS[script]
        config = parse(kind, script, "", arguments, positional)
    if check:
        check(config)
    flags = {flag_of(field.name) for field in fields(kind)}
    assert {word for word in arguments if word.startswith("--")} <= flags


def test_the_test_command_stands_on_a_line_of_its_own():
    """.ci/run takes its install lines and its test command from README.md."""
    assert re.search(r"(?m)^python -m pytest -q$", README)
    files = set(re.findall(r"pip install -r (requirements[a-z-]*\.txt)", README))
    assert files == {"requirements.txt", "requirements-dev.txt"}
    assert all((ROOT / file).exists() for file in files)


def test_every_command_of_eval_is_documented():
    text = PAGES["README.md"] + PAGES["RESULTS.md"]
    missing = [name for name in eval_script.COMMANDS
               if not re.search(rf"eval\.py {name}\b|`{name}`", text)]
    assert not missing, missing


def test_removed_flags_are_named_only_where_they_are_said_to_be_removed():
    for page, text in PAGES.items():
        body = text if page == "README.md" else text.replace(
            text[text.index("## What was tried"):text.index("## Figures")], "")
        for flag in ("--ema", "--pool", "--form product", "--pictures", "--peer",
                     "--clip "):
            assert flag not in body, (page, flag)


# ------------------------------------------------------------------------------- numbers in words

def test_the_steps_are_those_of_the_code():
    import ppdd

    assert "t_i = round(1000 i / N) − 1" in README
    assert ppdd.step_grid(8)[0] == 999 and ppdd.step_grid(8)[2::2] == ppdd.step_grid(4)[1:]


def test_the_defaults_are_those_of_the_code():
    suits = [train.DEFAULTS["sd", kind, "cuda"] for kind in ("tiny", "full")]
    (updates, halving_updates, batch), = {(s.updates, s.halving_updates, s.batch) for s in suits}
    assert (f"default schedule is {updates:,} updates of batch {batch} and three "
            f"halvings of {halving_updates:,} updates") in " ".join(README.split())
    assert (train.Config.start_steps, train.Config.end_steps) == (64, 8)


def test_the_python_version_is_the_one_that_is_checked():
    assert re.search(r'target-version = "py310"', (ROOT / "pyproject.toml").read_text())
    assert "Python 3.10 or later" in README
