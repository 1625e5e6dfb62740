"""The modules that a spawned worker reads with must not import those needed for training."""

import subprocess
import sys

#: Modules that a worker does not need. Each takes tens of megabytes.
HEAVY = ('lightning', 'kornia', 'timm', 'lightly', 'torchmetrics', 'scipy', 'sklearn')


def test_reading_imports_no_training() -> None:
    modules = 'geofm.datasets, geofm.datasets.seeded, geofm.datasets.windows'
    code = f'import sys, {modules}; print(*{{name.split(".")[0] for name in sys.modules}})'
    result = subprocess.run(
        [sys.executable, '-c', code], check=True, capture_output=True, text=True
    )
    assert not set(HEAVY) & set(result.stdout.split())
