"""The house: imports run one way, and importing anything does nothing else.

unet, vae, clip_text → ppdd → meng → support → mini → evaluation → scripts: each file may import
only what stands to its left. Inside support the files have an order too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("unet", "vae", "clip_text")
SUPPORT = ("startup", "cli", "machine", "files", "distributed", "configs", "checkpoint", "lora",
           "group_norm", "capture", "base", "guides", "fast", "images", "captions", "data",
           "editing", "muon", "batches", "training_state")
SCRIPTS = ("train", "sample", "eval", "mini.train", "mini.check", "mini.study", "mini.tune")
LAYERS = {"unet": 0, "vae": 0, "clip_text": 0, "ppdd": 1, "meng": 2, "support": 3, "mini": 4,
          "evaluation": 5}
SCRIPT_LAYER = 6
# Beside the standard library, the networks import this alone.
NETWORKS_NEED = {"torch": NETWORKS, "regex": ("clip_text",)}
# Big, slow to import, or bringing such a package: only these files, and only where it is used.
LAZY = {"open_clip": ("evaluation.", "mini.train"), "torchvision": ("evaluation.",),
        "diffusers": ("evaluation.baseline",), "transformers": ("evaluation.baseline",),
        "matplotlib": ("evaluation.",)}


# ------------------------------------------------------------------------------- the rule


class Import(NamedTuple):
    """An import statement: the module it stands in, what it asks for, and whether it runs at once.
    """

    file: str           # dotted name of the importing module
    line: int
    target: str         # dotted name of the imported module
    lazy: bool          # inside a function

    @property
    def package(self) -> str:
        return self.target.split(".")[0]

    def fault(self, rule: str) -> str:
        return f"{self.file}, line {self.line}: imports {self.target}: {rule}"


def modules_in(root: Path) -> dict[str, Path]:
    """Every module of the tree but its tests, by its dotted name."""
    files = [*root.glob("*.py"), *(f for folder in ("support", "mini", "evaluation")
                                   for f in root.glob(f"{folder}/**/*.py"))]
    names = {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imports_in(root: Path) -> list[Import]:
    modules = modules_in(root)
    return [found for name, file in sorted(modules.items())
            for found in _imports(name, ast.parse(file.read_text(encoding="utf-8")), modules)]


def _imports(name: str, tree: ast.AST, modules: dict[str, Path], lazy: bool = False
             ) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(name, node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = _absolute(name, node, modules)
            for alias in node.names:            # `from support import files` asks for support.files
                submodule = f"{package}.{alias.name}"
                yield Import(name, node.lineno, submodule if submodule in modules else package,
                             lazy)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(name, node, modules, lazy or inside)


def _absolute(name: str, node: ast.ImportFrom, modules: dict[str, Path]) -> str:
    if not node.level:
        return node.module
    parts = name.split(".")
    if modules[name].name != "__init__.py":
        parts = parts[:-1]
    parts = parts[:len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def layer(name: str) -> int:
    """The place of a module in the line; scripts, wherever they lie, are the last."""
    return SCRIPT_LAYER if name in SCRIPTS else LAYERS.get(name.split(".")[0], SCRIPT_LAYER)


def faults_in(root: Path) -> list[str]:
    """Every import that runs against the rule."""
    modules = modules_in(root)
    faults = []
    for imported in imports_in(root):
        own = imported.package in {name.split(".")[0] for name in modules}
        faults += own_faults(imported) if own else other_faults(imported)
    unknown = [name for name in modules if "." not in name and name not in (*LAYERS, *SCRIPTS)]
    faults += [f"{name}: no place in the house" for name in unknown]
    return [*dict.fromkeys(faults + cycles(imports_in(root), set(modules)))]


def own_faults(imported: Import) -> Iterator[str]:
    file, target = imported.file, imported.target
    if target in SCRIPTS:
        yield imported.fault("nothing imports a script")
    elif target == file or file.startswith("tests"):
        return
    elif layer(target) > layer(file):
        yield imported.fault("what stands to its right")
    elif layer(target) == layer(file) == 0:
        yield imported.fault("the networks do not know each other")
    parts = [name.split(".") for name in (file, target)]
    if all(part[0] == "support" and len(part) > 1 for part in parts):
        names = [part[1] for part in parts]
        if set(names) - set(SUPPORT):
            yield imported.fault(f"{' or '.join(sorted(set(names) - set(SUPPORT)))} has no place "
                                 "in support")
        elif SUPPORT.index(names[1]) > SUPPORT.index(names[0]):
            yield imported.fault("what comes later in support")


def other_faults(imported: Import) -> Iterator[str]:
    file, package = imported.file, imported.package
    if file in NETWORKS and package not in sys.stdlib_module_names:
        if file not in NETWORKS_NEED.get(package, ()):
            yield imported.fault("a network needs no such package")
    if package in LAZY:
        if not imported.lazy:
            yield imported.fault("only in the function that needs it")
        if not file.startswith(LAZY[package]):
            yield imported.fault("not in this file")


def cycles(imports: list[Import], modules: set[str]) -> list[str]:
    """A cycle among modules, where there is one."""
    needs = {name: {i.target for i in imports if i.file == name} & modules - {name}
             for name in modules}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return [f"a cycle: {' → '.join(error.args[1])}"]
    return []


# ------------------------------------------------------------------------------- it holds


def test_imports_run_one_way():
    assert modules_in(ROOT).keys() >= {*NETWORKS, "ppdd", "support.cli", "mini.train", "eval"}
    assert len(imports_in(ROOT)) > 200
    assert not faults_in(ROOT)


def test_every_file_of_support_has_its_place():
    files = {file.stem for file in (ROOT / "support").glob("*.py")} - {"__init__"}
    assert files == set(SUPPORT)


def test_every_script_is_one_and_no_other_file():
    """What has a command line is a script, and none is missing from the list above."""
    scripts = {name for name, file in modules_in(ROOT).items()
               if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")}
    assert scripts - {"mini.postcards"} == set(SCRIPTS)        # postcards draws a sheet of itself


def test_nothing_is_called_utils():
    assert not [name for name in modules_in(ROOT) if "util" in name or "helper" in name]


# ------------------------------------------------------------------------------- it can fail

GOOD = {"unet.py": "import torch", "vae.py": "import math", "clip_text.py": "import regex",
        "ppdd.py": "from unet import UNet", "support/__init__.py": "",
        "support/cli.py": "import argparse", "support/files.py": "from support.cli import BadInput",
        "support/base.py": "import ppdd", "mini/__init__.py": "",
        "mini/judge.py": "from support import files", "mini/train.py": "from mini import judge",
        "evaluation/__init__.py": "", "evaluation/fid.py": "def f():\n    import open_clip",
        "train.py": "from mini.judge import x"}


@pytest.fixture
def house(tmp_path):
    """Writes a small house, with some files changed, and returns its faults."""
    def build(changed: dict[str, str]) -> list[str]:
        for name, text in (GOOD | changed).items():
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return faults_in(tmp_path)
    return build


def test_a_good_house_has_no_faults(house):
    assert house({}) == []
    assert house({"support/files.py": "from . import cli\nfrom .cli import BadInput"}) == []


@pytest.mark.parametrize("file, text, fault", [
    ("unet.py", "import ppdd", "unet, line 1: imports ppdd: what stands to its right"),
    ("vae.py", "from unet import UNet", "vae, line 1: imports unet: the networks do not know"),
    ("unet.py", "import safetensors", "unet, line 1: imports safetensors: a network needs no"),
    ("unet.py", "import regex", "unet, line 1: imports regex: a network needs no such"),
    ("unet.py", "def f():\n    import numpy", "unet, line 2: imports numpy: a network needs no"),
    ("ppdd.py", "from support import cli", "ppdd, line 1: imports support.cli: what stands to"),
    ("ppdd.py", "import os\ndef f():\n    from support.cli import x",
     "ppdd, line 3: imports support.cli: what stands to its right"),
    ("support/cli.py", "import mini.judge", "support.cli, line 1: imports mini.judge: what stands"),
    ("support/cli.py", "from .files import x", "support.cli, line 1: imports support.files: what"),
    ("support/cli.py", "from . import files", "support.cli, line 1: imports support.files: what"),
    ("support/other.py", "import support.cli", "imports support.cli: other has no place in"),
    ("mini/judge.py", "from evaluation.fid import f", "imports evaluation.fid: what stands to its"),
    ("evaluation/fid.py", "import train", "evaluation.fid, line 1: imports train: nothing imports"),
    ("evaluation/fid.py", "from mini.train import x", "imports mini.train: nothing imports a"),
    ("evaluation/fid.py", "from mini import train", "imports mini.train: nothing imports a script"),
    ("train.py", "if True:\n    import sample", "train, line 2: imports sample: nothing imports"),
    ("evaluation/fid.py", "import open_clip", "imports open_clip: only in the function that needs"),
    ("evaluation/fid.py", "class A:\n    import torchvision", "imports torchvision: only in the"),
    ("train.py", "def f():\n    import open_clip", "train, line 2: imports open_clip: not in this"),
    ("support/cli.py", "def f():\n    from diffusers import x", "imports diffusers: not in this"),
    ("helpers.py", "", "helpers: no place in the house"),
])
def test_a_bad_import_is_named(house, file, text, fault):
    faults = house({file: text, "sample.py": ""})
    assert any(fault in line for line in faults), faults


def test_a_cycle_is_named(house):
    faults = house({"mini/judge.py": "from mini import dataset", "mini/dataset.py":
                    "def f():\n    from mini.judge import x"})
    assert len(faults) == 1 and faults[0].startswith("a cycle: ")
    assert "mini.dataset → mini.judge" in faults[0]


# ------------------------------------------------------------------------------- importing

EVERYTHING = """
import os, random, signal, socket, sys, warnings

