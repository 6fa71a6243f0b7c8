"""Files from elsewhere. Reading gives plain values, and executes, imports and instantiates nothing; reading and writing
touch regular files only, and writing follows no symbolic link.

A wrong file is a ``ValueError`` that names it; one that is missing or may not be opened, the system's ``OSError``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar

import yaml

TEXT_LIMIT = 2**20
"""Bytes in a text file of settings, at most."""
_VALUES, _DEPTH = 20_000, 50
_FORBIDDEN = ("class_path", "init_args")


def kind_of(mode: int) -> str:
    """What a file with this ``st_mode`` is, in words."""
    kinds = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


def open_to_read(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file.

    Raises:
        ValueError: if it is something else, a FIFO for example, from which reading might never end.
        OSError: if it is missing or may not be read.
    """
    name = _checked(path)
    _demand_regular(name, os.stat(name).st_mode)
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _demand_regular(name, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> str:
    """The text of a regular file.

    Raises:
        ValueError: if it is no regular file, longer than ``limit`` bytes, or not UTF-8.
        OSError: if it is missing or may not be read.
    """
    with open_to_read(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{os.fspath(path)} has more than {limit} bytes. This is no file of settings.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is no text in UTF-8: byte {error.start} is no part of it.") from error


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The plain values of a YAML file; see :func:`parse_yaml`.

    Raises:
        ValueError, OSError: as :func:`read_text` and :func:`parse_yaml`; the message names the file.
    """
    text = read_text(path)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The values of a JSON file. ``NaN`` and ``Infinity`` are no JSON.

    Raises:
        ValueError, OSError: as :func:`read_text`, and if the text is no JSON; the message names the file.
    """
    text = read_text(path, limit=16 * TEXT_LIMIT)
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is no JSON: {error}") from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML document that is made of mappings, sequences, strings, numbers, booleans and nulls.

    Anchors and aliases are understood where what they stand for is finite and small.

    Raises:
        ValueError: for text that is no YAML; a tag such as ``!!python/object``; an alias inside the value that it
            stands for; more than 20,000 values in all; a key that is no string, appears twice, or names a class
            (``class_path``, ``init_args``).
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Constructor().value(node)
    except yaml.YAMLError as error:
        raise ValueError(f"No YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("No plain values: nested too deeply.") from error


def check_plain_keys(value: Any, name: str = "") -> None:
    """Raise ``ValueError`` if a mapping in ``value`` asks for a class to be made, by the key ``class_path`` or
    ``init_args``."""
    if isinstance(value, dict):
        for key, item in value.items():
            inner = f"{name}.{key}" if name else str(key)
            if key in _FORBIDDEN:
                raise ValueError(f"Invalid {inner}. Settings are plain values: no class is looked up or made.")
            check_plain_keys(item, inner)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_plain_keys(item, name)


def open_to_write(path: str | os.PathLike[str], *, append: bool) -> BinaryIO:
    """Open a regular file at the end of a path, made if it is missing, without following a link there.

    Raises:
        ValueError: if a link, a FIFO or anything else stands in its place.
        OSError: if it may not be written.
    """
    name = _checked(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    check_place(name)  # a FIFO that somebody reads could be opened
    try:
        descriptor = os.open(name, flags | (os.O_APPEND if append else 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            check_place(name)
        raise
    try:
        _demand_regular(name, os.fstat(descriptor).st_mode)
        if not append:
            os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, "ab" if append else "wb")
    except BaseException:
        os.close(descriptor)
        raise


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` if something that is no regular file stands where one is to be written."""
    with contextlib.suppress(FileNotFoundError):
        _demand_regular(os.fspath(path), os.lstat(path).st_mode)


def check_tree(folder: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` if ``folder``, or anything in it at any depth, is neither directory nor regular file."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(mode := os.lstat(folder).st_mode):
            raise ValueError(f"{os.fspath(folder)} is {kind_of(mode)}. Must be a directory: remove it.")
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise ValueError(f"{path} is {kind_of(mode)}, and nothing is written through it: remove it.")


def write_at_once(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], object], *, beside: str | None = None
) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    Args:
        path: the file.
        write: called with the open file, to write all of it.
        beside: name of the file that is written first and then renamed. What is left there by a crash is overwritten.
            By default a name that nobody can guess.

    Raises:
        ValueError: if a link, a FIFO or anything else stands in the place of either.
        OSError: if they may not be written.
    """
    target = Path(_checked(path))
    temporary = target.with_name(beside or f".{target.name}.{secrets.token_hex(8)}.tmp")
    check_place(target)
    check_place(temporary)
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # else a power failure may undo the rename
    finally:
        os.close(directory)


def _checked(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"Invalid path {path!r}. Must be text.")
    if not name or "\0" in name:
        raise ValueError(f"Invalid path {name!r}. Must not be empty or contain a zero byte.")
    return name


def _demand_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {kind_of(mode)}. Must be a regular file.")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice in an object")
    return found


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2 (``1e-3`` is one, ``1:30`` is none); no dates. Only used to compose nodes."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool",
    re.compile("^(true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"),
    list("tTfFyYnNoO"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile("^([-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


class _Constructor:
    """Values of nodes, counted."""

    def __init__(self) -> None:
        self._values, self._open = 0, set[int]()

    def value(self, node: yaml.Node) -> Any:
        self._values += 1
        if self._values > _VALUES:
            raise ValueError(f"More than {_VALUES} values, with aliases written out.")
        if id(node) in self._open:
            raise ValueError(f"An alias stands inside the value that it is the name of, in line {_line(node)}.")
        if len(self._open) > _DEPTH:
            raise ValueError(f"Nested more than {_DEPTH} deep, in line {_line(node)}.")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return self._mapping(node)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self.value(item) for item in node.value]
            if isinstance(node, yaml.ScalarNode):
                return _scalar(node)
        finally:
            self._open.discard(id(node))
        raise ValueError(_no_tag(node))

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                value = self.value(value_node)
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, dict) for part in parts):
                    raise ValueError(f"<< needs a mapping, in line {_line(key_node)}.")
                merged += parts
                continue
            key = self.value(key_node)
            if not isinstance(key, str):
                raise ValueError(f"The key {str(key)[:60]!r} in line {_line(key_node)} is no text. Quote it.")
            if key in found:
                raise ValueError(f"The key {key!r} appears twice, in line {_line(key_node)}.")
            if key in _FORBIDDEN:
                raise ValueError(
                    f"Invalid key {key!r} in line {_line(key_node)}. Settings are plain values: no class is looked up "
                    "or made."
                )
            found[key] = self.value(value_node)
        for part in merged:
            found = {**part, **found}
        return found


def _scalar(node: yaml.ScalarNode) -> Any:
    text, tag = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    try:
        if tag == "str":
            return text
        if tag == "null":
            return None
        if tag == "bool":
            return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[text.lower()]
        if tag == "int":
            return int(text.replace("_", ""), 0)
        if tag == "float":
            return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.replace("_", "").lower()))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{text[:60]!r} in line {_line(node)} is no {tag}.") from error
    raise ValueError(_no_tag(node))


def _no_tag(node: yaml.Node) -> str:
    return f"The tag {node.tag[:80]!r} in line {_line(node)} is not allowed: settings are plain values."


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
