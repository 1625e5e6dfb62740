import math
import os
import signal
import tracemalloc
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import rasterio
import timm
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points
from torch import Tensor
from torch.nn.functional import avg_pool2d

import geofm.models  # noqa: F401  registers the models
from geofm.maps import Options, Product, map_scene
from geofm.maps.make.embeddings import EmbeddingTable
from geofm.maps.make.survey import weights_sha256
from geofm.models.attention import TokensAndAttention
from geofm.models.timm_vit import TimmViT
from geofm.sensors import BANDS, SENTINEL1, SENTINEL2, band_statistics
from geofm.transforms import Normalize

from .scenes import NORTH_UP, UTM, GroundModel, cog_problems, noise, write

S1, S2 = SENTINEL1.band_names, SENTINEL2.band_names
EVERY: tuple[Product, ...] = get_args(Product)
RASTERS = (
    'attention', 'rollout', 'point', 'pca', 'pca_components', 'foreground', 'segments', 'embedding',
)  # fmt: skip


def _scene(folder: Path, height: int, width: int) -> tuple[Path, Path]:
    s1 = write(folder / 's1_2018-02-28_.tif', noise('s1', height, width))
    s2 = write(folder / 's2_2018-02-24_.tif', noise('s2', height, width))
    return s1, s2


def _read(path: Path) -> np.ndarray:
    with rasterio.open(path) as src:
        return src.read()


def _middle(path: Path) -> tuple[float, float]:
    """Longitude and latitude of the pixel south-east of a raster's centre."""
    with rasterio.open(path) as src:
        x, y = src.xy(src.height // 2, src.width // 2)
        lon, lat = transform_points(src.crs, CRS.from_epsg(4326), [x], [y])
    return lon[0], lat[0]


def _check_grid(files: Mapping[str, Path], scene: Path, patch_size: int) -> None:
    """Check that origin and CRS are those of the scene, and pixels the size of patches."""
    with rasterio.open(scene) as src:
        crs, transform, shape = src.crs, src.transform, src.shape
    for name in RASTERS:
        with rasterio.open(files[name]) as src:
            assert src.crs == crs, name
            assert src.transform == transform @ Affine.scale(patch_size), name
            assert src.shape == tuple(math.ceil(side / patch_size) for side in shape), name


GRIDS: dict[str, tuple[CRS, Affine]] = {
    'utm': (UTM, NORTH_UP),
    'degrees': (
        CRS.from_epsg(4326),
        Affine(8.983152841195215e-05, 0, -0.78, 0, -8.983152841195215e-05, 38),
    ),
    'south-up': (UTM, Affine(10, 0, 500_000, 0, 10, 4_200_000)),
    'degrees, south-up': (CRS.from_epsg(4326), Affine(1e-4, 0, -0.78, 0, 1e-4, 38)),
    'rotated': (UTM, NORTH_UP @ Affine.rotation(30)),
}


@pytest.mark.parametrize(('crs', 'transform'), GRIDS.values(), ids=GRIDS.keys())
def test_a_checkerboard_keeps_its_place(tmp_path: Path, crs: CRS, transform: Affine) -> None:
    """Patches alternate between the mean and one standard deviation above it."""
    mean, std = (t.numpy() for t in band_statistics(S2))
    board = np.indices((9, 13)).sum(axis=0) % 2
    # Three patches differ from all others, so that symmetry cannot hide a shift.
    board[4, 7] = board[0, 0] = board[3, 12] = 3
    pixels = np.kron(board, np.ones((8, 8)))[:70, :100]
    image = (mean[:, None, None] + std[:, None, None] * pixels).astype(np.float32)
    path = write(tmp_path / 's2.tif', image, crs, transform)
    options = Options(window=32, segments=3, point=_middle(path))
    files = map_scene(GroundModel(S2), None, path, tmp_path / 'out', EVERY, options)
    _check_grid(files, path, 8)
    # Partial patches at the edge cover less of the scene.
    whole = (slice(0, 8), slice(0, 12))
    expected = board[whole].astype(np.float32)
    for name in ('attention', 'rollout', 'embedding'):
        for band in _read(files[name]):
            np.testing.assert_allclose(band[whole], expected, atol=1e-5)
    first = _read(files['pca_components'])[0][whole]
    assert np.corrcoef(first.ravel(), expected.ravel())[0, 1] == pytest.approx(1)
    segments = _read(files['segments'])[0][whole]
    for value in (0, 1, 3):
        assert len(set(segments[expected == value])) == 1
    rgb = _read(files['pca'])[0][whole].astype(int)
    assert rgb[0, 0] == rgb[4, 7] == 255 or rgb[0, 0] == rgb[4, 7] == 1
    foreground = _read(files['foreground'])[0][whole]
    assert set(foreground[expected != 1].tolist()) == {0, 1}
    assert (foreground[expected == 3] == 1).all()
    # The table has the rows and columns of the raster.
    table = EmbeddingTable.read(files['embedding_table'])
    with rasterio.open(files['embedding']) as src:
        assert (table.grid.crs, table.grid.transform) == (src.crs, src.transform)


@pytest.mark.parametrize('how', ['nearest', 'bilinear'])
def test_products_can_be_upsampled_to_pixels(tmp_path: Path, how: Any) -> None:
    _, path = _scene(tmp_path, 70, 100)
    options = Options(window=32, pixels=how)
    files = map_scene(GroundModel(S2), None, path, tmp_path / 'a', None, options)
    patches = map_scene(GroundModel(S2), None, path, tmp_path / 'b', None, Options(window=32))
    with rasterio.open(path) as src:
        grid = src.crs, src.transform, src.shape
    for name, file in files.items():
        if file.suffix == '.tif' and name != 'embedding':
            assert cog_problems(file) == []
            with rasterio.open(file) as src:
                assert (src.crs, src.transform, src.shape) == grid
                pixels = src.read()
            if how == 'nearest' or name in ('segments', 'foreground'):
                coarse = _read(patches[name])
                np.testing.assert_array_equal(
                    pixels, coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :70, :100]
                )
    np.testing.assert_array_equal(_read(files['embedding']), _read(patches['embedding']))


