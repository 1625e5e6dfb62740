"""Maps at a stride below the patch size."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from geofm.maps import Options, Product, map_scene
from geofm.maps.make.embeddings import EmbeddingTable
from geofm.maps.make.strides import Stride
from geofm.sensors import SENTINEL2, band_statistics

from .scenes import GroundModel, cog_problems, noise, write

S2 = SENTINEL2.band_names
EVERY: tuple[Product, ...] = get_args(Product)
RASTERS = (
    'attention', 'rollout', 'point', 'pca', 'pca_components', 'foreground', 'segments', 'embedding',
)  # fmt: skip


def _read(path: Path) -> np.ndarray:
    with rasterio.open(path) as src:
        return src.read()


def _middle(path: Path) -> tuple[float, float]:
    with rasterio.open(path) as src:
        return src.lnglat()


# Patch size, stride, and start of the first cell. Cells lie in the middle of patches, so the first
# begins half a cell before the scene for an even number of cells. The last begins between pixels.
CASES = [(8, 4, -2.0), (8, 2, -1.0), (6, 2, 0.0), (6, 3, -1.5)]


@pytest.mark.parametrize(('patch', 'stride', 'start'), CASES)
def test_cells_are_means_of_the_ground_around_them(
    tmp_path: Path, patch: int, stride: int, start: float
) -> None:
    """Each cell has the mean of the patch that rasterio reads around the cell's centre."""
    mean, std = (t.numpy()[:, None, None] for t in band_statistics(S2))
    pixels = noise('s2', 52, 75)
    path = write(tmp_path / 's2.tif', pixels)
    model, options = GroundModel(S2, patch), Options(window=4 * patch, stride=stride)
    files = map_scene(model, None, path, tmp_path / 'out', ['embedding'], options)
    assert cog_problems(files['embedding']) == []
    with rasterio.open(path) as scene, rasterio.open(files['embedding']) as src:
        corner = window_transform(Window(start, start, 1, 1), scene.transform)
        assert src.transform == corner @ Affine.scale(stride)
        assert src.crs == scene.crs
        assert src.tags()['stride'] == str(stride)
        found = src.read()
        checked = 0
        for row, col in np.ndindex(src.shape):
            y, x = scene.index(*src.xy(row, col), op=float)
            top, left = round(y - patch / 2), round(x - patch / 2)
            if top < 0 or left < 0 or top + patch > 52 or left + patch > 75:
                continue
            block = scene.read(window=Window(left, top, patch, patch))
            expected = ((block - mean) / std).mean(axis=(1, 2))
            np.testing.assert_allclose(found[:, row, col], expected, atol=1e-4)
            checked += 1
        # All cells except those at the edges, which reach the edges of the scene.
        assert checked >= 0.6 * src.width * src.height
        assert abs(src.bounds.right - scene.bounds.right) <= 10 * stride
        assert abs(src.bounds.bottom - scene.bounds.bottom) <= 10 * stride
    table = EmbeddingTable.read(files['embedding_table'])
    assert (table.grid.transform, table.grid.shape) == (src.transform, src.shape)


def test_cells_include_the_patch_grid(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 38, 60))
    options = Options(window=32, segments=3, point=_middle(path))
    coarse = map_scene(GroundModel(S2), None, path, tmp_path / 'a', EVERY, options)
    # The same basis for both, like that of another scene.
    fine_options = replace(options, stride=2, basis=coarse['pca_basis'])
    fine = map_scene(GroundModel(S2), None, path, tmp_path / 'b', EVERY, fine_options)
    for name in RASTERS:
        cells = _read(fine[name])
        assert cells.shape[1:] == (20, 31), name
        if name != 'segments':  # k-means has other points
            np.testing.assert_array_equal(cells[:, 2::4, 2::4], _read(coarse[name]), name)
    assert np.isfinite(_read(fine['embedding'])).all()


@pytest.mark.parametrize(('patch', 'stride'), [(8, 4), (6, 3)])
def test_invalid_ground_is_nodata(tmp_path: Path, patch: int, stride: int) -> None:
    pixels = noise('s2', 48, 48)
    pixels[3, 7:25, 18:40] = np.nan
    path = write(tmp_path / 's2.tif', pixels)
    options = Options(window=24, stride=stride)
    files = map_scene(GroundModel(S2, patch), None, path, tmp_path / 'a', ['attention'], options)
    valid = np.ones((48, 48), bool)
    valid[7:25, 18:40] = False
    with rasterio.open(path) as scene, rasterio.open(files['attention']) as src:
        known = np.isfinite(src.read(1))
        for row, col in np.ndindex(src.shape):
            left, top = ~scene.transform @ (src.transform @ (col, row))
            # Pixels that intersect the cell.
            rows = slice(max(0, int(np.floor(top))), int(np.ceil(top + stride)))
            cols = slice(max(0, int(np.floor(left))), int(np.ceil(left + stride)))
            assert known[row, col] == valid[rows, cols].any(), (row, col)


class Interrupted(GroundModel):
    """Model that fails after some calls."""

    def __init__(self, most: int) -> None:
        super().__init__(S2)
        self.most = most

    def observe(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.calls) == self.most:
            raise RuntimeError('interrupted')
        return super().observe(*args, **kwargs)


def test_an_interrupted_run_resumes_with_its_shift(tmp_path: Path) -> None:
    """Four shifts of 4 x 2 windows, one per call."""
    path, out = write(tmp_path / 's2.tif', noise('s2', 80, 48)), tmp_path / 'out'
    options = Options(window=32, batch_size=1, stride=4)
    stopped, again = Interrupted(14), GroundModel(S2)
    with pytest.raises(RuntimeError, match='interrupted'):
        map_scene(stopped, None, path, out, ['embedding'], options)
    assert [entry.suffix for entry in out.iterdir()] == ['.work']
    files = map_scene(again, None, path, out, ['embedding'], options)
    assert len(stopped.calls) - 1 + len(again.calls) - 1 == 4 * 4 * 2
    assert sorted(out.iterdir()) == sorted(files.values())
    whole = map_scene(GroundModel(S2), None, path, tmp_path / 'whole', ['embedding'], options)
    np.testing.assert_array_equal(_read(files['embedding']), _read(whole['embedding']))


def test_unsuitable_strides_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 32, 32))
    for wrong in (0, 3, 16):
        with pytest.raises(ValueError, match=rf'stride={wrong} .*choose one of \[1, 2, 4, 8\]'):
            map_scene(GroundModel(S2), None, path, tmp_path, options=Options(stride=wrong))
    both = Options(window=16, stride=4, pixels='bilinear')
    with pytest.raises(ValueError, match='stride=4 and pixels=bilinear: choose one'):
        map_scene(GroundModel(S2), None, path, tmp_path, options=both)
    assert Stride.of(16, None).origins == [(0, 0)]
