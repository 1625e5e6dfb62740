"""Sensors that a test registers are gone afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from geofm.sensors import registry


@contextmanager
def kept_registry() -> Iterator[None]:
    """Forget the sensors that are registered meanwhile."""
    sensors, channels = dict(registry._sensors), dict(registry._channels)
    try:
        yield
    finally:
        registry._sensors.clear()
        registry._sensors.update(sensors)
        registry._channels.clear()
        registry._channels.update(channels)