def no_network(*args, **kwargs):
    raise AssertionError("an import asked for the network")

socket.socket.connect = socket.getaddrinfo = no_network
sys.path.insert(0, sys.argv.pop(1))
names = sys.argv[1:]
del sys.argv[1:]
import numpy, torch
warnings.simplefilter("error")

def state():
    return (sorted(os.listdir()), dict(os.environ), os.getcwd(), list(sys.argv),
            [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], list(warnings.filters),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
            torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
            torch.cuda.is_initialized(), torch.distributed.is_initialized())

before = state()
for name in names:
    __import__(name)
    for k, (then, now) in enumerate(zip(before, state())):
        assert then == now, f"{name} changed {k}: {then} to {now}"
big = {"open_clip", "torchvision", "diffusers", "transformers", "matplotlib"}
assert not big & {*sys.modules}, big & {*sys.modules}
import clip_text
clip_text.Tokenizer()("a cat")
assert not big & {*sys.modules}, "the tokenizer imported " + str(big & {*sys.modules})
"""


def test_importing_anything_does_nothing_else(tmp_path):
    """No file, no output, no network, no GPU, no setting changed; and nothing big but PyTorch."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", EVERYTHING, str(ROOT), *modules_in(ROOT)], cwd=tmp_path,
        capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not [*tmp_path.iterdir()]
