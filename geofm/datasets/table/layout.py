r"""Layouts: rules that parse sensor, place, date and band from the file names of an archive.

A layout is a YAML file of a few lines::

    files:
      - sensor: s1
        regex: '(?P<place>\w+)/s1_(?P<date>\d{8})\.tif'
      - sensor: s2
        regex: '(?P<place>\w+)/s2_(?P<date>\d{8})_(?P<band>B\w\w)\.tif'
      - sensor: dem
        regex: '(?P<place>\w+)/dem\.tif'
"""

import datetime
import fnmatch
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from geofm.printing import one_line, printable
from geofm.sensors import SENSORS
from geofm.suggestions import did_you_mean


class LayoutError(ValueError):
    """A layout is invalid or does not match the files. The message says what to do."""


class Row(NamedTuple):
    """Parsed file name, a row of a table.

    Attributes:
        sensor: Key of the sensor.
        date: Date; None if the name has none.
        place: Name of the place.
        scene: Name of the scene, for rows without a place that belong together.
        band: Names of bands, separated by blanks.
        split: Name of the split.
    """

    sensor: str
    date: datetime.datetime | None
    place: str | None
    scene: str | None
    band: str | None
    split: str | None


class UnknownBandError(LayoutError):
    """A file has a band that its sensor does not have."""


@dataclass(frozen=True)
class Files:
    """Rule for the files of one sensor.

    Attributes:
        sensor: Key of the sensor.
        regex: Regular expression that must match the whole path below the root, or only the file
            name if it has no '/'. Its named groups are ``place``, ``date``, ``band``, ``split``,
            ``scene``, and others that are used in *place* and *date*.
        date_format: Format of ``date``, see :meth:`datetime.datetime.strptime`.
        date: Date of all files in ISO 8601, or a template of the date with named groups in braces,
            e.g. ``'{year}-{month}-{day}'``, which is parsed by *date_format*. Default: the group
            ``date``, or none.
        place: Template of the place with named groups in braces, e.g. ``'{season}_{roi}_{patch}'``.
            Default: the group ``place``, or none.
        bands: Names of the bands of a file in order, with '-' for unused bands. Required if the
            files have no band descriptions and do not have exactly the bands of the sensor.
        split: Name of the split of all files.
        scale: Factor of the numbers in the files.
        offset: Offset, added after scaling.
        unit: Unit after scaling.
        nodata: Nodata value.
        time: Name of the time coordinate of netCDF or HDF5 files with several dates. Each date of
            each variable becomes a row.
    """

    sensor: str
    regex: str
    date_format: str = '%Y%m%d'
    date: str | None = None
    place: str | None = None
    bands: str | Sequence[str] | None = None
    split: str | None = None
    scale: float | None = None
    offset: float | None = None
    unit: str | None = None
    nodata: float | None = None
    time: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            LayoutError: If a value is invalid.
        """
        if self.sensor not in SENSORS:
            raise LayoutError(
                f"unknown sensor '{self.sensor}': known are {', '.join(SENSORS)}; define others in "
                f'a YAML file (--sensors){did_you_mean(str(self.sensor), SENSORS)}'
            )
        try:
            groups = re.compile(self.regex).groupindex
        except (re.error, TypeError) as error:
            raise LayoutError(f'regex {self.regex!r} is not valid: {error}') from error
        for name, template in (('place', self.place), ('date', self.date)):
            used = [] if template is None else _fields(name, template)
            if unknown := [group for group in used if group not in groups]:
                raise LayoutError(
                    f"{name} '{template}' needs a group (?P<{unknown[0]}>...) in the regex"
                )
        if self.date is not None and '{' not in self.date:
            try:
                datetime.datetime.fromisoformat(self.date)
            except ValueError as error:
                raise LayoutError(
                    f"date '{self.date}' is not a date like 2018-02-28; for a date in the name use "
                    'a group (?P<date>...) and date_format'
                ) from error
        if 'band' in groups and self.bands is not None:
            raise LayoutError('give either bands or a group (?P<band>...), not both')
        for name in self._bands:
            if name != '-' and SENSORS[self.sensor].find_band(name) is None:
                known = SENSORS[self.sensor].short_names
                raise LayoutError(
                    f"{self.sensor} has no band '{name}': its bands are {', '.join(known)}"
                    f'{did_you_mean(name, known)}'
                )

    @property
    def _bands(self) -> list[str]:
        given = self.bands or ()
        return given.replace(',', ' ').split() if isinstance(given, str) else list(map(str, given))

    def parse(self, path: str) -> Row | None:
        """Parse a path.

        Args:
            path: Path below the root, with '/' between folders.

        Returns:
            The row; None if the path does not match.

        Raises:
            LayoutError: If the date does not match *date_format*, or the band is unknown.
        """
        subject = path if '/' in self.regex else path.rpartition('/')[2]
        match = re.fullmatch(self.regex, subject)
        if match is None:
            return None
        groups = {name: text for name, text in match.groupdict().items() if text is not None}
        place = groups.get('place') if self.place is None else _fill(self.place, groups, path)
        band = ' '.join(self._bands) or groups.get('band')
        if groups.get('band') and SENSORS[self.sensor].find_band(groups['band']) is None:
            raise UnknownBandError(f"{path}: {self.sensor} has no band '{groups['band']}'")
        split = self.split or groups.get('split')
        return Row(self.sensor, self._date(path, groups), place, groups.get('scene'), band, split)

    def _date(self, path: str, groups: Mapping[str, str]) -> datetime.datetime | None:
        """Return the date of a file."""
        if self.date is not None and '{' not in self.date:
            return datetime.datetime.fromisoformat(self.date)
        text = groups.get('date') if self.date is None else _fill(self.date, groups, path)
        if text is None:
            return None
        try:
            return datetime.datetime.strptime(text, self.date_format)
        except ValueError as error:
            raise LayoutError(
                f"{path}: date '{text}' does not match date_format '{self.date_format}'; correct "
                'date_format or the regex'
            ) from error


def _fields(name: str, template: str) -> list[str]:
    """Return the names of the groups in a template."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise LayoutError(f"{name} '{template}' is not a template: {error}") from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise LayoutError(f"{name} '{template}': write groups as {{name}}, without ':' and '!'")
    return [field for _, field, _, _ in parts if field is not None]


