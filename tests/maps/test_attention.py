import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import timm
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine
from torch import Tensor

import geofm.models  # noqa: F401  registers the models
from geofm.maps import attention_map
from geofm.sensors import BANDS, SENTINEL1, SENTINEL2, band_statistics
from geofm.transforms import Normalize

from .scenes import NORTH_UP, UTM, GroundModel, noise, write

S1, S2 = SENTINEL1.band_names, SENTINEL2.band_names


def _scene(folder: Path, height: int, width: int) -> tuple[Path, Path]:
    s1 = write(folder / 's1_2018-02-28_.tif', noise('s1', height, width))
    s2 = write(folder / 's2_2018-02-24_.tif', noise('s2', height, width))
    return s1, s2


def _read(path: Path) -> np.ndarray:
    with rasterio.open(path) as src:
        return src.read()


@pytest.mark.parametrize(
    ('crs', 'transform'),
    [
        (UTM, NORTH_UP),
        (
            CRS.from_epsg(4326),
            Affine(8.983152841195215e-05, 0, -0.78, 0, -8.983152841195215e-05, 38),
        ),
        (UTM, Affine(10, 0, 500_000, 0, 10, 4_200_000)),
        (UTM, NORTH_UP @ Affine.rotation(30)),
    ],
    ids=['utm', 'degrees', 'south-up', 'rotated'],
)
def test_a_checkerboard_comes_out_where_it_went_in(
    tmp_path: Path, crs: CRS, transform: Affine
) -> None:
    """Patches alternate between the mean and one standard deviation above it."""
    mean, std = (t.numpy() for t in band_statistics(S2))
    board = np.indices((9, 13)).sum(axis=0) % 2
    pixels = np.kron(board, np.ones((8, 8)))[:70, :100]
    image = (mean[:, None, None] + std[:, None, None] * pixels).astype(np.float32)
    path = write(tmp_path / 's2.tif', image, crs, transform)
    result = attention_map(GroundModel(S2), None, path, tmp_path / 'out', window=32)
    with rasterio.open(path) as scene, rasterio.open(result.raster) as src:
        assert (src.crs, src.transform, src.shape) == (scene.crs, scene.transform, scene.shape)
        assert src.bounds == scene.bounds
        heads = src.read()
    # Patches at the edge that are not full show less of the ground.
    np.testing.assert_allclose(heads[1, :64, :96], pixels[:64, :96], atol=1e-5)
    assert np.isfinite(heads).all()


def test_overlapped_windows_equal_a_single_pass(tmp_path: Path) -> None:
    pair = _scene(tmp_path, 75, 110)
    once = attention_map(GroundModel(BANDS), *pair, tmp_path / 'a', window=112)
    model = GroundModel(BANDS)
    tiled = attention_map(model, *pair, tmp_path / 'b', window=32, overlap=0.4, batch_size=3)
    assert len(model.calls) > 3
    np.testing.assert_allclose(_read(tiled.raster), _read(once.raster), atol=1e-5)


@pytest.mark.parametrize('name', ['linear', 'xattn', 's2'])
def test_a_scene_of_one_window_is_the_model_itself(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    bands = S2 if name == 's2' else BANDS
    model: Any = timm.create_model(f'geofm_vit_tiny_patch16_{name}', in_chans=len(bands), depth=2)
    s1, s2 = _scene(tmp_path, 64, 96)
    result = attention_map(model, None if name == 's2' else s1, s2, tmp_path / 'out', block=0)
    image = np.concatenate([noise('s1', 64, 96), noise('s2', 64, 96)])[-len(bands) :]
    x = Normalize(bands)({'image': torch.from_numpy(image)[None]})['image']
    dates = np.array([['2018-02-28', '2018-02-24']], 'datetime64[D]').astype(np.int64)
    with torch.inference_mode():
        maps = model.cls_attention(x, torch.from_numpy(dates), block=0)
    assert {band.split()[0] for band in result.bands} == set(maps)
    pixels = dict(zip(result.bands, _read(result.raster), strict=True))
    for source, weights in maps.items():
        where = 'last layer' if source == 'fusion' else 'block 0'
        expected = 24 * weights[0].numpy()
        for head, values in enumerate(expected):
            patches = pixels[f'{source} {where} head {head}'][::16, ::16]
            np.testing.assert_array_equal(patches, values)
        mean = pixels[f'{source} {where} mean'][::16, ::16]
        np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-6)


