"""From a YAML file and a command line to a :class:`~hdet.train.config.Config`.

jsonargparse compares values with the dataclasses' annotations, and prints ``--help`` and ``--print_config``. It is
handed plain values only, by the names of settings. It opens, imports and makes nothing: :mod:`hdet.files.plain` reads
files and values, and the dataclasses are made here.

What jsonargparse does not do, because there it can be made to open a file or to read without bound:

* It does not read the command line. A section's value may there be the path of a file, which it opens.
* It gets no text where an annotation has none. It would read it once more as YAML, whose aliases may stand for any
  number of values.
* It does not check null, which it takes for any setting, nor that numbers are finite.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import jsonargparse

from hdet import files
from hdet.files import plain
from hdet.train.annotations import describe, hints, mapping_of, members, section_of, settings, texts
from hdet.train.config import Config, ConfigError

T = TypeVar("T")
_MODE = "hdet"
"""In which jsonargparse leaves text as it is."""
jsonargparse.set_loader(_MODE, lambda text: text)

_USAGE = """\
python -m hdet.train [--config FILE] [--SECTION.NAME VALUE ...] [--resume] [--print_config] [--help]

  --config FILE    YAML file of a run; later arguments override its values.
  --resume         short for --train.resume true.
  --print_config   print the configuration, as a file that --config reads, and end."""


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
            _print(_parser(Config).format_help())
            raise SystemExit(0)
        if name == "print_config":
            print_config = True
        elif name == "config":
            _merge(Config, tree, _read(value), "", value)
        else:
            _set(Config, tree, name.split("."), value, name)
    parser = _parser(Config)
    checked = _check(Config, parser, tree)
    config = _make(Config, checked, "")
    if print_config:
        _print(parser.dump(checked, format="yaml", skip_unset=False))
        raise SystemExit(0)
    return config


def build(kind: Callable[..., T], tree: Mapping[str, Any]) -> T:
    """A dataclass of plain values, each compared with its annotation.

    Raises:
        ConfigError: naming the setting.
    """
    return _make(kind, _check(kind, _parser(kind), tree), "")


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
        raise ConfigError(f"{path} is no configuration. Must have sections: {', '.join(hints(Config))}.")
    return found


def _merge(kind: type, into: dict[str, Any], new: Mapping[str, Any], prefix: str, source: str) -> None:
    """Put the values of a file over those that are there."""
    for name, value in new.items():
        full = f"{prefix}{name}"
        if name not in hints(kind):
            raise ConfigError(f"{source}: unknown key {_short(full)}.{_close(kind, name, prefix)}")
        section = section_of(hints(kind)[name])
        if section is None:
            into[name] = value
        elif isinstance(value, Mapping):
            _merge(section, into.setdefault(name, {}), value, f"{full}.", source)
        else:
            raise ConfigError(f"{source}: Invalid {full}={_short(value)}. Must be a section with settings in it.")


def _set(kind: Any, into: dict[str, Any], path: Sequence[str], value: str, full: str) -> None:
    """Put a value of the command line over what is there."""
    name, *rest = path
    if name not in hints(kind):
        prefix = full[: len(full) - len(".".join(path))]
        raise ConfigError(f"unrecognized arguments: --{_short(full)}.{_close(kind, name, prefix)}")
    hint = hints(kind)[name]
    section = section_of(hint)
    if section is not None and rest:
        _set(section, into.setdefault(name, {}), rest, value, full)
    elif section is not None:
        _merge(kind, into, {name: _parsed(value, full)}, full.removesuffix(name), "command line")
    elif not rest:
        is_text = str in members(hint) and value not in ("null", "~")
        into[name] = value if is_text else _parsed(value, full)
    elif mapping_of(hint) is not None:
        here = into
        for key in (name, *rest[:-1]):
            inner = here.get(key)
            here[key] = here = dict(inner) if isinstance(inner, Mapping) else {}
        here[rest[-1]] = _parsed(value, full)
    else:
        raise ConfigError(f"unrecognized arguments: --{_short(full)}. {full[: -len('.'.join(rest)) - 1]} is a value.")


def _parsed(text: str, full: str) -> Any:
    try:
        return plain.parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"Invalid {full}={_short(text)}: {error}") from error


def _parser(kind: Any) -> jsonargparse.ArgumentParser:
    """An argument for each setting, none of which opens, imports or makes anything."""
    parser = jsonargparse.ArgumentParser(
        usage=_USAGE,
        description="Train one model with N replicas under N learning rates; start it with torchrun.",
        exit_on_error=False,
        add_help=False,
        default_env=False,
        parser_mode=_MODE,
    )

    def add(kind: Any, default: object, prefix: str, group: Any) -> None:
        for name, hint in hints(kind).items():
            full, value, section = f"{prefix}{name}", getattr(default, name), section_of(hint)
            about = " ".join(texts(kind).get(name, "").split())
            if section is None:
                group.add_argument(f"--{full}", type=_type_of(hint), default=value, help=about)
            else:
                add(section, value, f"{full}.", parser.add_argument_group(full, about))

    add(kind, kind(), "", parser)
    return parser


def _type_of(hint: Any) -> Any:
    """What jsonargparse is to compare a value with. It does not look into text and mappings of plain values."""
    if str in members(hint):
        return str
    return dict if mapping_of(hint) is Any else hint


def _check(kind: Any, parser: jsonargparse.ArgumentParser, tree: Mapping[str, Any]) -> jsonargparse.Namespace:
    """The values of all settings, each of its annotation."""
    try:
        plain.check_plain_keys(tree)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    given = dict(_leaves(kind, tree, ""))
    every = dict(settings(kind))
    for name, value in given.items():
        _check_plain(every[name], value, name)
    try:
        return parser.parse_object(given, env=False)
    except (ArgumentError, TypeError, ValueError, ArithmeticError) as error:
        named = re.search('Parser key "(.+?)"', str(error))
        if named is None or named[1] not in given:
            raise ConfigError(" ".join(str(error).split())) from error
        raise _misfit(every[named[1]], given[named[1]], named[1]) from None


def _leaves(kind: Any, tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        section = section_of(hints(kind)[name])
        if section is None:
            yield f"{prefix}{name}", value
        else:
            yield from _leaves(section, value, f"{prefix}{name}.")


def _check_plain(hint: Any, value: Any, full: str) -> None:
    """Refuse what jsonargparse would read once more, or let pass."""
    kinds, words, of = members(hint), _words(hint), mapping_of(hint)
    if of not in (None, Any) and isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(of, item, f"{full}.{key}")
    if value is None and type(None) not in kinds:
        raise _misfit(hint, value, full)
    for name, part in _parts(value, full):
        if isinstance(part, str):
            if "\0" in part:
                raise ConfigError(f"Invalid {name}={_short(part)}. Must be text without a zero byte.")
            if str not in kinds and of is not Any and part not in words:
                raise _misfit(hint, value, full)
        elif isinstance(part, (int, float)):
            if not _is_finite(part):
                raise ConfigError(f"Invalid {name}={_short(part)}. Must be finite.")
            if int in kinds and float not in kinds and abs(part) >= 2**63:
                raise ConfigError(f"Invalid {name}={_short(part)}. Must be a whole number below 2**63.")


def _words(hint: Any) -> set[str]:
    """The strings that are members of an annotation's ``Literal``."""
    if get_origin(hint) is Literal:
        return {value for value in get_args(hint) if isinstance(value, str)}
    return {word for inner in get_args(hint) for word in _words(inner)}


def _parts(value: Any, full: str) -> Iterator[tuple[str, Any]]:
    """The values that are in lists and mappings, with their names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(item, f"{full}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item, full)
    else:
        yield full, value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _misfit(hint: Any, value: object, full: str) -> ConfigError:
    return ConfigError(f"Invalid {full}={_short(value)}. Must be {describe(hint)}.")


def _make(kind: Callable[..., T], values: jsonargparse.Namespace, prefix: str) -> T:
    arguments = {}
    for name, hint in hints(kind).items():
        section = section_of(hint)
        arguments[name] = values[name] if section is None else _make(section, values[name], f"{prefix}{name}.")
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"In the section {prefix.rstrip('.') or 'root'}: {error}") from error


def _close(kind: type, name: str, prefix: str) -> str:
    close = difflib.get_close_matches(name, hints(kind), 1)
    return f" Did you mean {prefix}{close[0]}?" if close else f" There are {', '.join(hints(kind))}."


def _short(value: object) -> str:
    """A value for a message."""
    told = str(value)
    told = told if told.isprintable() else repr(told)
    return told if len(told) <= 100 else f"{told[:100]}..."


def _print(told: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(told.rstrip())
        sys.stdout.flush()
