"""From a YAML file and a command line to a :class:`~hdet.train.config.Config`.

Values are plain: they are compared with the dataclasses' annotations and copied, and nothing is looked up by name,
imported or called.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from hdet import files
from hdet.files import plain
from hdet.train.annotations import as_plain, describe, help_text, hints, is_mapping, members, section_of, short
from hdet.train.config import Config, ConfigError

T = TypeVar("T")


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
            _print(help_text(Config))
            raise SystemExit(0)
        if name == "print_config":
            print_config = True
        elif name == "config":
            _merge(Config, tree, _read(value), "", value)
        else:
            _set(Config, tree, name.split("."), _Text(value), name)
    config = _build(Config, tree, "")
    if print_config:
        _print(yaml.safe_dump(as_plain(config), sort_keys=False).rstrip())
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
            raise ConfigError(f"unrecognized arguments: {short(argument)}. Settings are --section.name value.")
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
        raise ConfigError(f"Invalid config={short(path)}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"Invalid config: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no configuration. Must have sections: {', '.join(hints(Config))}.")
    return found


def _merge(kind: type, into: dict[str, Any], new: Mapping[str, Any], prefix: str, source: str) -> None:
    """Put the values of a file over those that are there."""
    for name, value in new.items():
        full = f"{prefix}{name}"
        if name not in hints(kind):
            raise ConfigError(f"{source}: unknown key {short(full)}.{_close(kind, name, prefix)}")
        section = section_of(hints(kind)[name])
        if section is None:
            into[name] = value
        elif isinstance(value, Mapping):
            _merge(section, into.setdefault(name, {}), value, f"{full}.", source)
        else:
            raise ConfigError(f"{source}: Invalid {full}={short(value)}. Must be a section with settings in it.")


def _set(kind: Any, into: dict[str, Any], path: Sequence[str], value: _Text, full: str) -> None:
    """Put a value of the command line over what is there."""
    name, *rest = path
    if name not in hints(kind):
        prefix = full[: len(full) - len(".".join(path))]
        raise ConfigError(f"unrecognized arguments: --{short(full)}.{_close(kind, name, prefix)}")
    hint = hints(kind)[name]
    section = section_of(hint)
    if section is not None and rest:
        _set(section, into.setdefault(name, {}), rest, value, full)
    elif section is not None:
        found = _parsed(value, full)
        if not isinstance(found, Mapping):
            raise ConfigError(f"Invalid {full}={short(value)}. Must be a section with settings in it.")
        _merge(section, into.setdefault(name, {}), found, f"{full}.", "command line")
    elif not rest:
        into[name] = value
    elif is_mapping(hint):
        here = into.get(name)
        here = _parsed(here, name) if isinstance(here, _Text) else here
        into[name] = here = dict(here) if isinstance(here, Mapping) else {}
        for key in rest[:-1]:
            inner = here.get(key)
            here[key] = dict(inner) if isinstance(inner, Mapping) else {}
            here = here[key]
        here[rest[-1]] = value
    else:
        raise ConfigError(f"unrecognized arguments: --{short(full)}. {full[: -len('.'.join(rest)) - 1]} is a value.")


def _build(kind: Callable[..., T], tree: Mapping[str, Any], prefix: str) -> T:
    values = {}
    for name, hint in hints(kind).items():
        if name in tree:
            section = section_of(hint)
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
            if str in members(hint) and value not in ("null", "~"):
                return _fit(hint, str(value), full)
            try:
                return _fit(hint, _parsed(value, full), full)
            except _Misfit:
                return _fit(hint, str(value), full)
        return _fit(hint, value, full)
    except _Misfit as misfit:
        rule = misfit.args[0] or f"Must be {describe(hint)}"
        raise ConfigError(f"Invalid {full}={short(value)}. {rule}.") from None


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
    elif is_mapping(hint) and isinstance(value, Mapping):
        of = arguments[1] if arguments else Any
        try:
            plain.check_plain_keys(dict(value), full)
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
        return plain.parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"Invalid {full}={short(text)}: {error}") from error


def _close(kind: type, name: str, prefix: str) -> str:
    close = difflib.get_close_matches(name, hints(kind), 1)
    return f" Did you mean {prefix}{close[0]}?" if close else f" There are {', '.join(hints(kind))}."


def _print(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)
        sys.stdout.flush()
