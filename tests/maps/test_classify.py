"""Maps from a few labels, compared with scikit-learn, NumPy and shapely."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import rasterio
import shapely
from rasterio.transform import Affine
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from geofm.cli import main
from geofm.datasets.labels import open_labels
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend
from geofm.maps.few_labels.classify import Fitting, classify_scenes
from geofm.maps.few_labels.cross_validation import band_statistics, blocks_of, folds_of
from geofm.maps.few_labels.heads import Head, Method
from geofm.maps.few_labels.samples import samples_on
from geofm.maps.make.embedding_files import Embeddings
from geofm.maps.make.embeddings import write_embeddings
from geofm.maps.make.windows import Floats, Strip
from geofm.maps.make.writer import patch_grid, write_patches
from geofm.sensors import DEFAULT_SENSORS, SENSORS
from tests.maps.scenes import NORTH_UP, UTM, noise, write

HEIGHT, WIDTH, DIMENSIONS, PATCH = 30, 40, 12, 4
SCENE = Grid(UTM, NORTH_UP, HEIGHT * PATCH, WIDTH * PATCH)
PATCHES = patch_grid(SCENE, PATCH)
METHODS: Sequence[Method] = get_args(Method)
TAGS = {'weights_sha256': 'a' * 64, 'model': 'vit'}


def truth(classes: int = 3) -> npt.NDArray[np.intp]:
    """Stripes of classes, 0 to *classes* - 1."""
    return np.arange(WIDTH)[None] // 3 % classes + np.zeros((HEIGHT, 1), np.intp)


def tokens(classes: int = 3, seed: int = 0) -> Floats:
    """Embeddings that partly separate the classes, without data in a corner."""
    generator = np.random.default_rng(seed)
    centres = 0.8 * np.random.default_rng(9).standard_normal((classes, DIMENSIONS))
    values = centres[truth(classes)].transpose(2, 0, 1) * 3
    values = 5 + values + generator.standard_normal((DIMENSIONS, HEIGHT, WIDTH)) * 2
    values[:, :2, :3] = np.nan
    return values.astype(np.float32)


def embedding(folder: Path, values: Floats, name: str = 'a', weights: str = 'a' * 64) -> Path:
    path = folder / f'{name}_embedding.parquet'
    valid = np.isfinite(values).all(axis=0)
    strips = [Strip(values, valid)]
    write_embeddings(path, PATCHES, strips, tags={**TAGS, 'weights_sha256': weights})
    return path


def points(folder: Path, count: int = 90, classes: int = 3, seed: int = 1) -> Path:
    """Points in longitude and latitude, at most one per patch."""
    generator = np.random.default_rng(seed)
    flat = generator.choice(HEIGHT * WIDTH, count, replace=False)
    rows, cols = flat // WIDTH, flat % WIDTH
    x, y = PATCHES.transform @ (cols + 0.5, rows + 0.3)
    names = [f'class {chr(97 + k)}' for k in truth(classes)[rows, cols]]
    frame = gpd.GeoDataFrame({'class': names}, geometry=gpd.points_from_xy(x, y), crs=32630)
    path = folder / 'points.gpkg'
    frame.to_crs(4326).to_file(path)
    return path


def read(path: Path) -> npt.NDArray[np.float32]:
    with rasterio.open(path) as src:
        pixels: npt.NDArray[np.float32] = src.read()
    return pixels


@pytest.mark.parametrize('classes', [2, 3])
@pytest.mark.parametrize('method', METHODS)
def test_maps_equal_scikit_learn(tmp_path: Path, method: Method, classes: int) -> None:
    """Every patch has the class and the probabilities of scikit-learn's pipeline."""
    values = tokens(classes)
    path, labels = embedding(tmp_path, values), points(tmp_path, classes=classes)
    classify_scenes([path], tmp_path / 'out', Fitting(labels, method=method))
    samples = samples_on(open_labels(labels), PATCHES)
    vectors = values.astype(np.float64)[:, samples.rows, samples.cols].T
    known = np.isfinite(vectors).all(axis=1)
    pipelines = {
        'logistic': make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        'ridge': make_pipeline(StandardScaler(), RidgeClassifier()),
        'knn': KNeighborsClassifier(5, metric='cosine'),
    }
    fitted = pipelines[method].fit(vectors[known], samples.values[known])
    there = np.isfinite(values).all(axis=0)
    every = values[:, there].T
    found = read(tmp_path / 'out' / 'a_classes.tif')[0]
    np.testing.assert_array_equal(found[there], fitted.predict(every))
    assert (found[~there] == NO_CLASS).all()
    shares = read(tmp_path / 'out' / 'a_class_probability.tif')
    assert np.isnan(shares[:, ~there]).all()
    np.testing.assert_allclose(shares[:, there].sum(axis=0), 1, atol=1e-6)
    np.testing.assert_array_equal(shares[:, there].argmax(axis=0), found[there])
    if method != 'ridge':
        np.testing.assert_allclose(shares[:, there].T, fitted.predict_proba(every), atol=1e-5)
    uncertainty = read(tmp_path / 'out' / 'a_uncertainty.tif')[0, there]
    p = np.maximum(shares[:, there].astype(np.float64), 1e-30)
    wanted = -(p * np.log(p)).sum(axis=0) / np.log(classes)
    np.testing.assert_allclose(uncertainty, wanted, atol=1e-5)


