"""`--set key=value` on frozen dataclasses, and their way to JSON and back."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

BOOLS = {"true": True, "false": False}


class NotParsedError(ValueError):
    """Text that is no value of a type."""


def override(config: T, assignments: Sequence[str]) -> T:
    """`config` with all `key=value` applied at once, the last of a key; `a.b=value` is field b of
    field a.

    Raises ValueError for an unknown key, a value of another type, and what the configuration
    itself refuses.
    """
    changes: dict[tuple[str, ...], Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not key=value")
        path = tuple(key.split("."))
        try:
            changes[path] = parse(kind_of(config, path, key), text)
        except NotParsedError as error:
            raise ValueError(f"{key}={text}: {error}") from None
    return _apply(config, changes)


def kind_of(config: Any, path: Sequence[str], key: str) -> Any:  # noqa: ANN401
    """The type of a field that has no parts."""
    for index, name in enumerate(path):
        if not is_dataclass(config):
            raise ValueError(f"unknown key {key!r}: {path[index - 1]} has no parts")
        kinds = get_type_hints(type(config))
        names = [field.name for field in fields(config)]
        if name not in names:
            raise ValueError(f"unknown key {key!r}; {suggestion(name, names)}")
        kind, config = kinds[name], getattr(config, name)
    if is_dataclass(config):
        parts = ", ".join(f"{key}.{field.name}" for field in fields(config))
        raise ValueError(f"{key!r} has parts; set one of {parts}")
    return kind


def _apply(config: Any, changes: Mapping[tuple[str, ...], Any]) -> Any:  # noqa: ANN401
    own = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        own[name] = _apply(getattr(config, name), inner)
    return replace(config, **own)


def suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def parse(kind: Any, text: str) -> Any:  # noqa: ANN401
    """Text to a value of the type `kind`. Raises ValueError that says what is allowed."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        others = [other for other in get_args(kind) if other is not type(None)]
        if len(others) < len(get_args(kind)) and text.lower() in ("none", "null"):
            return None
        return parse(others[0], text)
    if origin is Literal:
        if text not in get_args(kind):
            raise NotParsedError(f"allowed are {', '.join(map(str, get_args(kind)))}")
        return text
    if origin is tuple:
        items = get_args(kind)
        parts = [part for part in text.strip("()[]").split(",") if part]
        if items[-1] is Ellipsis:
            items = (items[0],) * len(parts)
        if len(parts) != len(items):
            raise NotParsedError(f"{len(items)} values with commas between are wanted")
        return tuple(parse(item, part) for item, part in zip(items, parts, strict=True))
    if kind is bool:
        if text.lower() not in BOOLS:
            raise NotParsedError("true or false is wanted")
        return BOOLS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise NotParsedError(f"a number ({kind.__name__}) is wanted") from None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: ours, not theirs` for each key of two nested mappings that is not the same."""
    found = []
    for key in {**ours, **theirs}:
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left!r}, not {right!r}")
    return found
