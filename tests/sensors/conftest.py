from collections.abc import Iterator

import pytest

from ..registry import kept_registry


@pytest.fixture(autouse=True)
def same_registry() -> Iterator[None]:
    """Forget the sensors that a test registers."""
    with kept_registry():
        yield