@pytest.mark.parametrize('method', METHODS)
def test_saved_head_gives_the_same_bytes(tmp_path: Path, method: Method) -> None:
    """A head from a file makes the same maps as when it was fitted."""
    path, labels = embedding(tmp_path, tokens()), points(tmp_path)
    classify_scenes([path], tmp_path / 'one', Fitting(labels, method=method))
    head = Head.load(tmp_path / 'one' / 'head.safetensors')
    made = classify_scenes([path], tmp_path / 'two', head)
    assert [file.suffix for file in made.files] == ['.tif', '.tif', '.tif', '.png']
    for file in made.files:
        assert file.read_bytes() == (tmp_path / 'one' / file.name).read_bytes()


def test_classes_lie_on_the_patches(tmp_path: Path) -> None:
    """Grid, colours, legend and tags."""
    path = embedding(tmp_path, tokens())
    classify_scenes([path], tmp_path, Fitting(points(tmp_path)))
    with rasterio.open(tmp_path / 'a_classes.tif') as src:
        assert Grid.of(src) == PATCHES
        legend = Legend.from_tags(src.tags())
        assert legend is not None
        assert legend.names == ('class a', 'class b', 'class c')
        assert {value: src.colormap(1)[value][:3] for value in legend.values} == legend.colors
        assert src.tags()['weights_sha256'] == 'a' * 64
        assert src.tags(ns='IMAGE_STRUCTURE')['LAYOUT'] == 'COG'


def test_raster_of_embeddings_gives_the_same_map(tmp_path: Path) -> None:
    """GeoTIFF or GeoParquet."""
    values = tokens()
    path, labels = embedding(tmp_path, values), points(tmp_path)
    valid = np.isfinite(values).all(axis=0).repeat(PATCH, 0).repeat(PATCH, 1)
    tif = tmp_path / 'a_embedding.tif'
    names = [str(i) for i in range(DIMENSIONS)]
    write_patches(tif, SCENE, PATCH, names, [Strip(values, valid)], TAGS)
    for name, file in (('one', path), ('two', tif)):
        classify_scenes([file], tmp_path / name, Fitting(labels))
    for name in ('a_classes.tif', 'a_class_probability.tif'):
        first, second = (read(tmp_path / part / name) for part in ('one', 'two'))
        np.testing.assert_array_equal(first, second)


