"""The table of gin bindings behind `gin_config.load`: what was set where, and what it reaches.

gin's own parser reads the statements; the module `gin` is handed in, so that importing this
costs nothing and needs nothing.
"""

from __future__ import annotations

import difflib
import inspect
import io
import re
import shlex
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.gin_methods import MethodFile, check_layers, method_file

FLAG = "--gin."
_NAME = re.compile(r"([A-Za-z_]\w*/)*([A-Za-z_]\w*\.)*[A-Za-z_]\w*\Z")


def gin_root() -> Path:
    """The folder with the .gin files of this package: `gin/` of a checkout, or the wheel's copy."""
    here = Path(__file__).resolve().parent
    installed = here / "gin_files"
    return installed if installed.is_dir() else here.parent / "gin"


# The table


@dataclass(frozen=True)
class _Binding:
    """One statement 'key = value'; `key` is gin's (scope, complete selector, parameter).

    `method` is the file of gin/methods that it belongs to, if it does.
    """

    key: tuple[str, str, str]
    name: str
    value: Any
    where: str
    from_command_line: bool
    method: MethodFile | None
    refers_to: tuple[Any, ...] = field(repr=False)

    @property
    def macro(self) -> str | None:
        return self.key[0] if self.key[1] == "gin.macro" else None

    def uses(self) -> list[str]:
        """The names of the macros in the value."""
        return [_macro_name(ref) for ref in self.refers_to if _is(ref, "gin.macro")]

    def is_required(self) -> bool:
        return any(
            _is(ref, "gin.constant") and _macro_name(ref) == "gin.REQUIRED"
            for ref in self.refers_to
        )


