"""What settings there are: the fields of the configuration's dataclasses, their annotations and docstrings."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_USAGE = """\
usage: python -m hdet.train [--config FILE] [--SECTION.NAME VALUE ...] [--resume] [--print_config] [--help]

Train one model with N replicas under N learning rates; start it with torchrun.

  --config FILE    YAML file of a run; later arguments override its values.
  --resume         short for --train.resume true.
  --print_config   print the configuration, as a file that --config reads, and end.
"""


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


def is_mapping(hint: Any) -> bool:
    """Whether a mapping is among what the annotation allows."""
    return any(member is dict or get_origin(member) in (dict, Mapping) for member in members(hint))


@cache
def hints(kind: Any) -> dict[str, Any]:
    """Annotation of each setting that may be given."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind) if f.init}


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
        elif is_mapping(member):
            described.append("a mapping of names to values")
        else:
            described.append("a plain value")
    return ", ".join(described[:-1]) + (" or " if len(described) > 1 else "") + described[-1]


def short(value: object) -> str:
    """A value for a message."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else f"{text[:100]}..."


def as_plain(value: Any) -> Any:
    """A dataclass as what YAML can say."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    return value


def help_text(kind: type) -> str:
    """What ``--help`` prints for a configuration."""
    return "\n".join([_USAGE, *describe_settings(kind, "")])


def describe_settings(kind: type, prefix: str) -> Iterator[str]:
    """The lines of ``--help``."""
    documented = _docstrings(kind)
    for f in fields(kind):
        if not f.init:
            continue
        hint = hints(kind)[f.name]
        about = f.metadata.get("doc") or documented.get(f.name, "")
        section = section_of(hint)
        if section is not None:
            yield f"\n{prefix}{f.name}: {about}".rstrip(": ")
            yield from describe_settings(section, f"{prefix}{f.name}.")
            continue
        yield f"  --{prefix}{f.name} ({describe(hint)}; default: {short(as_plain(_default(f)))})"
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


def settings(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and annotation of every setting, section by section."""
    for name, hint in hints(kind).items():
        section = section_of(hint)
        if section is None:
            yield f"{prefix}{name}", hint
        else:
            yield from settings(section, f"{prefix}{name}.")
