"""Registry of the sensors known to this process."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from geofm.printing import one_line
from geofm.sensors.builtin import BUILTIN, SENTINEL1, SENTINEL2
from geofm.sensors.plain import SensorError
from geofm.sensors.sensor import Band, Sensor
from geofm.suggestions import did_you_mean

_sensors: dict[str, Sensor] = {}
_channels: dict[str, tuple[Sensor, Band]] = {}

#: Registered sensors by key, in canonical order, which is the order of registration, with
#: Sentinel-1 and Sentinel-2 first. The mapping is a live view.
SENSORS: Mapping[str, Sensor] = MappingProxyType(_sensors)

#: Sensor and band of each channel by name, in canonical order. The mapping is a live view.
CHANNELS: Mapping[str, tuple[Sensor, Band]] = MappingProxyType(_channels)

#: Sensors of SEN12MS-CR-TS, the default of models and data sets. If all sensors of a model or data
#: set are among these, its tensors of dates have columns for both, see :func:`date_columns`.
DEFAULT_SENSORS: tuple[str, ...] = (SENTINEL1.name, SENTINEL2.name)


def register_sensor(sensor: Sensor) -> Sensor:
    """Register a sensor.

    Args:
        sensor: The sensor. Registering an equal sensor again has no effect.

    Returns:
        The sensor.

    Raises:
        SensorError: If another sensor has the same key, or a channel with the same name.
    """
    known = _sensors.get(sensor.name)
    if known == sensor:
        return sensor
    if known is not None:
        raise SensorError(
            f"two definitions of the sensor '{sensor.name}': '{known.title}' is registered, and "
            f"'{sensor.title}' differs in {', '.join(_differences(known, sensor))}: give one of "
            'them another key'
        )
    for channel in sensor.band_names:
        if channel in _channels:
            raise SensorError(
                f"sensor '{sensor.name}': the channel '{channel}' is one of "
                f"'{_channels[channel][0].name}' already: leave out 'qualified: false'"
            )
    _sensors[sensor.name] = sensor
    _channels.update(
        {name: (sensor, band) for name, band in zip(sensor.band_names, sensor.bands, strict=True)}
    )
    return sensor


def _differences(one: Sensor, other: Sensor) -> list[str]:
    """Return the names of the fields in which two sensors differ."""
    first, second = one.to_dict(), other.to_dict()
    names = dict.fromkeys([*first, *second])
    return [name for name in names if first.get(name) != second.get(name)]


def register_sensors(definitions: Mapping[str, Mapping[str, Any]], source: str) -> tuple[str, ...]:
    """Register sensors from their definitions.

    Args:
        definitions: Definitions by key, see :meth:`Sensor.to_dict`; not trusted.
        source: File or checkpoint of the definitions, for messages.

    Returns:
        Keys of the sensors.

    Raises:
        SensorError: If a definition is invalid, or differs from that of a registered sensor.
    """
    if not isinstance(definitions, Mapping) or not definitions:
        raise SensorError(f'{source}: must map keys of sensors to their definitions')
    try:
        sensors = [_define(key, fields) for key, fields in definitions.items()]
        for sensor in sensors:
            register_sensor(sensor)
    except SensorError as error:
        raise SensorError(f'{source}: {error}') from None
    return tuple(sensor.name for sensor in sensors)


def _define(key: Any, fields: Any) -> Sensor:
    if not isinstance(key, str) or not isinstance(fields, Mapping):
        raise SensorError(f'sensor {key!r}: must be a key and a mapping of fields')
    if fields.get('name', key) != key:
        raise SensorError(f"sensor {key}: its name is '{fields['name']}': leave out the name")
    return Sensor.from_dict({'name': key, **fields})


def load_sensors(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Register the sensors of a YAML file.

    The file maps keys to the fields of :class:`Sensor`::

        planet:
          title: PlanetScope
          quantity: reflectance
          unit: DN
          scale: 0.0001
          bands:
            - {name: blue, common_name: blue, wavelength: 0.49, gsd: 3, mean: 560, std: 420}
            - {name: nir, common_name: nir, wavelength: 0.86, gsd: 3, mean: 2600, std: 1100}

    Args:
        path: Path of the file.

    Returns:
        Keys of the sensors.

    Raises:
        FileNotFoundError: If there is no such file.
        SensorError: If the file or a definition is invalid, or differs from that of a registered
            sensor.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such file (definitions of sensors)')
    try:
        definitions = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SensorError(f'{file}: cannot be read as YAML: {one_line(error)}') from error
    return register_sensors(definitions, str(file))


def added_sensors() -> tuple[Sensor, ...]:
    """Return the registered sensors that are not built-in, in canonical order."""
    return tuple(known for known in _sensors.values() if known not in BUILTIN)


def sensor(key: str) -> Sensor:
    """Look up a sensor.

    Args:
        key: Key of the sensor.

    Returns:
        The sensor.

    Raises:
        SensorError: If no sensor has this key.
    """
    if key not in _sensors:
        raise SensorError(
            f'unknown sensor {key!r}: known are {", ".join(_sensors)}'
            f'{did_you_mean(str(key), _sensors)}. Define others in a file for --sensors'
        )
    return _sensors[key]


def canonical_order(keys: Sequence[str]) -> tuple[str, ...]:
    """Sort sensors canonically.

    Args:
        keys: Keys of sensors, in any order.

    Returns:
        The unique keys in the order of registration.

    Raises:
        SensorError: If a sensor is unknown, or there is none.
    """
    if isinstance(keys, str):
        raise SensorError(f"sensors must be a list of keys, not the string '{keys}'")
    if not keys:
        raise SensorError(f'no sensors given: choose from {", ".join(_sensors)}')
    wanted = {sensor(key).name for key in keys}
    return tuple(key for key in _sensors if key in wanted)


def date_columns(sensors: Sequence[str]) -> tuple[str, ...]:
    """Return the sensors of the columns of a ``dates`` tensor.

    Args:
        sensors: Keys of the sensors of a data set or model.

    Returns:
        Sentinel-1 and Sentinel-2 Level-1C if all sensors are among these two; otherwise the sensors
        in canonical order.

    Raises:
        SensorError: If a sensor is unknown, or there is none.
    """
    ordered = canonical_order(sensors)
    return DEFAULT_SENSORS if set(ordered) <= set(DEFAULT_SENSORS) else ordered


def reference_sensor(sensors: Sequence[str]) -> str:
    """Return the sensor whose grid the others are warped onto by default.

    Args:
        sensors: Keys of the available sensors.

    Returns:
        The sensor with the highest :attr:`~geofm.sensors.Sensor.grid_priority`; among several, the
        first in canonical order.

    Raises:
        SensorError: If a sensor is unknown, or there is none.
    """
    return max(canonical_order(sensors), key=lambda key: _sensors[key].grid_priority)


for _sensor in BUILTIN:
    register_sensor(_sensor)
