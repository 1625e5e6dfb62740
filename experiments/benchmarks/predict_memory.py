"""Measure the memory of predicting a scene that is killed once and resumed.

A Sentinel-2 scene is generated on disk, block by block, tiled and compressed. ``geofm predict``
segments it in a process of its own, with a small model of random weights, since only memory and
time are measured. The process is killed (SIGKILL) when 40 % of the rows of windows are finished,
and the command is given again. The peak is the largest resident memory of either process, as the
kernel notes it (VmHWM), read ten times a second. A smaller scene is predicted undisturbed too: both
maps must have the same pixels.

    python experiments/benchmarks/predict_memory.py --side 10980 --smaller 2745

Results are written to ``experiments/results``.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import rasterio
import torch
from map_memory import peak_bytes, write_scene
from torchgeo.tasks import SemanticSegmentation

import geofm.models  # noqa: F401  registers the models
from geofm.atomic import atomic_file

RESULTS = Path(__file__).parents[1] / 'results'
DECODER: Literal['segformer'] = 'segformer'
BACKBONE, BANDS, CLASSES = 'geofm_vit_nano_patch16_s2', 13, 8
WINDOW, OVERLAP = 224, 0.1

#: Fraction of the rows of windows after which the process is killed.
_KILL = 0.4

#: Name of the scene, without the ending.
_SCENE = 's2_2018-02-24'


def write_checkpoint(path: Path) -> None:
    """Write a task with random weights as a Lightning Trainer does."""
    torch.manual_seed(0)
    task = SemanticSegmentation(DECODER, BACKBONE, in_channels=BANDS, num_classes=CLASSES)
    content = {'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}
    torch.save(content, path)


def rows_of_windows(side: int) -> int:
    """Return the number of rows of windows of a scene."""
    step = int(WINDOW * (1 - OVERLAP))
    return -(-(side - WINDOW) // step) + 1


class Run:
    """Runs of the command on one scene, and the most memory that any of them took.

    Args:
        folder: Folder with the scene and the checkpoint.
        output: Folder for the map.
        threads: Threads of the process.
    """

    def __init__(self, folder: Path, output: Path, threads: int) -> None:
        self.output = output
        self.peak = 0
        self.seconds = 0.0
        self.command = [
            *(sys.executable, '-m', 'geofm', 'predict', str(folder / 'task.ckpt')),
            *('--s2', str(folder / f'{_SCENE}.tif'), '--output', str(output)),
            *(f'--window={WINDOW}', f'--overlap={OVERLAP}', '--products=[classes]'),
        ]
        self.environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}

    @property
    def map(self) -> Path:
        """The map."""
        return self.output / f'{_SCENE}_classes.tif'

    def run(self, kill_at: int | None = None) -> None:
        """Run the command to its end, or until the given number of rows of windows is finished.

        Args:
            kill_at: Number of rows after which it is killed.

        Raises:
            SystemExit: If it fails, or ends before it can be killed.
        """
        start = time.perf_counter()
        process = subprocess.Popen(self.command, env=self.environment)
        while process.poll() is None:
            self.peak = max(self.peak, peak_bytes(process.pid))
            if kill_at is not None and len(list(self.output.glob('.*.work/strip_*'))) >= kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.1)
        self.seconds += time.perf_counter() - start
        wanted = 0 if kill_at is None else -signal.SIGKILL
        if process.returncode != wanted:
            raise SystemExit(f'{self.command}: exit code {process.returncode}, not {wanted}')


def measure(side: int, threads: int, compare: bool) -> dict[str, Any]:
    """Return peak memory and time for a scene with the given side, killed once and resumed.

    Args:
        side: Height and width in pixels.
        threads: Threads of the process.
        compare: Whether to predict the scene undisturbed too, and compare the maps.

    Returns:
        What was measured.

    Raises:
        SystemExit: If the maps differ, or one does not lie on the scene.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = folder / f'{_SCENE}.tif'
        write_scene(scene, 's2', side)
        write_checkpoint(folder / 'task.ckpt')
        rows = rows_of_windows(side)
        killed = Run(folder, folder / 'killed', threads)
        killed.run(kill_at=max(1, int(_KILL * rows)))
        killed.run()
        if compare:
            whole = Run(folder, folder / 'whole', threads)
            whole.run()
            if _pixels(whole.map) != _pixels(killed.map):
                raise SystemExit('the maps of the killed and the undisturbed run differ')
        with rasterio.open(scene) as src, rasterio.open(killed.map) as dst:
            if (src.crs, src.transform, src.shape) != (dst.crs, dst.transform, dst.shape):
                raise SystemExit('the map is not on the grid of the scene')
        return {
            'side': side,
            'scene_mib': scene.stat().st_size / 2**20,
            'peak_mib': killed.peak / 2**20,
            'seconds': killed.seconds,
            'map_mib': killed.map.stat().st_size / 2**20,
            'compared': compare,
        }


def _pixels(path: Path) -> bytes:
    """Return the pixels of a map; its tags differ by the output folder in the command."""
    with rasterio.open(path) as src:
        return bytes(src.read().tobytes())


def main() -> None:
    """Measure scenes of two sizes, the smaller one first, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--side', type=int, default=10_980)
    parser.add_argument('--smaller', type=int, default=2_745)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    rows = [
        measure(args.smaller, args.threads, compare=True),
        measure(args.side, args.threads, compare=False),
    ]
    result = {
        'model': f'{DECODER} on {BACKBONE}, {CLASSES} classes',
        'window': WINDOW,
        'overlap': OVERLAP,
        'machine': platform.processor() or platform.machine(),
        'threads': args.threads,
        'torch': torch.__version__,
        'gdal': rasterio.__gdal_version__,
        'scenes': rows,
    }
    with atomic_file(RESULTS / 'predict_memory.json') as part:
        part.write_text(json.dumps(result, indent=2) + '\n')
    lines = [
        '# Memory of `geofm predict`',
        '',
        f'{result["model"]}; windows of {WINDOW} px, overlap {OVERLAP}; {args.threads} thread(s). '
        'Each run is killed once (SIGKILL) and resumed; time is that of both processes. Made by '
        '`python experiments/benchmarks/predict_memory.py`.',
        '',
        '| scene, 13 bands | peak memory | time | map | as undisturbed |',
        '|---|---:|---:|---:|---|',
    ]
    lines += [
        f'| {row["side"]:,} x {row["side"]:,} px | {row["peak_mib"]:,.0f} MiB '
        f'| {row["seconds"]:,.0f} s | {row["map_mib"]:,.1f} MiB '
        f'| {"same pixels" if row["compared"] else "not compared"} |'
        for row in rows
    ]
    text = '\n'.join(lines) + '\n'
    with atomic_file(RESULTS / 'predict_memory.md') as part:
        part.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
