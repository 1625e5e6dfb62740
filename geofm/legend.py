"""Legends: values, names and colours of the classes of a map."""

import colorsys
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

#: Value of pixels without a class, in masks and class maps.
NO_CLASS = 255

#: Raster tag with a legend as JSON, and key of a legend in the state of a data module.
LEGEND_TAG = 'geofm_legend'

_HEX = re.compile(r'#([0-9a-fA-F]{6})')

#: Step between successive hues. With the golden ratio, hues are never close to one another.
_HUE_STEP = 0.61803398875

type RGB = tuple[int, int, int]


class LegendError(ValueError):
    """A legend or class is invalid."""


@dataclass(frozen=True, slots=True)
class MapClass:
    """A class of a map.

    Attributes:
        value: Value in masks and maps, 0 to 254.
        name: Name to display.
        color: Red, green and blue, 0 to 255.
    """

    value: int
    name: str
    color: RGB

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            LegendError: If the value or the colour is out of range, or the name is empty.
        """
        if not 0 <= self.value < NO_CLASS:
            raise LegendError(f"class '{self.name}': value {self.value} is not in 0 to 254")
        if not self.name or not self.name.isprintable():
            raise LegendError(f'class {self.value}: {self.name!r} is not a printable name')
        if len(self.color) != 3 or not all(0 <= part <= 255 for part in self.color):
            raise LegendError(f"class '{self.name}': {self.color} is not a colour of 0 to 255")


@dataclass(frozen=True)
class Legend:
    """Legend of a class map.

    Attributes:
        classes: The classes in ascending order of their values.
    """

    classes: tuple[MapClass, ...]

    def __post_init__(self) -> None:
        """Sort and check the classes.

        Raises:
            LegendError: If there are no classes, or a value or name occurs twice.
        """
        if not self.classes:
            raise LegendError('a legend needs at least one class')
        object.__setattr__(self, 'classes', tuple(sorted(self.classes, key=lambda c: c.value)))
        for what, given in (('value', self.values), ('name', self.names)):
            if len(set(given)) < len(given):
                twice = next(item for item in given if given.count(item) > 1)
                raise LegendError(f'two classes have the {what} {twice!r}')

    @classmethod
    def of(cls, classes: int | Sequence[str] | Mapping[Any, Any] | Iterable[Any]) -> Self:
        """Make a legend from a configuration or file.

        Args:
            classes: Number of classes; names of classes with values from 0; or a mapping from name
                to value or to ``{'value': 3, 'color': '#3a70b8'}``, where the colour may also be a
                list ``[58, 112, 184]``, and both entries are optional. Classes without a colour get
                one from a palette.

        Returns:
            The legend.

        Raises:
            LegendError: If a class is invalid.
        """
        if isinstance(classes, int):
            classes = [f'class {value}' for value in range(classes)]
        if not isinstance(classes, Mapping):
            classes = dict.fromkeys(_names(classes))
        made = [_class(str(name), entry, i) for i, (name, entry) in enumerate(classes.items())]
        return cls(tuple(made))

    @property
    def values(self) -> tuple[int, ...]:
        """Values of the classes."""
        return tuple(c.value for c in self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(c.name for c in self.classes)

    @property
    def colors(self) -> dict[int, RGB]:
        """Colour of each value, for :class:`geofm.maps.make.writer.Encoding`."""
        return {c.value: c.color for c in self.classes}

    @property
    def size(self) -> int:
        """Number of outputs of a network whose output i is the class with value i."""
        return self.values[-1] + 1

    def value(self, name: str) -> int:
        """Return the value of a class.

        Args:
            name: Name of the class.

        Returns:
            Its value.

        Raises:
            LegendError: If there is no such class.
        """
        for c in self.classes:
            if c.name == name:
                return c.value
        raise LegendError(f"no class '{name}': there are {', '.join(self.names)}")

    def name(self, value: int) -> str:
        """Return the name of the class with a value, or e.g. ``'class 7'`` if there is none."""
        return next((c.name for c in self.classes if c.value == value), f'class {value}')

    # -- in files -------------------------------------------------------------------------------

    def entry(self) -> list[dict[str, Any]]:
        """Convert the legend to plain data, for JSON, YAML and checkpoints."""
        return [{'value': c.value, 'name': c.name, 'color': list(c.color)} for c in self.classes]

    @classmethod
    def from_entry(cls, entry: Any) -> Self:
        """Make a legend from the result of :meth:`entry`.

        Args:
            entry: Plain data; not trusted.

        Returns:
            The legend.

        Raises:
            LegendError: If the data are invalid.
        """
        if not isinstance(entry, list) or not all(isinstance(item, dict) for item in entry):
            raise LegendError('not a list of classes')
        try:
            return cls(
                tuple(
                    MapClass(_whole(item['value']), str(item['name']), _color(item['color']))
                    for item in entry
                )
            )
        except KeyError as error:
            raise LegendError(f'a class without value, name or color: {error}') from error

    def tags(self) -> dict[str, str]:
        """Return raster tags with the legend, to be read by :meth:`from_tags`."""
        return {LEGEND_TAG: json.dumps(self.entry())}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self | None:
        """Read the legend in the tags of a raster.

        Args:
            tags: Tags of a raster.

        Returns:
            The legend; None if the raster has none.

        Raises:
            LegendError: If the tag is invalid.
        """
        if LEGEND_TAG not in tags:
            return None
        try:
            entry = json.loads(tags[LEGEND_TAG])
        except (ValueError, RecursionError) as error:
            raise LegendError(f'the tag {LEGEND_TAG} is not JSON: {error}') from error
        return cls.from_entry(entry)


def palette_color(index: int) -> RGB:
    """Return a colour of an endless palette. Successive colours differ in hue and lightness.

    Args:
        index: Index of the colour, from 0.

    Returns:
        Red, green and blue, 0 to 255.
    """
    hue = (0.58 + index * _HUE_STEP) % 1
    lightness = (0.45, 0.62, 0.33)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.6)
    return round(255 * red), round(255 * green), round(255 * blue)


def _names(classes: Iterable[Any]) -> list[str]:
    if isinstance(classes, str):
        raise LegendError(f'classes must be a list of names or a mapping, not {classes!r}')
    names = [str(name) for name in classes]
    if len(set(names)) < len(names):
        raise LegendError(f'a class is named twice: {", ".join(names)}')
    return names


def _class(name: str, entry: Any, index: int) -> MapClass:
    fields = entry if isinstance(entry, Mapping) else {'value': entry}
    if unknown := set(fields) - {'value', 'color'}:
        raise LegendError(f"class '{name}': unknown {sorted(map(str, unknown))}; give value, color")
    value = fields.get('value')
    value = index if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise LegendError(f"class '{name}': value {value!r} is not a whole number")
    color = fields.get('color')
    return MapClass(value, name, palette_color(value) if color is None else _color(color))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise LegendError(f'a value of a class is {value!r}, not a whole number')
    return value


def _color(color: Any) -> RGB:
    if isinstance(color, str) and (match := _HEX.fullmatch(color)):
        red, green, blue = bytes.fromhex(match[1])
        return red, green, blue
    if isinstance(color, list | tuple) and len(color) == 3 and all(type(p) is int for p in color):
        return color[0], color[1], color[2]
    raise LegendError(f'{color!r} is not a colour: give #rrggbb or three numbers of 0 to 255')
