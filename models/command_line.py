"""A dataclass is a command's flags: each field is one, with its type, help and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from typing import TYPE_CHECKING, TypeVar, cast, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def takes(settings: type[S]) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Give a command that takes one `settings` object the object's fields as parameters."""
    make = cast("Callable[..., S]", settings)
    hints = get_type_hints(settings, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(settings)
    ]

    def decorate(function: Callable[[S], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: object) -> None:
            function(make(**values))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        del command.__wrapped__
        return command

    return decorate