def test_raster_of_int8(tmp_path: Path) -> None:
    """Scales and offsets are applied; patches with nodata in a band have no embedding."""
    codes = np.random.default_rng(0).integers(-127, 128, (DIMENSIONS, 5, 6)).astype(np.int8)
    codes[:, 1, 2] = codes[3, 4, 4] = -128
    scales, offsets = np.linspace(0.1, 3, DIMENSIONS), np.linspace(-1, 1, DIMENSIONS)
    path = write(tmp_path / 'a_embedding.tif', codes, nodata=-128)
    with rasterio.open(path, 'r+') as dst:
        dst.scales, dst.offsets = tuple(scales), tuple(offsets)
        dst.update_tags(**TAGS)
    rows, cols = (part.ravel() for part in np.mgrid[:5, :6])
    found = Embeddings.open(path).at(rows, cols)
    wanted = (codes * scales[:, None, None] + offsets[:, None, None]).reshape(DIMENSIONS, -1).T
    wanted[[1 * 6 + 2, 4 * 6 + 4]] = np.nan
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_labels_without_data_are_counted(tmp_path: Path) -> None:
    """A point is left out if it lies on no scene, or where no scene has data."""
    first = embedding(tmp_path, tokens())
    frame = gpd.read_file(points(tmp_path))
    x, y = PATCHES.transform @ (np.array([1.5, -3.5, 200.5]), np.array([0.5, 2.5, 2.5]))
    more = gpd.GeoDataFrame(
        {'class': ['class a'] * 3}, geometry=gpd.points_from_xy(x, y), crs=UTM.to_wkt()
    )
    both = pd.concat([frame, more.to_crs(4326)])
    both.to_file(tmp_path / 'more.gpkg')
    on_data = np.isfinite(tokens()).all(axis=0)
    rows, cols = np.floor(np.stack(PATCHES.pixel_of(*_xy(frame)))).astype(int)
    missing = int((~on_data[rows, cols]).sum())
    made = classify_scenes([first], tmp_path / 'out', Fitting(tmp_path / 'more.gpkg'))
    note = f'{3 + missing} of {len(both)} points lie on no patch with data and are left out.'
    assert note in made.notes
    assert note in json.loads((tmp_path / 'out' / 'classify.json').read_text())['notes']


