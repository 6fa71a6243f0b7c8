"""Files from elsewhere. Reading gives plain values, and executes, imports and instantiates nothing; reading and writing
touch regular files only, and writing follows no symbolic link.

A wrong file is a ``ValueError`` that names it; one that is missing or may not be opened, the system's ``OSError``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from hdet.files.plain import parse_yaml

TEXT_LIMIT = 2**20
"""Bytes in a text file of settings, at most."""


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
    """The plain values of a YAML file; see :func:`hdet.files.plain.parse_yaml`.

    Raises:
        ValueError, OSError: as :func:`read_text` and :func:`~hdet.files.plain.parse_yaml`; the message names the file.
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
