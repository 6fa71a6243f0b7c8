"""Plain values: what YAML says when nothing in it is executed, imported or made."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_VALUES, _DEPTH = 20_000, 50
_FORBIDDEN = ("class_path", "init_args")


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
