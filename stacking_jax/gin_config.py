"""Reads .gin files and `--gin.NAME=VALUE` bindings, and refuses whatever would do nothing.

gin itself accepts any macro, wherever it is set: a mistyped `TRAIN_STEP = 200` changes nothing
and says nothing. Here the files are parsed with gin's own parser into a table first; every name
in it is checked, and only what reaches a configurable is bound. All errors are `UserError`s of
one line that name the file and line, or the flag, and the nearest names that exist.

A .gin file is code: `import module` in it imports. It may import this package, and what the
caller of `load` names (`--gin_import`); still, read only files you would run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stacking_jax.errors import UserError
from stacking_jax.gin_table import (
    FLAG,
    Table,
    check_name,
    did_you_mean,
    first_words,
    gin_root,
    nearest,
)

__all__ = [
    "LoadedConfig",
    "bindings_from_argv",
    "clear",
    "gin_root",
    "import_modules",
    "load",
    "one_line_errors",
    "operative_text",
    "require_gin",
    "split_argv",
]


@dataclass(frozen=True)
class LoadedConfig:
    """What `load` read: the paths of all files in order, the bindings, and gin's text of both."""

    files: tuple[Path, ...]
    bindings: tuple[str, ...]
    text: str


def load(
    gin_files: Sequence[str | Path],
    bindings: Sequence[str] = (),
    register: Callable[[], object] | None = None,
    scopes: Sequence[str] = (),
    imports: Sequence[str] = (),
) -> LoadedConfig:
    """Configures gin from files, then bindings; later ones override earlier ones.

    Whatever gin held before is dropped, and the result is locked until `clear`.

    Args:
      gin_files: paths, looked up in the working directory and then among the files that come
        with the package ('gin/experiments/demo.gin' works anywhere). Included files are also
        looked up next to the file that includes them.
      bindings: 'NAME=VALUE' in gin syntax; NAME is a macro or '[scope/]configurable.parameter'.
      register: registers the configurables; by default imports `stacking_jax.configurables`.
      scopes: names of the scopes that Python code enters with `gin.config_scope`.
      imports: modules that the files may import, with all that lies in them, beside this package.

    Raises:
      UserError: gin-config is missing; a file cannot be found, read or parsed, or imports another
        module; a name, in a file or a binding, names nothing; a macro that is used is not set, or
        is `%gin.REQUIRED`; two files of gin/methods bind a parameter differently.
    """
    gin = require_gin()
    clear()
    if register is None:
        importlib.import_module("stacking_jax.configurables")
    else:
        register()
    table = Table(gin, imports)
    for name in gin_files:
        table.read_file(str(name), included_from=None)
    for binding in bindings:
        table.read_binding(binding)
    table.bind_all(scopes)
    return LoadedConfig(tuple(table.files), tuple(bindings), gin.config_str())


def import_modules(names: Iterable[str]) -> None:
    """Imports modules of the user's own, as `python -m` would find them: the working
    directory comes first.

    Raises:
      UserError: there is no such module, or it raises while it is imported.
    """
    for name in names:
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name)
        except UserError:
            raise
        except Exception as error:  # whatever the module does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"--gin_import {name} failed ({type(error).__name__}: {reason}): name a module as "
                "`import` does, with its folder in the working directory or on PYTHONPATH"
            ) from error


def operative_text() -> str:
    """The values that the configurables called so far really got, as gin text."""
    return require_gin().operative_config_str()


def clear() -> None:
    """Forgets all bindings and unlocks gin; the registered configurables stay."""
    require_gin().clear_config()


def require_gin():
    """The module `gin` of gin-config.

    Raises:
      UserError: it is not installed. Where a folder `gin/` lies in the working directory (a
        checkout of this repository), `import gin` succeeds then, with an empty namespace package.
    """
    try:
        import gin
    except ImportError:
        gin = None
    if gin is None or not hasattr(gin, "parse_config"):
        folder = None if gin is None else next(iter(gin.__path__), None)
        found = f" (`import gin` found only the folder {folder})" if folder else ""
        raise UserError(
            f"gin-config is not installed{found}: run `bash launch/setup.sh`, "
            "or `pip install gin-config`"
        )
    return gin


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Around calls of configurables: makes what gin raises or lengthens one line again.

    gin appends 'In call to configurable ...' lines to any exception that passes through it,
    `UserError`s included, and reports required parameters without a value as a RuntimeError.
    """
    try:
        yield
    except UserError as error:
        raise UserError(first_words(error)) from error
    except RuntimeError as error:
        found = re.match(r"Required bindings for `(.+?)` not provided in config: (.+)", str(error))
        if not found:
            raise
        names = re.findall(r"'(\w+)'", found[2])
        flags = " ".join(f"{FLAG}{found[1]}.{name}=VALUE" for name in names)
        raise UserError(f"not set, but required by {found[1]}: add {flags}") from error


def split_argv(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into bindings 'NAME=VALUE' and everything else.

    Do this before argparse sees the line: it takes a value that contains a space for a
    positional argument, even when it starts with '--'.

    Raises:
      UserError: `--gin.NAME` without '=VALUE', or with a NAME that gin cannot read.
    """
    bindings, rest = [], []
    for index, argument in enumerate(argv):
        if argument == "--":
            rest.extend(argv[index:])
            break
        if not argument.startswith(FLAG):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix(FLAG).partition("=")
        if not equals or not value.strip():
            raise UserError(f"{argument}: a value is missing; write {FLAG}{name or 'NAME'}=VALUE")
        check_name(name)
        bindings.append(f"{name}={value}")
    return bindings, rest


def bindings_from_argv(leftovers: Sequence[str], known_flags: Iterable[str] = ()) -> list[str]:
    """The bindings among the arguments that argparse did not know; anything else is an error.

    Args:
      leftovers: the second result of `ArgumentParser.parse_known_args`.
      known_flags: the flags to suggest instead of an unknown one ('--run_dir', ...).
    """
    bindings, rest = split_argv(leftovers)
    if rest:
        known = [*known_flags, FLAG + "NAME=VALUE"]
        near = nearest(rest[0].partition("=")[0], known)
        raise UserError(f"unknown argument {rest[0]}{did_you_mean(near or known)}")
    return bindings