class WindowModel(GroundModel):
    """Attention rises from left to right in every window, whatever the ground."""

    def cls_attention(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        block: int = -1,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        ground = super().cls_attention(x, dates, block, present)['s2']
        height, width = ground.shape[-2:]
        logits = height * width * ground + torch.linspace(-0.5, 0.5, width)
        return {'s2': logits.flatten(2).softmax(dim=-1).unflatten(2, (height, width))}


def _steps(values: np.ndarray, every: int) -> tuple[float, float]:
    """Difference of neighbouring columns: mean at borders of windows, greatest elsewhere."""
    steps = np.abs(np.diff(values, axis=-1)).mean(axis=(0, 1))
    border = np.zeros(len(steps), bool)
    border[every - 1 :: every] = True
    return float(steps[border].mean()), float(steps[~border].max())


def _smooth_ground() -> np.ndarray:
    """Ground on which all that is rough comes from the model."""
    rows, cols = np.mgrid[:128, :384]
    ground = 1 + 0.3 * np.sin(rows / 40) * np.cos(cols / 55)
    return (band_statistics(S2)[0].numpy()[:, None, None] * ground).astype(np.float32)


@pytest.mark.parametrize('name', ['window', 'vit'])
def test_overlap_leaves_no_seams(tmp_path: Path, name: str) -> None:
    """Steps between windows are no larger than those that the model makes within one."""
    if name == 'vit':
        p, ground = 16, _smooth_ground()
        torch.manual_seed(0)
        name, scale = 'geofm_vit_tiny_patch16_s2', 1.0
        model: Any = timm.create_model(name, in_chans=13, depth=2, init_values=scale)
        # Positions as smooth as training makes them; opposite at opposite ends of a row.
        position = model.encoders['s2'].pos_embed
        angle = torch.linspace(0, math.pi, 14).repeat(14)[:, None]
        start, middle = torch.randn(2, position.shape[-1])
        position.data.copy_(angle.cos() * start + angle.sin() * middle)
    else:
        p, ground = 8, noise('s2', 128, 256)
        model = WindowModel(S2)
    path = write(tmp_path / 's2.tif', ground)
    steps = {}
    for overlap, every in ((0.0, 8), (0.5, 4)):
        result = attention_map(model, None, path, tmp_path, window=8 * p, overlap=overlap)
        steps[overlap] = _steps(_read(result.raster)[:, ::p, ::p], every)
    without, within = steps[0.0]
    assert without > 2 * within  # there are seams to be seen
    assert steps[0.5][0] < within


def test_invalid_ground_is_nan(tmp_path: Path) -> None:
    pixels = noise('s2', 64, 64)
    pixels[4, 10:20, 30:50] = np.nan
    path = write(tmp_path / 's2.tif', pixels)
    result = attention_map(GroundModel(S2), None, path, tmp_path / 'out', window=32)
    invalid = np.zeros((64, 64), bool)
    invalid[10:20, 30:50] = True
    for band in _read(result.raster):
        np.testing.assert_array_equal(np.isnan(band), invalid)


def test_a_scene_of_many_windows_is_read_piece_by_piece(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 1500, 96).astype('uint16'))
    model = GroundModel(S2)
    result = attention_map(model, None, path, tmp_path / 'out', window=64, batch_size=4)
    assert _read(result.raster).shape == (3, 1500, 96)
    assert {shape[0] for shape, *_ in model.calls} <= {1, 2, 3, 4}
    assert {shape[1:] for shape, *_ in model.calls} == {(13, 64, 64)}


def test_what_the_raster_says_of_itself(tmp_path: Path) -> None:
    pair = _scene(tmp_path, 32, 32)
    checkpoint = tmp_path / 'a.ckpt'
    checkpoint.write_bytes(b'weights')
    model = GroundModel(BANDS)
    result = attention_map(
        model, *pair, tmp_path / 'out', block=-2, window=32, checkpoint=checkpoint
    )
    assert result.bands == (
        's1 block 1 mean',
        's1 block 1 head 0',
        's1 block 1 head 1',
        's2 block 1 mean',
        's2 block 1 head 0',
        's2 block 1 head 1',
    )
    with rasterio.open(result.raster) as src:
        assert src.descriptions == result.bands
        tags = src.tags()
    assert tags['model'] == 'GroundModel'
    assert tags['block'] == '1'
    assert tags['window'] == '32'
    assert tags['checkpoint_sha256'] == hashlib.sha256(b'weights').hexdigest()
    assert (tags['s1'], tags['s1_date']) == ('s1_2018-02-28_.tif', '2018-02-28')
    (_, dates, block, present) = model.calls[0]
    assert dates is not None
    assert dates.numpy().astype('datetime64[D]').astype(str).tolist() == [
        ['2018-02-28', '2018-02-24']
    ]
    assert block == -2
    assert present is None
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        's2_2018-02-24__attention.png',
        's2_2018-02-24__attention.tif',
    ]