class Table:
    """All bindings that were read, in order; the last one of a key counts."""

    def __init__(self, gin, imports: Sequence[str] = ()):
        """`imports` are the modules that files may import beside this package, with what is in
        them."""
        self._gin = gin
        self._imports = ("stacking_jax", *imports)
        self._reading: list[Path] = []
        self._method: MethodFile | None = None
        self.files: list[Path] = []
        self.history: list[_Binding] = []
        self.final: dict[tuple[str, str, str], _Binding] = {}

    def read_file(self, name: str, included_from: Path | None, by: str = "") -> None:
        path = _find(name, included_from)
        if path is None:
            raise _missing(name, included_from, by)
        path = path.resolve()
        if path in self._reading:
            raise UserError(f"{name} includes itself{by}")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {name}{by}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{name}{by} is not UTF-8 text, so it is no gin file") from error
        self._reading.append(path)
        self.files.append(path)
        outer = self._method
        self._method = outer or method_file(path, gin_root())
        for statement, where in self._statements(text, name):
            kind = type(statement).__name__
            if kind == "IncludeStatement":
                self.read_file(statement.filename, path, by=f" (included by {where})")
            elif kind == "ImportStatement":
                self._import(statement, where)
            elif kind == "BlockDeclaration":
                self._configurable(statement.selector, where)
            else:
                self._add(statement, where, from_command_line=False)
        self._reading.pop()
        self._method = outer

    def read_binding(self, binding: str) -> None:
        name, equals, value = binding.partition("=")
        name, value = name.strip(), value.strip()
        where = f"{FLAG}{name}={value}"
        if not equals or not value:
            raise UserError(f"{binding!r} is not a binding: write NAME=VALUE")
        check_name(name)
        try:
            statements = list(self._statements(f"{name} = {value}\n", where))
        except UserError as error:
            # A wrong @reference or %macro is not helped by quotes; anything else may be a string.
            if value[0] in "@%":
                raise
            quoted = '"' + value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"') + '"'
            advice = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(
                value.lower(), shlex.quote(quoted)
            )
            as_what = "as a string " if advice.startswith("'") else ""
            raise UserError(
                f"{where}: the value is not in gin syntax; "
                f"{as_what}it is written {FLAG}{name}={advice}"
            ) from error
        if len(statements) != 1:
            raise UserError(f"{where}: more than one line; give one flag per binding")
        self._add(statements[0][0], where, from_command_line=True)

    def _statements(self, text: str, name: str) -> Iterator[tuple[Any, str]]:
        """gin's statements with where they stand; parse errors become one line."""
        config, parser_module = self._gin.config, self._gin.config.config_parser
        is_file = not name.startswith(FLAG)
        where = name
        try:
            parser = parser_module.ConfigParser(io.StringIO(text), config.ParserDelegate())
            for statement in parser:
                where = f"{name}:{statement.location.line_num}" if is_file else name
                yield statement, where
        except SyntaxError as error:
            # gin raises SyntaxError(message, (file, line, column, text)).
            line = f":{error.lineno}" if is_file and error.lineno else ""
            raise UserError(f"{name}{line}: {first_words(error)}") from error
        except tokenize.TokenError as error:
            line = f":{error.args[1][0]}" if is_file else ""
            raise UserError(f"{name}{line}: {error.args[0]}") from error
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise self._reference_error(error, name, is_file) from error

    def _reference_error(self, error: ValueError, name: str, is_file: bool) -> UserError:
        line = re.search(r" line (\d+)\n", str(error))
        where = f"{name}:{line[1]}" if is_file and line else name
        unknown = re.match(r"No configurable matching reference '@(.+?)(\(\))?'\.", str(error))
        if not unknown:
            return UserError(f"{where}: {first_words(error)}")
        near = nearest(unknown[1], self._selectors())
        return UserError(f"{where}: nothing is registered as @{unknown[1]}{did_you_mean(near)}")

    def _import(self, statement: Any, where: str) -> None:
        if statement.module.startswith("__gin__"):
            raise UserError(
                f"{where}: dynamic registration is not supported here; register the configurables "
                "in a module with @gin.configurable and `import` that"
            )
        # Whatever a module does when it is imported would be done.
        if not any(f"{statement.module}.".startswith(f"{name}.") for name in self._imports):
            raise UserError(
                f"{where}: `{statement.format()}` would run that module's code, and a .gin file "
                f"may do so for stacking_jax alone; if you trust it, add "
                f"--gin_import {statement.module}"
            )
        try:
            # Through gin, which repeats the import in the operative configuration.
            self._gin.parse_config(statement.format())
        except ImportError as error:
            raise UserError(f"{where}: {first_words(error)}") from error

    def _add(self, statement: Any, where: str, from_command_line: bool) -> None:
        scope, selector, parameter, value, _ = statement
        if parameter:
            name = f"{scope}/{selector}.{parameter}" if scope else f"{selector}.{parameter}"
            key = (scope, self._configurable(selector, where, parameter).selector, parameter)
        else:
            name = f"{scope}/{selector}" if scope else selector
            key = (name, "gin.macro", "value")
        references = tuple(_references(self._gin, value))
        binding = _Binding(
            key, name, value, where, from_command_line, self._method, references
        )
        self.history.append(binding)
        self.final[key] = binding

    def _selectors(self) -> list[str]:
        # gin offers no public list of what is registered; this is only used for suggestions.
        registry = self._gin.config._REGISTRY
        return sorted(
            registry.minimal_selector(selector)
            for selector, _ in registry.items()
            if not selector.startswith("gin.")
        )

    def _configurable(self, selector: str, where: str, parameter: str | None = None):
        """The registered configurable; `parameter`, if any, must be one of its parameters."""
        try:
            found = self._gin.config._REGISTRY.get_match(selector)
        except KeyError as error:
            raise UserError(f"{where}: {error.args[0]}") from error
        if found is None:
            near = nearest(selector, self._selectors()) or self._owners(parameter)
            raise UserError(f"{where}: nothing is registered as {selector}{did_you_mean(near)}")
        if parameter is None:
            return found
        allowed, takes_any = _parameters(found)
        refused = parameter in (found.denylist or ())
        if parameter not in allowed and (refused or not takes_any):
            near = nearest(parameter, allowed)
            has = did_you_mean(near) if near else f"; it has: {', '.join(allowed) or 'none'}"
            raise UserError(f"{where}: {selector} has no parameter {parameter}{has}")
        return found

    def _owners(self, parameter: str | None) -> list[str]:
        """'configurable.parameter' of all configurables that have a parameter of that name."""
        registry = self._gin.config._REGISTRY
        return [
            f"{selector}.{parameter}"
            for selector in self._selectors()
            if parameter in _parameters(registry.get_match(selector))[0]
        ]

    # Checks, and then the binding itself

    def bind_all(self, scopes: Sequence[str]) -> None:
        check_layers(self.history)
        live = self._live_macros()
        self._check_scopes(scopes)
        self._check_macros(live)
        kept = [b for b in self.final.values() if b.macro is None or b.macro in live]
        for binding in kept:
            if binding.is_required():
                raise UserError(
                    f"{binding.name} must be set: add {FLAG}{binding.name}=VALUE "
                    f"({binding.where} requires it)"
                )
        for binding in kept:
            self._gin.bind_parameter(binding.key, binding.value)
        try:
            self._gin.finalize()
        except ValueError as error:
            raise UserError(first_words(error)) from error

    def _live_macros(self) -> set[str]:
        """The macros that the final bindings of configurables reach, directly or by macros."""
        live: set[str] = set()
        todo = [b for b in self.final.values() if b.macro is None]
        while todo:
            binding = todo.pop()
            for name in binding.uses():
                target = self.final.get((name, "gin.macro", "value"))
                if target is None:
                    near = nearest(name, self._macros())
                    raise UserError(
                        f"{binding.where}: {binding.name} refers to %{name}, which is not set"
                        f"{did_you_mean(near) or f'; add {FLAG}{name}=VALUE'}"
                    )
                if name not in live:
                    live.add(name)
                    todo.append(target)
        return live

    def _macros(self) -> list[str]:
        return [binding.macro for binding in self.final.values() if binding.macro]

    def _check_macros(self, live: set[str]) -> None:
        ever_used = {name for binding in self.history for name in binding.uses()}
        for binding in self.final.values():
            name = binding.macro
            if name is None or name in live:
                continue
            if name not in ever_used:
                selectors = self._selectors()
                if name in selectors:
                    allowed, _ = _parameters(self._gin.config._REGISTRY.get_match(name))
                    near = [f"{name}.{parameter}" for parameter in allowed]
                else:
                    near = nearest(name, sorted(live)) or self._owners(name)
                    near = near or sorted(live)
                raise UserError(
                    f"{binding.where}: nothing uses a macro {name}{did_you_mean(near)}"
                )
            if binding.from_command_line:
                raise UserError(f"{binding.where}: {self._why_dead(name)}")

    def _why_dead(self, name: str) -> str:
        for user in reversed([b for b in self.history if name in b.uses()]):
            last = self.final[user.key]
            if last is not user:
                return (
                    f"nothing uses {name} any more: {last.where} replaced "
                    f"`{user.name} = ...` of {user.where}, which used it"
                )
        users = [b for b in self.history if name in b.uses()]
        return f"only {users[-1].name} ({users[-1].where}) uses {name}, and nothing uses that"

    def _check_scopes(self, scopes: Sequence[str]) -> None:
        references = [ref for binding in self.final.values() for ref in binding.refers_to]
        known = {part for name in scopes for part in name.split("/")}
        for reference in references:
            if not _is(reference, "gin.macro") and not _is(reference, "gin.constant"):
                known.update(reference.scopes)
        for binding in self.final.values():
            if binding.macro is not None:
                continue
            for part in filter(None, binding.key[0].split("/")):
                if part not in known:
                    near = nearest(part, sorted(known)) or sorted(known)
                    raise UserError(
                        f"{binding.where}: nothing runs in a scope {part}{did_you_mean(near)}"
                    )


