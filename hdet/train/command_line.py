"""From a YAML file and a command line to a :class:`~hdet.train.config.Config`.

Values are plain: they are compared with the dataclasses' annotations and copied, and nothing is looked up by name,
imported or called.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import math
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hdet import files
from hdet.train.config import Config, ConfigError

T = TypeVar("T")
_USAGE = """\
usage: python -m hdet.train [--config FILE] [--SECTION.NAME VALUE ...] [--resume] [--print_config] [--help]

Train one model with N replicas under N learning rates; start it with torchrun.

  --config FILE    YAML file of a run; later arguments override its values.
  --resume         short for --train.resume true.
  --print_config   print the configuration, as a file that --config reads, and end.
"""


class _Text(str):
    """A value as it stands on the command line, whose type is not known yet."""


def parse(argv: Sequence[str]) -> Config:
    """The configuration that the command line asks for.

    Under torchrun, ``--help`` and ``--print_config`` print on rank 0 only.

    Raises:
        ConfigError: for an unknown key, a wrong type or a value out of range.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    tree: dict[str, Any] = {}
    print_config = False
    for name, value in _options(argv):
        if name == "help":
            _print(_help())
            raise SystemExit(0)
        if name == "print_config":
            print_config = True
        elif name == "config":
            _merge(Config, tree, _read(value), "", value)
        else:
            _set(Config, tree, name.split("."), _Text(value), name)
    config = _build(Config, tree, "")
    if print_config:
        _print(yaml.safe_dump(_plain(config), sort_keys=False).rstrip())
        raise SystemExit(0)
    return config


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each argument, in order."""
    left = list(argv)
    while left:
        argument = left.pop(0)
        if argument in ("-h", "--help"):
            yield "help", ""
        elif argument == "--print_config":
            yield "print_config", ""
        elif argument == "--resume":
            yield "train.resume", "true"
        elif not argument.startswith("--") or argument == "--":
            raise ConfigError(f"unrecognized arguments: {_short(argument)}. Settings are --section.name value.")
        else:
            name, equals, value = argument[2:].partition("=")
            if not equals:
                if not left or left[0].startswith("--"):
                    raise ConfigError(f"--{name} needs a value: pass --{name} VALUE.")
                value = left.pop(0)
            yield name, value


def _read(path: str) -> dict[str, Any]:
    """The sections of a YAML file."""
    try:
        found = files.read_yaml(path)
    except OSError as error:
        raise ConfigError(f"Invalid config={_short(path)}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"Invalid config: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no configuration. Must have sections: {', '.join(_hints(Config))}.")
    return found


def _merge(kind: type, into: dict[str, Any], new: Mapping[str, Any], prefix: str, source: str) -> None:
    """Put the values of a file over those that are there."""
    for name, value in new.items():
        full = f"{prefix}{name}"
        if name not in _hints(kind):
            raise ConfigError(f"{source}: unknown key {_short(full)}.{_close(kind, name, prefix)}")
        section = _section(_hints(kind)[name])
        if section is None:
            into[name] = value
        elif isinstance(value, Mapping):
            _merge(section, into.setdefault(name, {}), value, f"{full}.", source)
        else:
            raise ConfigError(f"{source}: Invalid {full}={_short(value)}. Must be a section with settings in it.")


def _set(kind: Any, into: dict[str, Any], path: Sequence[str], value: _Text, full: str) -> None:
    """Put a value of the command line over what is there."""
    name, *rest = path
    if name not in _hints(kind):
        prefix = full[: len(full) - len(".".join(path))]
        raise ConfigError(f"unrecognized arguments: --{_short(full)}.{_close(kind, name, prefix)}")
    hint = _hints(kind)[name]
    section = _section(hint)
    if section is not None and rest:
        _set(section, into.setdefault(name, {}), rest, value, full)
    elif section is not None:
        found = _parsed(value, full)
        if not isinstance(found, Mapping):
            raise ConfigError(f"Invalid {full}={_short(value)}. Must be a section with settings in it.")
        _merge(section, into.setdefault(name, {}), found, f"{full}.", "command line")
    elif not rest:
        into[name] = value
    elif _is_mapping(hint):
        here = into.get(name)
        here = _parsed(here, name) if isinstance(here, _Text) else here
        into[name] = here = dict(here) if isinstance(here, Mapping) else {}
        for key in rest[:-1]:
            inner = here.get(key)
            here[key] = dict(inner) if isinstance(inner, Mapping) else {}
            here = here[key]
        here[rest[-1]] = value
    else:
        raise ConfigError(f"unrecognized arguments: --{_short(full)}. {full[: -len('.'.join(rest)) - 1]} is a value.")


def _build(kind: Callable[..., T], tree: Mapping[str, Any], prefix: str) -> T:
    values = {}
    for name, hint in _hints(kind).items():
        if name in tree:
            section = _section(hint)
            full = f"{prefix}{name}"
            values[name] = (
                _convert(hint, tree[name], full) if section is None else _build(section, tree[name], f"{full}.")
            )
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"In the section {prefix.rstrip('.') or 'root'}: {error}") from error


def _convert(hint: Any, value: Any, full: str) -> Any:
    """``value`` as an annotation wants it."""
    try:
        if isinstance(value, _Text):
            if str in _members(hint) and value not in ("null", "~"):
                return _fit(hint, str(value), full)
            try:
                return _fit(hint, _parsed(value, full), full)
            except _Misfit:
                return _fit(hint, str(value), full)
        return _fit(hint, value, full)
    except _Misfit as misfit:
        rule = misfit.args[0] or f"Must be {_describe(hint)}"
        raise ConfigError(f"Invalid {full}={_short(value)}. {rule}.") from None


class _Misfit(Exception):
    """A value that is not of its annotation, with the rule that it breaks; empty: the annotation itself."""


def _fit(hint: Any, value: Any, full: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fit(arguments[0], value, full)
    if hint is Any:
        return _any(value, full)
    if origin in (Union, types.UnionType):
        rules = []
        for member in arguments:
            try:
                return _fit(member, value, full)
            except _Misfit as misfit:  # noqa: PERF203
                rules.append(misfit.args[0])
        raise _Misfit(next(filter(None, rules), ""))
    if origin is Literal:
        for member in arguments:
            if type(member) is type(value) and member == value:
                return member
    elif hint in (None, type(None)):
        if value is None:
            return None
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise _Misfit("Must be a whole number below 2**63")
        return value
    elif hint is str and isinstance(value, str):
        if "\0" in value:
            raise _Misfit("Must be text without a zero byte")
        return value
    elif hint is bool and isinstance(value, bool):
        return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_fit(arguments[0], item, full) for item in value)
        if len(value) == len(arguments):
            return tuple(_fit(member, item, full) for member, item in zip(arguments, value, strict=True))
    elif origin in (list, Sequence) and isinstance(value, (list, tuple)):
        return [_fit(arguments[0], item, full) for item in value]
    elif _is_mapping(hint) and isinstance(value, Mapping):
        of = arguments[1] if arguments else Any
        try:
            files.check_plain_keys(dict(value), full)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return {key: _convert(of, item, f"{full}.{key}") for key, item in value.items()}
    raise _Misfit("")


def _any(value: Any, full: str) -> Any:
    """A plain value that nobody knows more about."""
    if isinstance(value, _Text):
        value = _parsed(value, full)
    if isinstance(value, Mapping):
        return {key: _any(item, f"{full}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_any(item, full) for item in value]
    if isinstance(value, float):
        return _finite(value)
    return value


def _finite(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Misfit("Must be finite")
    return number


def _parsed(text: str, full: str) -> Any:
    try:
        return files.parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"Invalid {full}={_short(text)}: {error}") from error


def _section(hint: Any) -> type | None:
    """The dataclass, where the annotation is one."""
    return next((kind for kind in _members(hint) if isinstance(kind, type) and is_dataclass(kind)), None)


def _members(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(inner for member in get_args(hint) for inner in _members(member))
    return (hint,)


def _is_mapping(hint: Any) -> bool:
    return any(member is dict or get_origin(member) in (dict, Mapping) for member in _members(hint))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Annotation of each setting that may be given."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind) if f.init}


def _describe(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
    described = []
    for member in _members(hint):
        origin, arguments = get_origin(member), get_args(member)
        if member in names:
            described.append(names[member])
        elif origin is Literal:
            described += [f"{value}" for value in arguments]
        elif origin is tuple and arguments[-1] is not Ellipsis:
            described.append(f"a list of {len(arguments)}, each {_describe(arguments[0])}")
        elif origin in (tuple, list, Sequence):
            described.append(f"a list, each {_describe(arguments[0])}")
        elif _is_mapping(member):
            described.append("a mapping of names to values")
        else:
            described.append("a plain value")
    return ", ".join(described[:-1]) + (" or " if len(described) > 1 else "") + described[-1]


def _close(kind: type, name: str, prefix: str) -> str:
    close = difflib.get_close_matches(name, _hints(kind), 1)
    return f" Did you mean {prefix}{close[0]}?" if close else f" There are {', '.join(_hints(kind))}."


def _short(value: object) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _plain(value: Any) -> Any:
    """A dataclass as what YAML can say."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)
        sys.stdout.flush()


def _help() -> str:
    return "\n".join([_USAGE, *_describe_settings(Config, "")])


def _describe_settings(kind: type, prefix: str) -> Iterator[str]:
    documented = _docstrings(kind)
    for f in fields(kind):
        if not f.init:
            continue
        hint = _hints(kind)[f.name]
        about = f.metadata.get("doc") or documented.get(f.name, "")
        section = _section(hint)
        if section is not None:
            yield f"\n{prefix}{f.name}: {about}".rstrip(": ")
            yield from _describe_settings(section, f"{prefix}{f.name}.")
            continue
        yield f"  --{prefix}{f.name} ({_describe(hint)}; default: {_short(_plain(_default(f)))})"
        yield from textwrap.wrap(" ".join(about.split()), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _docstrings(kind: type) -> dict[str, str]:
    """What stands below each field in the source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field_node, after in itertools.pairwise(body):
        if (
            isinstance(field_node, ast.AnnAssign)
            and isinstance(field_node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field_node.target.id] = str(after.value.value)
    return found


def settings(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and annotation of every setting, section by section."""
    for name, hint in _hints(kind).items():
        section = _section(hint)
        if section is None:
            yield f"{prefix}{name}", hint
        else:
            yield from settings(section, f"{prefix}{name}.")