def test_windows_equal_a_single_pass(tmp_path: Path) -> None:
    pair = _scene(tmp_path, 1024, 1024)
    options = Options(window=1024, segments=4)
    once = map_scene(GroundModel(BANDS), *pair, tmp_path / 'a', None, options)
    model = GroundModel(BANDS)
    options = Options(window=224, batch_size=16, segments=4)
    tiled = map_scene(model, *pair, tmp_path / 'b', None, options)
    assert sum(call.shape[0] for call in model.calls) > 80
    for name in ('attention', 'rollout', 'embedding'):
        np.testing.assert_allclose(_read(tiled[name]), _read(once[name]), atol=1e-4)
    assert (_read(tiled['segments']) == _read(once['segments'])).mean() > 0.99


@pytest.mark.parametrize('name', ['linear', 'xattn', 's2'])
def test_a_scene_of_one_window_is_the_model_itself(tmp_path: Path, name: str) -> None:
    bands = S2 if name == 's2' else BANDS
    model: Any = timm.create_model(
        f'geofm_vit_tiny_patch16_{name}', in_chans=len(bands), depth=2, init_values=1.0
    )
    s1, s2 = _scene(tmp_path, 64, 96)
    options = Options(block=0, point=_middle(s2))
    files = map_scene(model, None if name == 's2' else s1, s2, tmp_path / 'out', EVERY, options)
    image = np.concatenate([noise('s1', 64, 96), noise('s2', 64, 96)])[-len(bands) :]
    x = Normalize(bands)({'image': torch.from_numpy(image)[None]})['image']
    dates = torch.from_numpy(
        np.array([['2018-02-28', '2018-02-24']], 'datetime64[D]').astype(np.int64)
    )
    with torch.inference_mode():
        maps = model.cls_attention(x, dates, block=0)
        rolled = model.attention_rollout(x, dates)
        tokens = model.forward_features(x, dates)[0, model.num_prefix_tokens :]
        at_point = model.patch_attention(x, torch.tensor([2 * 6 + 3]), dates, block=0)
    close: dict[str, Any] = {'rtol': 1e-5, 'atol': 1e-6}
    for product, expected in (('attention', maps), ('point', at_point)):
        with rasterio.open(files[product]) as src:
            found = dict(zip(src.descriptions, src.read(), strict=True))
        assert {text.split()[0] for text in found} == set(expected)
        for source, weights in expected.items():
            where = 'last layer' if source == 'fusion' else 'block 0'
            heads = 24 * weights[0].numpy()
            for head, values in enumerate(heads):
                np.testing.assert_allclose(found[f'{source} {where} head {head}'], values, **close)
            mean = found[f'{source} {where} mean']
            np.testing.assert_allclose(mean, heads.mean(axis=0), **close)
    with rasterio.open(files['rollout']) as src:
        assert src.descriptions == tuple(f'{source} rollout' for source in rolled)
        for values, expected_map in zip(src.read(), rolled.values(), strict=True):
            np.testing.assert_allclose(values, 24 * expected_map[0].numpy(), **close)
    embedding = _read(files['embedding'])
    np.testing.assert_allclose(embedding.reshape(192, -1).T, tokens.numpy(), **close)