def _fill(template: str, groups: Mapping[str, str], path: str) -> str:
    """Fill a template with the groups of a path."""
    try:
        return template.format_map(groups)
    except KeyError as error:
        raise LayoutError(
            f"{path}: '{template}' needs the group {error}, which is missing in this name; make "
            'it match in all names, or add a separate entry for these files'
        ) from error


@dataclass(frozen=True)
class Layout:
    """Rules for the file names of an archive.

    Attributes:
        files: Rules. A file may match rules of several sensors. For each sensor, the first matching
            rule is used.
        splits: Patterns of the places of each split, e.g. ``{'val': ['tile_1*']}``. All other
            places are in 'train'. None: the split is in the file name, or there is none.
        split_of: Function that returns the split of a place, for layouts in Python. It takes
            precedence over *splits*.
        source: Source of the layout, for messages.
    """

    files: tuple[Files, ...]
    splits: Mapping[str, Sequence[str]] | None = None
    split_of: Callable[[str], str] | None = None
    source: str = 'layout'

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a layout from a file.

        Args:
            path: A YAML file.

        Returns:
            The layout.

        Raises:
            LayoutError: If the file is not a layout. The message is one line that names the file
                and the entry.
        """
        source = printable(path)
        try:
            content = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError as error:
            raise LayoutError(f'{source}: no such file') from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = printable(one_line(error))
            raise LayoutError(f'{source}: cannot be read as YAML: {reason}') from error
        if not isinstance(content, dict) or not isinstance(content.get('files'), list):
            raise LayoutError(
                f"{source}: a layout must have a list 'files' of entries with sensor and regex"
            )
        if unknown := [key for key in content if key not in ('files', 'splits')]:
            guess = did_you_mean(str(unknown[0]), ('files', 'splits'))
            raise LayoutError(f"{source}: unknown key '{printable(unknown[0])}'{guess}")
        entries = tuple(
            _entry(entry, f'{source}, files, entry {i}')
            for i, entry in enumerate(content['files'], 1)
        )
        return cls(entries, _splits(content.get('splits'), source), source=source)

    def rows(self, path: str) -> Iterator[tuple[Files, Row]]:
        """Parse a path.

        Args:
            path: Path below the root, with '/' between folders.

        Yields:
            The matching rule and the row for each sensor of the file.

        Raises:
            LayoutError: If a date or a band is invalid.
        """
        seen = set()
        for kind in self.files:
            if kind.sensor in seen:
                continue
            row = kind.parse(path)
            if row is not None:
                seen.add(kind.sensor)
                yield kind, row._replace(split=row.split or self._split_of(row.place))

    def _split_of(self, place: str | None) -> str | None:
        """Return the split of a place."""
        if self.split_of is not None:
            return None if place is None else self.split_of(place)
        if self.splits is None:
            return None
        for name, patterns in self.splits.items():
            if any(fnmatch.fnmatchcase(place or '', pattern) for pattern in patterns):
                return name
        return 'train'


def _entry(entry: Any, where: str) -> Files:
    """Parse an entry of a layout."""
    names = [field.name for field in fields(Files)]
    if not isinstance(entry, dict):
        raise LayoutError(f'{where}: must have sensor and regex')
    for key in entry:
        if key not in names:
            guess = did_you_mean(str(key), names)
            raise LayoutError(f"{where}: unknown key '{printable(key)}'{guess}")
    for key in ('sensor', 'regex'):
        if not isinstance(entry.get(key), str):
            raise LayoutError(f"{where}: '{key}' is missing or not a text")
    values = dict(entry)
    if isinstance(values.get('date'), datetime.date):
        # YAML converts 2018-02-28 to a date.
        values['date'] = values['date'].isoformat()
    for key in ('scale', 'offset', 'nodata'):
        if (value := values.get(key)) is not None:
            try:
                values[key] = float(value)
            except (TypeError, ValueError) as error:
                raise LayoutError(f"{where}: {key} '{printable(value)}' is not a number") from error
    for key in ('date_format', 'date', 'place', 'split', 'unit', 'time'):
        if not isinstance(values.get(key, ''), str | None):
            values[key] = str(values[key])
    if not isinstance(values.get('bands', ''), str | list | None):
        raise LayoutError(f'{where}: bands must be a list of names')
    try:
        return Files(**values)
    except LayoutError as error:
        raise LayoutError(f'{where}: {printable(error)}') from error


def _splits(given: Any, source: str) -> dict[str, list[str]] | None:
    """Parse the patterns of places by split."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise LayoutError(f"{source}: splits must be lists of patterns, e.g. val: ['a*', 'b']")
    return {
        str(name): [str(p) for p in (patterns if isinstance(patterns, list) else [patterns])]
        for name, patterns in given.items()
    }
