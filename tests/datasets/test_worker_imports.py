"""What a spawned worker reads with must not import what training needs."""

import subprocess
import sys

import pytest

#: Modules of which a worker needs none; each takes tens of megabytes.
HEAVY = ('lightning', 'kornia', 'timm', 'lightly', 'torchmetrics', 'scipy', 'sklearn')


@pytest.mark.parametrize(
    'module', ['geofm.datasets', 'geofm.datasets.seeded', 'geofm.datasets.windows']
)
def test_reading_imports_no_training(module: str) -> None:
    code = f'import sys, {module}; print(*{{name.split(".")[0] for name in sys.modules}})'
    result = subprocess.run(
        [sys.executable, '-c', code], check=True, capture_output=True, text=True
    )
    assert not set(HEAVY) & set(result.stdout.split())
