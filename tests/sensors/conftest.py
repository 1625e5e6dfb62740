from collections.abc import Iterator

import pytest

from ..registry import kept_registry


@pytest.fixture(autouse=True)
def same_registry() -> Iterator[None]:
    """Unregister the sensors of a test."""
    with kept_registry():
        yield
