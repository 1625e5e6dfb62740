"""All writers, killed just before the final rename, and run again."""

import functools
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from geofm.atomic import atomic_file
from geofm.cli import main
from geofm.datasets import write_sample_data
from geofm.datasets.catalogue.catalogue import beside, update_catalogue
from geofm.datasets.statistics import write_statistics
from geofm.evaluation.features import FeatureCache, Features
from geofm.grid import Grid
from geofm.maps.make.embeddings import write_embeddings
from geofm.maps.make.pca import PCABasis
from geofm.maps.make.windows import Strip
from geofm.maps.make.writer import write_patches
from geofm.maps.view.figure import save_figure
from geofm.models.checkpoints.files import write_torch, write_weights
from geofm.sample import DEFAULT_ROIS
from tests.datasets.catalogue.test_catalogue import KEY
from tests.datasets.tree import grid_at, write_pair
from tests.killing import killed_before_rename, leftovers
from tests.maps.scenes import NORTH_UP, UTM, noise, write

GRID = Grid(UTM, NORTH_UP, 40, 48)


def strips() -> list[Strip]:
    values = np.random.default_rng(0).random((3, 5, 6), np.float32)
    return [Strip(values, np.ones((40, 48), bool))]


def page(folder: Path) -> None:
    pytest.importorskip('rio_tiler', reason='map tiles need rio-tiler, of the extra "maps"')
    from geofm.maps.view.page import Layer, write_page
    from geofm.maps.view.tiles import Scalar

    scene = folder.parent / 'scene.tif'
    if not scene.exists():
        write(scene, noise('s2', 16, 16))
    layers = [Layer('a', scene, Scalar(0, 1), 'Group')]
    write_page(folder / 'page', layers, title='Page', zooms=(10, 10))


def basis(folder: Path) -> None:
    eye = np.eye(3)
    PCABasis(eye[0], eye, eye[1] + 1, 1, 'sha').save(folder / 'basis.safetensors')


WRITERS: dict[str, Callable[[Path], object]] = {
    'statistics': lambda folder: write_statistics(folder / 's.yaml', {'VV': {'mean': 1.0}}, {}),
    'sample data': lambda folder: write_sample_data(folder / 'd', DEFAULT_ROIS[:1], 1, 1, 16),
    'safetensors': lambda folder: write_weights({'a': torch.ones(9)}, folder / 'w.safetensors'),
    'torch': lambda folder: write_torch({'a': torch.ones(9)}, folder / 'w.ckpt'),
    'features': lambda folder: FeatureCache(folder, print).get(
        'key', lambda: Features(torch.ones(2, 1, 3), torch.zeros(2, dtype=torch.int64))
    ),
    'raster': lambda folder: write_patches(folder / 'm.tif', GRID, 8, ['a', 'b', 'c'], strips()),
    'embeddings': lambda folder: write_embeddings(folder / 'e.parquet', GRID.coarsen(8), strips()),
    'basis': basis,
    'figure': lambda folder: save_figure(Figure(), folder / 'figure'),
    'page': page,
}


def kill_all(root: Path) -> None:
    """Kill each writer, each with its own folder."""
    for name, writer in WRITERS.items():
        (root / name).mkdir()
        killed_before_rename(functools.partial(writer, root / name))


def test_killed_writers_leave_nothing_that_the_next_ones_do_not_remove(
    tmp_path: Path, forkserver: ForkServerContext
) -> None:
    # Forked from a process without threads of GDAL.
    process = forkserver.Process(target=kill_all, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    for name, writer in WRITERS.items():
        folder, undisturbed = tmp_path / name, tmp_path / 'undisturbed' / name
        undisturbed.mkdir(parents=True)
        writer(undisturbed)
        # There is no file with the final name, but there are leftovers.
        assert all(entry.name.startswith('.') for entry in folder.iterdir()), name
        assert leftovers(folder), name
        writer(folder)
        files = [
            sorted(str(p.relative_to(root)) for p in root.rglob('*'))
            for root in (folder, undisturbed)
        ]
        assert files[0] == files[1], name


def test_a_killed_index_leaves_the_catalogue_before(tmp_path: Path) -> None:
    root = tmp_path / 'in'
    write_pair(root, KEY, grid_at(32632, 5e5, 5.3e6))
    update_catalogue(root)
    content = beside(root).read_bytes()
    write_pair(root, KEY._replace(patch=3), grid_at(32632, 5e5, 5.3e6))
    killed_before_rename(lambda: update_catalogue(root))
    assert beside(root).read_bytes() == content
    assert len(list(root.glob('.*'))) == 3
    assert len(update_catalogue(root).table) == 4
    assert list(root.glob('.*')) == [beside(root)]


@pytest.mark.parametrize('command', ['map', 'figure', 'benchmark'])
def test_a_second_run_into_one_folder_is_refused(tmp_path: Path, command: str) -> None:
    """The error names the process, and nothing has been written."""
    out = tmp_path / 'out'
    scene = write(tmp_path / 's2.tif', noise('s2', 32, 32))
    with atomic_file(out / 's2_pca.tif') as part:
        part.write_bytes(scene.read_bytes())
    arguments = {
        'map': lambda: None,
        'figure': lambda: main(['figure', str(out), '--s2', str(scene)]),
        'benchmark': lambda: main(
            [
                'benchmark',
                '--data=SampleLandCoverDataModule',
                f'--data.paths={tmp_path}',
                f'--output={out}',
                '--cache=null',
            ]
        ),
    }
    code = f"""
import time
from geofm.locking import locked_folder
with locked_folder({str(out)!r}):
    print('held', flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == 'held\n'
    message = f'process {holder.pid} on .* is writing there'
    try:
        if command == 'map':
            from geofm.maps import map_scene
            from tests.maps.scenes import GroundModel
            from tests.maps.test_products import S2

            with pytest.raises(OSError, match=message):
                map_scene(GroundModel(S2), None, scene, out)
        else:
            with pytest.raises(SystemExit, match=message):
                arguments[command]()
    finally:
        holder.kill()
        holder.wait()
    assert sorted(p.name for p in out.iterdir()) == ['.geofm.lock', 's2_pca.tif']