def _xy(frame: gpd.GeoDataFrame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    moved = frame.geometry.to_crs(UTM.to_wkt())
    return moved.x.to_numpy(), moved.y.to_numpy()


def test_folds_share_no_block() -> None:
    """No block is in both training and test samples, and each sample is tested once."""
    generator = np.random.default_rng(0)
    rows, cols = generator.integers(0, HEIGHT, 200), generator.integers(0, WIDTH, 200)
    blocks = blocks_of(PATCHES, rows, cols, 0.3)
    folds = folds_of(blocks)
    assert len(folds) == 5
    for train, test in folds:
        assert not {*map(tuple, blocks[train])} & {*map(tuple, blocks[test])}
    tested = np.concatenate([test for _, test in folds])
    np.testing.assert_array_equal(np.sort(tested), np.arange(200))
    assert folds_of(blocks_of(PATCHES, rows, cols, 500)) == []


def test_blocks_have_their_size_in_any_crs() -> None:
    """Blocks are about as large as requested, and the same in another CRS."""
    rows, cols = (part.ravel() for part in np.mgrid[:HEIGHT, :WIDTH])
    blocks = blocks_of(PATCHES, rows, cols, 0.4)
    counts = np.unique(blocks, axis=0, return_counts=True)[1]
    # Patches of 40 m: inner blocks have 10 x 10.
    assert abs(counts.max() - 100) <= 20
    # A patch at the same place in the next UTM zone.
    x, y = PATCHES.transform @ (cols[777] + 0.5, rows[777] + 0.5)
    moved = gpd.GeoSeries([shapely.Point(x, y)], crs=32630).to_crs(32629)
    place = rasterio.transform.Affine(10, 0, moved.x[0] - 5, 0, -10, moved.y[0] + 5)
    other = Grid(rasterio.crs.CRS.from_epsg(32629), place, 1, 1)
    zero = np.zeros(1, np.intp)
    np.testing.assert_array_equal(blocks_of(other, zero, zero, 0.4)[0], blocks[777])


def test_cross_validation_equals_scikit_learn(tmp_path: Path) -> None:
    """The reported accuracy is that of GroupKFold with the pipeline."""
    values = tokens()
    path, labels = embedding(tmp_path, values), points(tmp_path)
    made = classify_scenes([path], tmp_path / 'out', Fitting(labels, block=0.3))
    samples = samples_on(open_labels(labels), PATCHES)
    vectors = values[:, samples.rows, samples.cols].T.astype(np.float64)
    known = np.isfinite(vectors).all(axis=1)
    vectors, targets = vectors[known], samples.values[known]
    blocks = blocks_of(PATCHES, samples.rows, samples.cols, 0.3)[known]
    groups = np.unique(blocks, axis=0, return_inverse=True)[1].reshape(-1)
    right = 0
    for train, test in GroupKFold(5).split(vectors, groups=groups):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        right += (pipeline.fit(vectors[train], targets[train]).predict(vectors[test])
                  == targets[test]).sum()  # fmt: skip
    found = made.accuracy['embeddings']
    assert found.overall['accuracy'].value == pytest.approx(right / len(targets))
    assert found.blocks == len(np.unique(groups))
    entry = json.loads((tmp_path / 'out' / 'classify.json').read_text())
    assert entry['accuracy']['embeddings'] == found.as_json()
    assert sum(entry['samples'].values()) == len(targets)


def test_samples(tmp_path: Path) -> None:
    """Majority of the points in a patch, polygons by centres, points before polygons."""

    def at(row: float, col: float) -> shapely.Point:
        return shapely.Point(*(PATCHES.transform @ (col, row)))

    corners = [at(10, 10), at(10, 14.6), at(13.4, 14.6), at(13.4, 10)]
    geometry = [shapely.Polygon(corners), *(at(2.2, 2.1 + 0.2 * k) for k in range(3)),
                at(11.5, 12.5), at(-1, 5), at(4.5, 39.9)]  # fmt: skip
    names = ['a', 'b', 'c', 'c', 'b', 'a', 'a']
    path = tmp_path / 'labels.geojson'
    gpd.GeoDataFrame({'class': names}, geometry=geometry, crs=32630).to_crs(4326).to_file(path)
    found = samples_on(open_labels(path), PATCHES)
    wanted = {(row, col): 0 for row in (10, 11, 12) for col in range(10, 15)}
    wanted |= {(2, 2): 2, (11, 12): 1, (4, 39): 0}
    assert dict(zip(zip(found.rows, found.cols, strict=True), found.values, strict=True)) == wanted
    assert found.conflicts == 1
    wanted_points = [82, 82, 82, 11 * 40 + 12, -1, 4 * 40 + 39]
    assert found.points.tolist() == wanted_points


def test_baseline_equals_numpy(tmp_path: Path) -> None:
    """Mean and standard deviation of each band over the pixels of a patch."""
    key = DEFAULT_SENSORS[-1]
    pixels = noise(key, *SCENE.shape)
    names = [band.name for band in SENSORS[key].bands]
    path = write(tmp_path / 'scene.tif', pixels, descriptions=names)
    rows, cols = np.array([0, 3, 3, 29]), np.array([39, 2, 7, 0])
    found = band_statistics({key: path}, PATCHES, rows, cols)
    for row, col, statistics in zip(rows, cols, found, strict=True):
        patch = pixels[:, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4].reshape(len(names), -1)
        np.testing.assert_allclose(
            statistics, np.concatenate([patch.mean(axis=1), patch.std(axis=1)]), rtol=1e-4
        )
    # With a stride, cells may begin before the scene.
    start = PATCHES.transform @ Affine.translation(-0.5, -0.5)
    shifted = band_statistics({key: path}, replace(PATCHES, transform=start), rows, cols)
    cell = pixels[:, 10:14, 26:30].mean(axis=(1, 2))
    np.testing.assert_allclose(shifted[2, : len(names)], cell, rtol=1e-4)
    wrong = write(tmp_path / 'other.tif', pixels[:, :, :-8], descriptions=names)
    with pytest.raises(ValueError, match='pixels do not match the patch grid'):
        band_statistics({key: wrong}, PATCHES, rows, cols)


def test_baseline_of_a_sensor_that_shares_names_of_bands(tmp_path: Path) -> None:
    """Bands are those of the given sensor, not of another sensor with the same band names."""
    key = 'landsat'
    names = [band.name for band in SENSORS[key].bands]
    pixels = 1000 * np.arange(1, 1 + len(names), dtype=np.float32)[:, None, None]
    pixels = np.broadcast_to(pixels, (len(names), *SCENE.shape)).copy()
    path = write(tmp_path / 'scene.tif', pixels, descriptions=names)
    found = band_statistics({key: path}, PATCHES, np.array([3]), np.array([2]))
    np.testing.assert_allclose(found[0, : len(names)], pixels[:, 0, 0], rtol=1e-4)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several scenes, the baseline of one scene, and a head that is used for another."""
    first, second = (embedding(tmp_path, tokens(seed=k), name) for k, name in enumerate('ab'))
    labels = points(tmp_path)
    key = DEFAULT_SENSORS[-1]
    names = [band.name for band in SENSORS[key].bands]
    raster = write(tmp_path / 'scene.tif', noise(key, *SCENE.shape), descriptions=names)
    out = tmp_path / 'out'
    main(['classify', str(first), '--labels', str(labels), '--output', str(out),
          '--block_km', '0.3', '--scene', f'{key}={raster}'])  # fmt: skip
    printed = capsys.readouterr().out
    assert 'band statistics' in printed
    assert (out / 'classify_band_statistics.png').exists()
    entry = json.loads((out / 'classify.json').read_text())
    scores = {n: e['overall']['accuracy']['value'] for n, e in entry['accuracy'].items()}
    assert scores['embeddings'] > 0.7 > scores['band statistics']
    main(['classify', str(first), str(second), '--head', str(out / 'head.safetensors'),
          '--output', str(tmp_path / 'next')])  # fmt: skip
    made = {path.name for path in (tmp_path / 'next').glob('*.tif')}
    kinds = ('classes', 'class_probability', 'uncertainty')
    assert made == {f'{name}_{kind}.tif' for name in 'ab' for kind in kinds}
    main(['classify', str(first), str(second), '--labels', str(labels), '--output', str(out)])
    assert 'needs the rasters' in capsys.readouterr().out


def test_wrong_inputs(tmp_path: Path) -> None:
    """Each error names the file and says what to do."""
    path, labels = embedding(tmp_path, tokens()), points(tmp_path)
    other = embedding(tmp_path, tokens(), 'b', 'b' * 64)
    (tmp_path / 'in').mkdir()
    twin = embedding(tmp_path / 'in', tokens())
    frame = gpd.read_file(labels)
    frame.geometry = frame.geometry.translate(20)
    frame.to_file(tmp_path / 'far.gpkg')
    frame = gpd.read_file(labels)
    frame[frame['class'] == 'class a'].to_file(tmp_path / 'one.gpkg')
    cases: list[tuple[list[Path], Fitting, str]] = [
        ([path, other], Fitting(labels), 'of different models'),
        ([path, twin], Fitting(labels), 'products of both would be named a_'),
        ([path], Fitting(tmp_path / 'far.gpkg'), r'far\.gpkg: no label lies on'),
        ([path], Fitting(tmp_path / 'one.gpkg'), r'one\.gpkg: labels of at least two classes'),
        ([path], Fitting(labels, column='kind'), r'points\.gpkg.*kind'),
        ([path], Fitting(labels, block=0), 'must be positive, in km'),
        ([], Fitting(labels), 'no embeddings'),
        ([labels], Fitting(labels), r'points\.gpkg: not a table of embeddings'),
        (
            [path, embedding(tmp_path, tokens(), 'c')],
            Fitting(labels, files={'x': path}),
            'a single scene',
        ),
    ]
    for paths, fitting, message in cases:
        with pytest.raises(ValueError, match=message):
            classify_scenes(paths, tmp_path / 'out', fitting)
    classify_scenes([path], tmp_path / 'out', Fitting(labels))
    head = Head.load(tmp_path / 'out' / 'head.safetensors')
    with pytest.raises(ValueError, match=r'b_embedding\.parquet: embeddings of another model'):
        classify_scenes([other], tmp_path / 'out', head)


def test_damaged_heads(tmp_path: Path) -> None:
    """Files that are not heads, and heads with inconsistent arrays, are an error."""
    path = tmp_path / 'head.safetensors'
    path.write_bytes(b'not one')
    with pytest.raises(ValueError, match=r'head\.safetensors: not a head'):
        Head.load(path)
    values = tokens()[:, 5].T
    head = Head.fit('logistic', values, truth()[5].astype(np.uint8), Legend.of(3))
    head.save(path)
    assert Head.load(path).predict(values).tolist() == head.predict(values).tolist()
    about = {'method': 'logistic', 'legend': json.dumps(Legend.of(3).entry()),
             'weights_sha256': '', 'model': ''}  # fmt: skip
    for name in ('mean', 'coef', 'classes'):
        save_file({**head.arrays, name: head.arrays[name][:-1]}, path, about)
        with pytest.raises(ValueError, match='not a head'):
            Head.load(path)
    save_file(head.arrays, path, {**about, 'method': 'forest'})
    with pytest.raises(ValueError, match='not a head'):
        Head.load(path)


def test_embeddings_without_a_model(tmp_path: Path) -> None:
    """A raster whose tags do not identify the model is an error."""
    path = write(tmp_path / 'a_embedding.tif', np.zeros((3, 8, 8), np.float32))
    with pytest.raises(ValueError, match='its model is unknown'):
        Embeddings.open(path)
