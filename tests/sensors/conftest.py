from collections.abc import Iterator

import pytest

from geofm.sensors import registry


@pytest.fixture(autouse=True)
def same_registry() -> Iterator[None]:
    """Forget the sensors that a test registers."""
    sensors, channels = dict(registry._sensors), dict(registry._channels)
    yield
    registry._sensors.clear()
    registry._sensors.update(sensors)
    registry._channels.clear()
    registry._channels.update(channels)
