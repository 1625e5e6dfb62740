"""Unregistering the sensors of a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from geofm.sensors import registry


@contextmanager
def kept_registry() -> Iterator[None]:
    """Unregister, on exit, the sensors registered in this context."""
    sensors, channels = dict(registry._sensors), dict(registry._channels)
    try:
        yield
    finally:
        registry._sensors.clear()
        registry._sensors.update(sensors)
        registry._channels.clear()
        registry._channels.update(channels)