def test_any_vit_of_timm(tmp_path: Path) -> None:
    vit: Any = timm.create_model(
        'vit_tiny_patch16_224', num_classes=0, depth=2, dynamic_img_size=True
    ).eval()  # fmt: skip
    path = write(tmp_path / 's2.tif', noise('s2', 48, 64))
    files = map_scene(TimmViT(vit, ('B04', 'B03', 'B02')), None, path, tmp_path / 'out')
    with rasterio.open(files['attention']) as src:
        assert src.descriptions[0] == 's2 block 1 mean'
        assert src.tags()['model'] == 'vit_tiny_patch16_224'
    bands = ('B04', 'B03', 'B02')
    image = torch.from_numpy(noise('s2', 48, 64)[[S2.index(band) for band in bands]])[None]
    with torch.inference_mode():
        tokens = vit.forward_features(Normalize(bands)({'image': image})['image'])[0, 1:]
    np.testing.assert_allclose(
        _read(files['embedding']).reshape(192, -1).T, tokens.numpy(), atol=1e-5, rtol=1e-5
    )


def test_a_vit_without_cls_has_only_features(tmp_path: Path) -> None:
    vit = timm.create_model(
        'vit_base_patch16_siglip_224', num_classes=0, depth=1, embed_dim=48, num_heads=2,
        dynamic_img_size=True,
    )  # fmt: skip
    path, out = write(tmp_path / 's2.tif', noise('s2', 48, 64)), tmp_path / 'out'
    model = TimmViT(vit, ('B04', 'B03', 'B02'))
    files = map_scene(model, None, path, out, None, Options(point=_middle(path)))
    assert set(files) >= {'point', 'pca', 'segments', 'embedding'}
    assert not {'attention', 'rollout'} & set(files)
    with pytest.raises(ValueError, match='no CLS token'):
        map_scene(model, None, path, out, ['attention'])