# Files


def _find(name: str, included_from: Path | None) -> Path | None:
    path = Path(name).expanduser()
    if path.is_absolute():
        return path if path.is_file() else None
    folders = [Path.cwd(), gin_root()]
    if included_from is not None:
        folders.insert(1, included_from.parent)
    candidates = [folder / path for folder in folders]
    if path.parts[:1] == ("gin",):
        candidates.append(gin_root().joinpath(*path.parts[1:]))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _missing(name: str, included_from: Path | None, by: str) -> UserError:
    root = gin_root()
    known = ["gin/" + path.relative_to(root).as_posix() for path in sorted(root.rglob("*.gin"))]
    folder = Path(name).expanduser().parent
    near_by = [folder] if included_from is None else [folder, included_from.parent / folder]
    for place in near_by:
        if place.is_dir():
            known += [(folder / path.name).as_posix() for path in sorted(place.glob("*.gin"))]
    near = nearest(name, known) or [k for k in known if Path(k).stem == Path(name).stem]
    return UserError(f"no gin file {name!r}{by}{did_you_mean(near or known)}")


# Names


def _references(gin, value: Any) -> Iterator[Any]:
    if isinstance(value, gin.config.ConfigurableReference):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _references(gin, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(gin, item)


def _is(reference: Any, selector: str) -> bool:
    return reference.configurable.selector == selector


def _macro_name(reference: Any) -> str:
    return "/".join(reference.scopes)


def _parameters(configurable: Any) -> tuple[list[str], bool]:
    """The names that may be bound, and whether any other may be too (`**kwargs`)."""
    signature = inspect.signature(configurable.wrapped)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and (not configurable.allowlist or name in configurable.allowlist)
        and name not in (configurable.denylist or ())
    ]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds and not configurable.allowlist
    return names, takes_any


def check_name(name: str) -> None:
    if not _NAME.match(name):
        raise UserError(
            f"{FLAG}{name}=...: {name!r} is no gin name; write a macro (TRAIN_STEPS) "
            "or [scope/]configurable.parameter"
        )


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` names that look like `name`, whatever their case."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=limit, cutoff=0.6)
    return [by_lower[lower] for lower in close]


def did_you_mean(names: Sequence[str], limit: int = 6) -> str:
    if not names:
        return ""
    shown = list(dict.fromkeys(names))
    more = f", ... ({len(shown)} in all)" if len(shown) > limit else ""
    return f"; did you mean {', '.join(shown[:limit])}{more}?"


def first_words(error: BaseException) -> str:
    """The message without the lines that gin appends to say where it was."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    token = re.search(r"\n\s+Failed to parse token '(.*)'", message)
    if token:
        return f"{token[1]} is not a value; a string is written in quotes"
    message = re.split(r"\n\s+(?:In |No values supplied )", message)[0]
    return " ".join(message.split()).rstrip(".")
