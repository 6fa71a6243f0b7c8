"""What settings there are: the fields of the configuration's dataclasses, their annotations and texts."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser


def section_of(hint: Any) -> type | None:
    """The dataclass, where the annotation is one."""
    return next((kind for kind in members(hint) if isinstance(kind, type) and is_dataclass(kind)), None)


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union; else the annotation alone."""
    if get_origin(hint) is Annotated:
        return members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(inner for member in get_args(hint) for inner in members(member))
    return (hint,)


def mapping_of(hint: Any) -> Any:
    """What the values of a mapping are annotated with; None where the annotation allows no mapping."""
    for member in members(hint):
        if member is dict or get_origin(member) in (dict, Mapping):
            return (get_args(member) or (str, Any))[1]
    return None


@cache
def hints(kind: Any) -> dict[str, Any]:
    """Annotation of each setting that may be given."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in _fields(kind)}


@cache
def texts(kind: Any) -> dict[str, str]:
    """What each setting of a dataclass means: the text in the source, or the field's metadata ``doc``."""
    found: dict[str, str] = {}
    for base in filter(is_dataclass, kind.__mro__):
        found = {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(base).params} | found
    return found | {name: f.metadata["doc"] for name, f in _fields(kind).items() if "doc" in f.metadata}


def settings(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and annotation of every setting, section by section."""
    for name, hint in hints(kind).items():
        section = section_of(hint)
        if section is None:
            yield f"{prefix}{name}", hint
        else:
            yield from settings(section, f"{prefix}{name}.")


def describe(hint: Any) -> str:
    """An annotation in words."""
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
    described = []
    for member in members(hint):
        origin, arguments = get_origin(member), get_args(member)
        if member in names:
            described.append(names[member])
        elif origin is Literal:
            described += [f"{value}" for value in arguments]
        elif origin is tuple and arguments[-1] is not Ellipsis:
            described.append(f"a list of {len(arguments)}, each {describe(arguments[0])}")
        elif origin in (tuple, list, Sequence):
            described.append(f"a list, each {describe(arguments[0])}")
        elif (of := mapping_of(member)) is not None:
            described.append("a mapping of names to values" + (f", each {describe(of)}" if of is not Any else ""))
        else:
            described.append("a plain value")
    return ", ".join(described[:-1]) + (" or " if len(described) > 1 else "") + described[-1]


def _fields(kind: Any) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(kind) if f.init}