class WindowModel(GroundModel):
    """Model whose attention rises from left to right in every window, for any input."""

    def observe(self, x: Tensor, *args: Any, **kwargs: Any) -> TokensAndAttention:
        seen = super().observe(x, *args, **kwargs)
        height, width = (side // self.patch_size for side in x.shape[-2:])
        logits = height * width * seen.attention['s2'] + torch.linspace(-0.5, 0.5, width)
        attention = logits.flatten(2).softmax(dim=-1).unflatten(2, (height, width))
        return seen._replace(attention={'s2': attention})


def _steps(values: np.ndarray, every: int) -> tuple[float, float]:
    """Differences of columns: the mean at borders of windows, the largest elsewhere."""
    steps = np.abs(np.diff(values, axis=-1)).mean(axis=(0, 1))
    border = np.zeros(len(steps), bool)
    border[every - 1 :: every] = True
    return float(steps[border].mean()), float(steps[~border].max())


def _smooth_ground() -> np.ndarray:
    """A smooth scene, so that any roughness comes from the model."""
    rows, cols = np.mgrid[:128, :384]
    ground = 1 + 0.3 * np.sin(rows / 40) * np.cos(cols / 55)
    return (band_statistics(S2)[0].numpy()[:, None, None] * ground).astype(np.float32)


@pytest.mark.parametrize('name', ['window', 'vit'])
def test_overlap_leaves_no_seams(tmp_path: Path, name: str) -> None:
    """Steps between windows are not larger than those within a window."""
    if name == 'vit':
        p, ground = 16, _smooth_ground()
        model: Any = timm.create_model(
            'geofm_vit_tiny_patch16_s2', in_chans=13, depth=2, init_values=1.0
        )
        # Smooth position embeddings, as after training, opposite at both ends of a row.
        position = model.encoders['s2'].pos_embed
        angle = torch.linspace(0, math.pi, 14).repeat(14)[:, None]
        start, middle = torch.randn(2, position.shape[-1])
        position.data.copy_(angle.cos() * start + angle.sin() * middle)
    else:
        p, ground = 8, noise('s2', 128, 256)
        model = WindowModel(S2)
    path = write(tmp_path / 's2.tif', ground)
    products: list[Product] = ['attention', 'embedding'] if name == 'vit' else ['attention']
    for product in products:
        steps = {}
        for overlap, every in ((0.0, 8), (0.5, 4)):
            options = Options(window=8 * p, overlap=overlap)
            files = map_scene(model, None, path, tmp_path, [product], options)
            steps[overlap] = _steps(_read(files[product]), every)
        without, within = steps[0.0]
        assert without > 2 * within  # there are seams to be seen
        assert steps[0.5][0] < within


def test_invalid_ground_is_nodata(tmp_path: Path) -> None:
    pixels = noise('s2', 64, 64)
    pixels[4, 8:33, 16:40] = np.nan
    path = write(tmp_path / 's2.tif', pixels)
    model, options = GroundModel(S2), Options(window=32, point=_middle(path), segments=3)
    files = map_scene(model, None, path, tmp_path / 'a', EVERY, options)
    invalid = np.zeros((8, 8), bool)
    invalid[1:4, 2:5] = True  # the fifth row of patches has a valid pixel
    for name in RASTERS:
        with rasterio.open(files[name]) as src:
            for mask, band in zip(src.read_masks(), src.read(masked=True), strict=True):
                if name == 'point':
                    assert (mask[invalid] == 0).all()
                    continue
                np.testing.assert_array_equal(mask == 0, invalid)
                assert np.isfinite(band.compressed().astype(float)).all()
    pixelwise = map_scene(
        model, None, path, tmp_path / 'b', ['attention'], Options(window=32, pixels='nearest')
    )
    expected = np.zeros((64, 64), bool)
    expected[8:33, 16:40] = True
    for band in _read(pixelwise['attention']):
        np.testing.assert_array_equal(np.isnan(band), expected)


def test_windows_without_data_are_not_run(tmp_path: Path) -> None:
    pixels = noise('s2', 64, 320)
    pixels[:, :, 60:] = np.nan
    path = write(tmp_path / 's2.tif', pixels)
    model = GroundModel(S2)
    options = Options(window=64, overlap=0, batch_size=1)
    files = map_scene(model, None, path, tmp_path / 'out', ['attention'], options)
    # One window, after the empty window for the layout.
    assert len(model.calls) == 2
    np.testing.assert_array_equal(np.isfinite(_read(files['attention'])[0, 0]), np.arange(40) < 8)


def test_a_large_scene_is_read_window_by_window(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 1500, 96).astype('uint16'))
    model, options = GroundModel(S2), Options(window=64, batch_size=2)
    files = map_scene(model, None, path, tmp_path / 'out', ['attention'], options)
    assert _read(files['attention']).shape == (3, 188, 12)
    assert {call.shape[0] for call in model.calls} == {1, 2}
    assert {call.shape[1:] for call in model.calls} == {(13, 64, 64)}


