"""Recipes as text: `--set key=value` on frozen dataclasses, and what differs in two of them."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

BOOLS = {"true": True, "false": False}


def override(config: T, assignments: Sequence[str]) -> T:
    """`config` with all `key=value` applied at once, the last of a key; `a.b=value` is field b of
    field a.

    Raises ValueError that names the `--set` for an unknown key, a value of another type, and what
    the configuration itself refuses.
    """
    changes: dict[tuple[str, ...], Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: KEY=VALUE is wanted")
        path = tuple(key.split("."))
        try:
            changes[path] = parse(kind_of(config, path), text)
        except ValueError as error:
            raise ValueError(f"--set {assignment}: {error}") from None
    return _apply(config, changes)


def to_assignments(config: Any, prefix: str = "") -> Iterator[str]:  # noqa: ANN401
    """`key=value` of each field, as `override` takes them."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from to_assignments(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}={text_of(value)}"


def text_of(value: object) -> str:
    """What `parse` makes `value` of."""
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def kind_of(config: Any, path: Sequence[str]) -> Any:  # noqa: ANN401
    """The type of a field that has no parts."""
    owner, kind = "the recipe", type(config)
    for name in path:
        if not is_dataclass(config):
            raise ValueError(f"{owner} has no parts")
        kinds = get_type_hints(type(config))
        names = [field.name for field in fields(config)]
        if name not in names:
            raise ValueError(f"{owner} has no {name!r}; {suggestion(name, names)}")
        kind, config, owner = kinds[name], getattr(config, name), name
    if is_dataclass(config):
        raise ValueError(f"set one of {', '.join(f'{owner}.{f.name}' for f in fields(config))}")
    return kind


def _apply(config: Any, changes: Mapping[tuple[str, ...], Any], prefix: str = "") -> Any:  # noqa: ANN401
    own = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        own[name] = _apply(getattr(config, name), inner, f"{prefix}{name}.")
    try:
        return replace(config, **own)
    except ValueError as error:
        raise ValueError(f"--set {', '.join(prefix + name for name in own)}: {error}") from None


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
            raise ValueError(f"allowed are {', '.join(map(str, get_args(kind)))}")
        return text
    if origin is tuple:
        items = get_args(kind)
        parts = [part for part in text.strip("()[]").split(",") if part]
        if items[-1] is Ellipsis:
            items = (items[0],) * len(parts)
        if len(parts) != len(items):
            raise ValueError(f"{len(items)} values with commas between are wanted")
        return tuple(parse(item, part) for item, part in zip(items, parts, strict=True))
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError("true or false is wanted")
        return BOOLS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"a number ({kind.__name__}) is wanted") from None


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
