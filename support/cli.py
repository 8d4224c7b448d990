"""Command lines: one frozen dataclass a script is its configuration, and its flags come from it.

Whatever a person passes that can't be used ends in one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import field, fields
from typing import TypeVar

import torch
from safetensors import SafetensorError

Config = TypeVar("Config")
BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")     # line breaks, control characters


class BadInput(ValueError):
    """Something the person gave can't be used; the message is all they need to see."""


def require(*faults: tuple[object, str]) -> None:
    """Raises BadInput with the sentence of the first fault whose condition holds."""
    for condition, sentence in faults:
        if condition:
            raise BadInput(sentence)


def one_line(text: str) -> str:
    """The text with its line breaks and control characters as spaces."""
    return BREAKS.sub(" ", text)


def option(default, help: str, *, group: str = "", low=None, high=None, above=None, below=None,
           **flag):
    """A field of a configuration: its default, help text, bounds, and argparse's keywords.

    group is the heading that --help lists it under; the fields after it share it until the next.
    low and high are allowed values, above and below are not.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default,
                 metadata={"flag": {"help": help, **flag}, "bounds": bounds, "group": group})


def flag_of(name: str) -> str:
    """The flag of a field: --max-updates of max_updates."""
    return "--" + name.replace("_", "-")


def check_bounds(config) -> None:
    """Raises BadInput for the first number in a configuration that is out of its bounds."""
    for f in fields(config):
        values = getattr(config, f.name)
        for value in values if isinstance(values, tuple) else (values,):
            _check_bound(f, value)


def _check_bound(f, value) -> None:
    low, high, above, below = (f.metadata["bounds"][k] for k in ("low", "high", "above", "below"))
    if low is high is above is below is None:
        return
    # Written so that a NaN, which compares False with everything, is refused.
    fits = ((low is None or value >= low) and (high is None or value <= high)
            and (above is None or value > above) and (below is None or value < below))
    words = {"at least": low, "above": above, "at most": high, "below": below}
    wanted = " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)
    if low is not None and high is not None:
        wanted = f"from {low} to {high}"
    require((not fits, f"{flag_of(f.name)} {value}: must be {wanted}"))


class Parser(argparse.ArgumentParser):
    """Answers a command line it can't read with one sentence, without its usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def parse(kind: type[Config], prog: str, description: str, argv: list[str] | None = None,
          positional: tuple[str, ...] = (), unused: Collection[str] = ()) -> Config:
    """The configuration of class `kind` that a command line gives; one flag a field.

    A field with a tuple for its default takes several values, and may be given again where that
    default is empty. Fields named in `positional` come without a flag, before the others; those in
    `unused` have no flag and keep their defaults. Raises BadInput where a number is out of its
    bounds.
    """
    escape_unprintable_output()
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    group = parser
    for f in fields(kind):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        if f.name not in unused:
            _add_flag(group, f, positional)
    given = vars(parser.parse_intermixed_args(argv))
    given = {f.name: f.default for f in fields(kind) if f.name in unused} | given
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for f in fields(kind):                                   # argparse makes a list of --seed=--
        if isinstance(given[f.name], tuple) and not isinstance(f.default, tuple):
            parser.error(f"argument {flag_of(f.name)}: expected one argument")
    config = kind(**given)
    try:
        check_bounds(config)
    except BadInput as error:
        parser.error(str(error))
    return config


def _add_flag(parser: argparse._ActionsContainer, f, positional: tuple[str, ...]) -> None:
    more = dict(f.metadata["flag"])
    if f.name in positional:
        parser.add_argument(f.name, **({"nargs": "*"} if f.default == () else {}), **more)
    elif isinstance(f.default, bool):
        parser.add_argument(flag_of(f.name), action="store_true", **more)
    elif f.default == ():
        parser.add_argument(flag_of(f.name), nargs="+", action="extend", default=[], **more)
    else:
        more["help"] += "" if f.default == "" else " (%(default)s)"
        if isinstance(f.default, tuple):
            more |= {"nargs": len(f.default), "type": type(f.default[0])}
        parser.add_argument(flag_of(f.name), **{"type": type(f.default), "default": f.default}
                            | more)


def escape_unprintable_output() -> None:
    """Has stdout and stderr escape what their encoding lacks: names of files may hold that."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run_command(prog: str, command: Callable[[], object], memory_advice: str,
                interrupted: Callable[[], str] = lambda: "stopped") -> None:
    """Runs a script's command. What can be expected to fail ends in one sentence on stderr.

    Exit code 2 for anything a person can mend, 130 for Ctrl-C, where `interrupted` says what was
    kept. Other errors are bugs and keep their traceback.
    """
    try:
        return command()
    except KeyboardInterrupt:
        code, sentence = 130, interrupted()
    except (BadInput, ImportError, SafetensorError) as error:
        code, sentence = 2, str(error)
    except OSError as error:
        file = error.filename2 or error.filename or "a file"
        code, sentence = 2, f"{file}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            code, sentence = 2, f"out of memory: {memory_advice}"
        elif str(error).startswith("DataLoader worker"):
            code, sentence = 2, ("a process that loads images was killed, as happens where memory "
                                 f"runs out: {memory_advice}")
        elif is_compile_error(error):
            code, sentence = 2, ("--compile can't be used here, leave it out "
                                 f"({str(error).strip().splitlines()[0]})")
        else:
            raise
    if sentence:
        print(f"{prog}: {one_line(sentence)}", file=sys.stderr)
    raise SystemExit(code)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on a CPU."""
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or "can't allocate memory" in str(error)


def is_compile_error(error: BaseException) -> bool:
    """Whether torch.compile failed, as it does where a machine has no compiler."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