def test_memory_does_not_grow_with_the_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of NumPy; experiments/benchmarks/map_memory.py measures the whole process."""
    monkeypatch.setattr('geofm.maps.make.writer._STRIP_BYTES', 2**15)
    monkeypatch.setattr('geofm.maps.make.embeddings._GROUP_ROWS', 256)

    def peak(height: int, product: Product) -> int:
        path = write(tmp_path / f'{height}.tif', noise('s2', height, 96).astype('uint16'))
        model, options = GroundModel(S2, patch_size=4), Options(window=64, overlap=0)
        tracemalloc.start()
        map_scene(model, None, path, tmp_path / 'out', [product], options)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    products: tuple[Product, ...] = ('pca', 'embedding')
    for product in products:
        peak(256, product)  # imports and caches
        low, high = peak(512, product), peak(2560, product)
        # The second scene has five times as many patches.
        more = (2560 - 512) // 4 * 24 * 13 * 4
        assert high < low + more / 2


def test_tags_of_the_rasters(tmp_path: Path) -> None:
    pair = _scene(tmp_path, 32, 32)
    model = GroundModel(BANDS)
    options = Options(block=-2, window=32, point=_middle(pair[1]), segments=3)
    files = map_scene(model, *pair, tmp_path / 'out', EVERY, options, command='geofm map x')
    names = {product: rasterio.open(files[product]).descriptions for product in RASTERS}
    maps = ('mean', 'head 0', 'head 1')
    expected = tuple(f'{source} block 1 {what}' for source in ('s1', 's2') for what in maps)
    assert names['attention'] == names['point'] == expected
    assert names['rollout'] == ('s1 rollout', 's2 rollout')
    assert names['pca_components'] == ('component 0', 'component 1', 'component 2')
    assert names['pca'][0] == 'component 0 as red'
    assert names['embedding'] == tuple(f'dimension {i}' for i in range(15))
    for product in RASTERS:
        assert cog_problems(files[product]) == []
        with rasterio.open(files[product]) as src:
            tags = src.tags()
            assert src.nodata is not None
        assert tags['model'] == 'GroundModel'
        assert tags['weights_sha256'] == weights_sha256(model)
        assert tags['command'] == 'geofm map x'
        assert tags['window'] == '32'
        assert (tags['s1'], tags['s1_date']) == ('s1_2018-02-28_.tif', '2018-02-28')
        last = {'attention': '1', 'point': '1', 'rollout': '0 to 2'}
        assert tags['block'] == last.get(product, '2')
    assert EmbeddingTable.read(files['embedding_table']).tags['command'] == 'geofm map x'
    call = model.calls[1]
    assert call.dates is not None
    assert call.dates.numpy().astype('datetime64[D]').astype(str).tolist() == [
        ['2018-02-28', '2018-02-24']
    ]
    assert call.present is None
    # Only the products remain.
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted(
        path.name for path in files.values()
    )
    assert all(path.name.startswith('s2_2018-02-24__') for path in files.values())


def test_the_hash_distinguishes_weights() -> None:
    a, b = GroundModel(S2), GroundModel(S2)
    assert weights_sha256(a) == weights_sha256(b)
    b.place.data += 1e-7
    assert weights_sha256(a) != weights_sha256(b)


def test_a_point_sees_the_window_around_it(tmp_path: Path) -> None:
    _, path = _scene(tmp_path, 160, 240)
    with rasterio.open(path) as src:
        at = transform_points(src.crs, CRS.from_epsg(4326), *([v] for v in src.xy(155, 120)))
    model, options = GroundModel(S2), Options(window=64, point=(at[0][0], at[1][0]))
    files = map_scene(model, None, path, tmp_path / 'out', ['point'], options)
    # Patch (19, 15): the window is centred on it as far as the border of the scene allows.
    values = _read(files['point'])
    window = (slice(12, 20), slice(11, 19))
    known = np.zeros((20, 30), bool)
    known[window] = True
    np.testing.assert_array_equal(np.isfinite(values), np.broadcast_to(known, values.shape))
    normal = Normalize(S2)({'image': torch.from_numpy(noise('s2', 160, 240))})['image']
    patches = avg_pool2d(normal, 8).numpy()
    expected = patches[0][window] * patches[0, 19, 15]
    np.testing.assert_allclose(values[1][window], expected, atol=1e-4)


def test_a_point_without_data_is_an_error(tmp_path: Path) -> None:
    pixels = noise('s2', 64, 64)
    pixels[:, 24:48, 24:48] = 0
    path = write(tmp_path / 's2.tif', pixels)
    options = Options(window=32, point=_middle(path))
    with pytest.raises(ValueError, match=r's2\.tif: no data at the point'):
        map_scene(GroundModel(S2), None, path, tmp_path / 'out', ['point'], options)


def test_a_basis_can_be_used_for_another_scene(tmp_path: Path) -> None:
    pixels = noise('s2', 64, 128)
    whole = write(tmp_path / 'whole.tif', pixels)
    part = write(tmp_path / 'part.tif', pixels[:, :, :64])
    model, options = GroundModel(S2), Options(window=64, overlap=0)
    first = map_scene(model, None, whole, tmp_path / 'a', ['pca'], options)
    again = map_scene(
        model, None, part, tmp_path / 'b', ['pca'],
        Options(window=64, overlap=0, basis=first['pca_basis']),
    )  # fmt: skip
    for name in ('pca', 'pca_components', 'foreground'):
        np.testing.assert_allclose(_read(again[name]), _read(first[name])[:, :, :8], atol=1e-5)
    alone = map_scene(model, None, part, tmp_path / 'c', ['pca'], options)
    assert not np.array_equal(_read(alone['pca']), _read(again['pca']))
    other = GroundModel(S2)
    other.place.data += 1
    with pytest.raises(ValueError, match=r'pca\.safetensors: PCA basis of another model'):
        map_scene(other, None, part, tmp_path, ['pca'], Options(basis=first['pca_basis']))


def test_precision_of_embeddings(tmp_path: Path) -> None:
    _, path = _scene(tmp_path, 64, 64)
    read = {}
    for precision in ('float32', 'float16', 'int8'):
        options = Options(window=32, precision=precision)
        files = map_scene(GroundModel(S2), None, path, tmp_path / 'out', ['embedding'], options)
        with rasterio.open(files['embedding']) as src:
            assert src.dtypes[0] == precision
            read[precision] = src.read() * np.array(src.scales, np.float32)[:, None, None]
    exact = read['float32']
    np.testing.assert_allclose(read['float16'], exact, rtol=1e-3, atol=1e-6)
    largest = np.abs(exact).max(axis=(1, 2), keepdims=True)
    assert (np.abs(read['int8'] - exact) <= largest / 254 * 1.001).all()


def test_a_fused_model_works_with_a_missing_sensor(tmp_path: Path) -> None:
    _, s2 = _scene(tmp_path, 32, 32)
    model = GroundModel(BANDS)
    with pytest.warns(UserWarning, match='no Sentinel-1 GRD raster'):
        files = map_scene(model, None, s2, tmp_path / 'out', None, Options(window=32, segments=3))
    # There is no map of a missing sensor.
    for product in ('attention', 'rollout'):
        with rasterio.open(files[product]) as src:
            assert {band.split()[0] for band in src.descriptions} == {'s2'}
    present = model.calls[1].present
    assert present is not None
    assert present.tolist() == [[False, True]]


def test_a_raster_of_an_unknown_sensor_is_warned_of(tmp_path: Path) -> None:
    pair = _scene(tmp_path, 32, 32)
    with pytest.warns(UserWarning, match=r's1_2018.*is not used'):
        map_scene(GroundModel(S2), *pair, tmp_path / 'out', ['attention'], Options(window=32))


class Interrupted(GroundModel):
    """Model that fails after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__(S2)
        self.most = calls

    def observe(self, x: Tensor, *args: Any, **kwargs: Any) -> TokensAndAttention:
        if len(self.calls) == self.most:
            raise RuntimeError('interrupted')
        return super().observe(x, *args, **kwargs)


