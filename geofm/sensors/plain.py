"""Conversion of dataclasses to plain data, and back with validation."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from geofm.suggestions import did_you_mean


class SensorError(ValueError):
    """The definition of a sensor is invalid, or a sensor is unknown."""


def to_plain(value: Any) -> Any:
    """Convert a dataclass to plain data.

    Args:
        value: Instance of a dataclass, or a value of one of its fields.

    Returns:
        Dictionaries, lists, strings and numbers. Fields that are None are left out.
    """
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: to_plain(part) for name, part in pairs if part is not None}
    return [to_plain(part) for part in value] if isinstance(value, tuple) else value


def from_plain[T](cls: type[T], data: Any, where: str) -> T:
    """Make an instance of a dataclass from plain data.

    Args:
        cls: The dataclass. Its fields may be strings, numbers, booleans, literals, dataclasses,
            tuples of these, and None.
        data: Fields by name; not trusted.
        where: Name of the data in messages, e.g. ``"sensor 'planet'"``.

    Returns:
        The instance.

    Raises:
        SensorError: If a field is missing, unknown, invalid or of another type.
    """
    if not isinstance(data, Mapping):
        raise SensorError(f'{where}: must be a mapping of fields, not {_shown(data)}')
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            guess = did_you_mean(str(name), fields)
            raise SensorError(f'{where}: unknown field {_shown(name)}{guess}')
    for name, field in fields.items():
        if data.get(name) is None and field.default is dataclasses.MISSING:
            raise SensorError(f"{where}: the field '{name}' is missing")
    hints = typing.get_type_hints(cls)
    values = {
        name: _convert(value, hints[name], f'{where}: {name}')
        for name, value in data.items()
        if value is not None or _allows_none(hints[name])
    }
    try:
        return cls(**values)
    except SensorError as error:
        # The message of a nested dataclass may begin with its own name.
        text = str(error).removeprefix(f'{where.rpartition(": ")[2]}: ')
        raise SensorError(text if text.startswith(where) else f'{where}: {text}') from None


def _allows_none(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to the type of a field."""
    if isinstance(hint, typing.TypeAliasType):
        hint = hint.__value__
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        return _convert(value, hint, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type[Any], hint), value, where)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise SensorError(f'{where} must be one of {", ".join(choices)}, not {_shown(value)}')
        return value
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(value, typing.get_args(hint), where)
    return _convert_scalar(value, hint, where)


def _convert_tuple(value: Any, parts: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise SensorError(f'{where} must be a list, not {_shown(value)}')
    if parts[-1] is Ellipsis:
        return tuple(_convert(v, parts[0], f'{where}[{i}]') for i, v in enumerate(value))
    if len(value) != len(parts):
        raise SensorError(f'{where} must be a list of {len(parts)}, not {_shown(value)}')
    return tuple(
        _convert(v, part, f'{where}[{i}]')
        for i, (v, part) in enumerate(zip(value, parts, strict=True))
    )


def _convert_scalar(value: Any, kind: Any, where: str) -> Any:
    is_flag = isinstance(value, bool)
    if kind is float and isinstance(value, int | float) and not is_flag:
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4, unlike 1.0e-4, as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is kind:
        return value
    names = {float: 'a number', int: 'a whole number', str: 'a string', bool: 'true or false'}
    raise SensorError(f'{where} must be {names.get(kind, kind)}, not {_shown(value)}')


def _shown(value: Any) -> str:
    """Format a value for a message, on one line and shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