def test_a_fused_model_may_do_without_a_sensor(tmp_path: Path) -> None:
    _, s2 = _scene(tmp_path, 32, 32)
    model = GroundModel(BANDS)
    with pytest.warns(UserWarning, match='no Sentinel-1 GRD raster'):
        result = attention_map(model, None, s2, tmp_path / 'out', window=32)
    # No map of what was not there.
    assert {band.split()[0] for band in result.bands} == {'s2'}
    present = model.calls[0][3]
    assert present is not None
    assert present.tolist() == [[False, True]]


def test_a_raster_that_the_model_has_no_use_for_is_named(tmp_path: Path) -> None:
    pair = _scene(tmp_path, 32, 32)
    with pytest.warns(UserWarning, match=r's1_2018.*is not used'):
        attention_map(GroundModel(S2), *pair, tmp_path / 'out', window=32)


class Interrupted(GroundModel):
    def cls_attention(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        block: int = -1,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if len(self.calls) == 3:
            raise RuntimeError('interrupted')
        return super().cls_attention(x, dates, block, present)


def test_an_interrupted_run_leaves_no_files(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 320, 32))
    with pytest.raises(RuntimeError, match='interrupted'):
        attention_map(Interrupted(S2), None, path, tmp_path / 'out', window=32, batch_size=2)
    assert list((tmp_path / 'out').iterdir()) == []


def test_unfit_arguments_are_errors(tmp_path: Path) -> None:
    _, s2 = _scene(tmp_path, 32, 32)
    small = write(tmp_path / 'small.tif', noise('s2', 7, 40))
    empty = write(tmp_path / 'empty.tif', np.full((13, 16, 16), np.nan, np.float32))
    model, out = GroundModel(S2), tmp_path / 'out'
    with pytest.raises(ValueError, match='multiple of the model'):
        attention_map(model, None, s2, out, window=30)
    with pytest.raises(ValueError, match=r'small\.tif: 7 x 40 px is smaller than one patch'):
        attention_map(model, None, small, out)
    with pytest.raises(ValueError, match='batch_size=0'):
        attention_map(model, None, s2, out, batch_size=0)
    with pytest.raises(ValueError, match='--s2'):
        attention_map(model, s2, None, out)
    with pytest.raises(ValueError, match=r'empty\.tif: no pixel'):
        attention_map(model, None, empty, out, window=16)
    assert not out.exists() or list(out.iterdir()) == []


def test_real_pairs(shared_data: Path, tmp_path: Path) -> None:
    """Real ground, another grid each, through a real two-sensor model."""
    torch.manual_seed(0)
    model = timm.create_model('geofm_vit_tiny_patch16_linear', in_chans=15, depth=2)
    tree = shared_data / 'real' / 'crts_layout'
    if not tree.exists():
        pytest.skip('needs real/crts_layout of the shared data')
    pairs = [
        ('ROIs1868/36/{S}/0/{s}_ROIs1868_36_ImgNo_0_2019-09-1{d}_patch_0.tif', '7', '8'),
        ('ROIs1970/21/{S}/0/{s}_ROIs1970_21_ImgNo_0_2021-07-2{d}_patch_0.tif', '1', '3'),
    ]
    for pattern, *days in pairs:
        s1, s2 = (
            tree / pattern.format(S=key.upper(), s=key, d=day)
            for key, day in zip(('s1', 's2'), days, strict=True)
        )
        result = attention_map(model, s1, s2, tmp_path, window=96)
        with rasterio.open(s2) as scene, rasterio.open(result.raster) as src:
            assert (src.crs, src.transform, src.shape) == (scene.crs, scene.transform, scene.shape)
            pixels = src.read()
        assert np.isfinite(pixels).all()
        assert (pixels > 0).all()
        # CLS and registers get a share, so patches get less than uniform, but not by much.
        assert 0.5 < pixels.mean() < 1