@pytest.mark.parametrize('calls', [1, 2, 4, 9, 18])
def test_an_interrupted_run_resumes(tmp_path: Path, calls: int) -> None:
    """9 x 4 windows of 32 px, two per call: finished windows are not run again."""
    path = write(tmp_path / 's2.tif', noise('s2', 160, 80))
    out, options = tmp_path / 'out', Options(window=32, batch_size=2, segments=3)
    stopped = Interrupted(calls)
    with pytest.raises(RuntimeError, match='interrupted'):
        map_scene(stopped, None, path, out, None, options)
    # There is no product, complete or partial.
    assert [entry.suffix for entry in out.iterdir()] == ['.work']
    again = Interrupted(99)
    files = map_scene(again, None, path, out, None, options)
    windows = [sum(call.shape[0] for call in m.calls[1:]) for m in (stopped, again)]
    assert sum(windows) == 36
    assert windows[0] == 2 * (calls - 1)
    assert sorted(entry.name for entry in out.iterdir()) == sorted(f.name for f in files.values())
    whole = map_scene(GroundModel(S2), None, path, tmp_path / 'whole', None, options)
    for name in RASTERS:
        if name in files:
            np.testing.assert_array_equal(_read(files[name]), _read(whole[name]))


def test_a_work_folder_of_other_settings_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 160, 80))
    out = tmp_path / 'out'

    def windows(model: GroundModel, **kwargs: Any) -> int:
        options = Options(**{'window': 32, 'batch_size': 2, **kwargs})
        map_scene(model, None, path, out, ['attention'], options)
        return sum(call.shape[0] for call in model.calls[1:])

    with pytest.raises(RuntimeError, match='interrupted'):
        windows(Interrupted(9))
    other = GroundModel(S2)
    other.place.data += 1
    assert windows(other) == 36
    assert windows(GroundModel(S2), block=0) == 36
    assert windows(GroundModel(S2), overlap=0.4) == 36
    # The batch size does not affect the stored values.
    assert windows(GroundModel(S2), batch_size=3) == 36 - 16
    with pytest.raises(RuntimeError, match='interrupted'):
        windows(Interrupted(9))
    os.utime(path, ns=(1, 1))
    assert windows(GroundModel(S2)) == 36


class Killed(GroundModel):
    """Model that kills its process at the tenth batch."""

    def observe(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().observe(*args, **kwargs)


def map_until_killed(path: Path, out: Path) -> None:
    map_scene(Killed(S2), None, path, out, ['attention'], Options(window=32, batch_size=2))


def test_a_killed_run_resumes(tmp_path: Path, forkserver: ForkServerContext) -> None:
    path, out = write(tmp_path / 's2.tif', noise('s2', 160, 80)), tmp_path / 'out'
    process = forkserver.Process(target=map_until_killed, args=(path, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    model, options = GroundModel(S2), Options(window=32, batch_size=2)
    files = map_scene(model, None, path, out, ['attention'], options)
    assert sum(call.shape[0] for call in model.calls[1:]) == 36 - 18
    whole = map_scene(GroundModel(S2), None, path, tmp_path / 'whole', ['attention'], options)
    np.testing.assert_array_equal(_read(files['attention']), _read(whole['attention']))


def test_unsuitable_arguments_are_an_error(tmp_path: Path) -> None:
    s1, s2 = _scene(tmp_path, 32, 32)
    small = write(tmp_path / 'small.tif', noise('s2', 7, 40))
    empty = write(tmp_path / 'empty.tif', np.full((13, 16, 16), np.nan, np.float32))
    model, out = GroundModel(S2), tmp_path / 'out'

    def run(path: Path | None = s2, products: Any = None, **kwargs: Any) -> None:
        map_scene(model, None, path, out, products, Options(**{'window': 16, **kwargs}))

    cases: list[tuple[str, dict[str, Any]]] = [
        ('multiple of the model', {'window': 30}),
        (r'small\.tif: 7 x 40 px is smaller than one patch', {'path': small}),
        ('batch_size=0', {'batch_size': 0}),
        ('components=2', {'components': 2}),
        ('block 3: the model has 3 blocks', {'block': 3}),
        (r"unknown products \['pcs'\]", {'products': ['pcs']}),
        ('no products', {'products': []}),
        ("'point' needs a point", {'products': ['point']}),
        (r'0, 0 is outside the scene', {'point': (0, 0)}),
        (r'empty\.tif: no pixel', {'path': empty}),
        ('segments=99', {'segments': 99}),
    ]
    for message, kwargs in cases:
        with pytest.raises(ValueError, match=message):
            run(**kwargs)
    with pytest.raises(ValueError, match='--s2'):
        map_scene(model, s1, None, out)
    with pytest.raises(FileNotFoundError, match=r'gone\.safetensors'):
        run(basis=tmp_path / 'gone.safetensors')
    with pytest.raises(ValueError, match=r's2_2018-02-24_\.tif: not a PCA basis'):
        run(basis=s2)


def _real_pairs(real: Path) -> dict[str, tuple[Path, Path, list[str] | None]]:
    """S1, S2, and names of S2's bands if the file has none."""
    crts, level_2a = real / 'crts_layout', [name for name in S2 if name != 'B10']
    name = '{}_ROIs1868_36_ImgNo_0_2019-09-1{}_patch_0.tif'
    terramind = real / 'terramind_examples'
    return {
        'crts': (
            crts / 'ROIs1868/36/S1/0' / name.format('s1', 7),
            crts / 'ROIs1868/36/S2/0' / name.format('s2', 8),
            None,
        ),
        'flood': (
            real / 'sen1floods11_sample/Spain_7370579_S1Hand.tif',
            real / 'sen1floods11_sample/Spain_7370579_S2Hand.tif',
            None,
        ),
        'terramind': (
            terramind / 'S1RTC/282D_485L_3_3.tif',
            terramind / 'S2L2A/282D_485L_3_3.tif',
            level_2a,
        ),
    }


@pytest.mark.parametrize('place', ['crts', 'flood', 'terramind'])
def test_real_pairs(shared_data: Path, tmp_path: Path, place: str) -> None:
    """Real scenes on different grids, with a two-sensor model."""
    s1, s2, names = _real_pairs(shared_data / 'real')[place]
    if not s1.exists():
        pytest.skip(f'needs {s1} of the shared data')
    bands = [*S1, *(names or S2)]
    model = timm.create_model(
        'geofm_vit_tiny_patch16_linear', in_chans=len(bands), bands=bands, depth=2
    )
    options = Options(window=96, point=_middle(s2))
    files = map_scene(
        model, s1, s2, tmp_path, EVERY, options, names=None if names is None else {'s2': names}
    )
    _check_grid(files, s2, 16)
    for name in RASTERS:
        assert cog_problems(files[name]) == []
        with rasterio.open(files[name]) as src:
            if name == 'attention':
                pixels = src.read(masked=True).compressed()
            if name != 'point':
                assert src.read_masks().any()
    assert (pixels > 0).all()
    # CLS and registers get some attention, so patches get slightly less than uniform attention.
    assert 0.5 < pixels.mean() < 1
