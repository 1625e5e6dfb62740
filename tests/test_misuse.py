"""Misuse of commands: inputs are not overwritten, and errors take one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import from_origin
from safetensors.numpy import load_file, save
from shapely.affinity import translate
from shapely.geometry import MultiPolygon, Point, box
from torchgeo.tasks import SemanticSegmentation

from geofm.cli import main
from geofm.datasets.archive.splits import Blocks
from geofm.datasets.labels import LabelError, open_labels
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend, LegendError
from geofm.locking import locked_folder
from geofm.lonlat import turns
from geofm.maps.few_labels.heads import Head
from geofm.maps.few_labels.samples import samples_on
from geofm.maps.make.class_products import draw_classes
from geofm.maps.make.predict import PredictOptions
from geofm.models import CheckpointError
from geofm.models.checkpoints.files import read_file
from tests.maps.predicting import predict_scene
from tests.maps.scenes import write
from tests.maps.test_classify import embedding, points, tokens
from tests.maps.test_predict import BANDS, NAMES, per_pixel
from tests.maps.test_predict import save as save_task

UTM = CRS.from_epsg(32632)
NORTH_UP = from_origin(500_000, 5_000_000, 10, 10)

#: Grid across 180 degrees, with longitudes above 180.
ACROSS = Grid(CRS.from_epsg(4326), from_origin(179.998, 10, 1e-4, 1e-4), 30, 40)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(200, 3000, (3, 40, 36)).astype(np.uint16)
    return write(tmp_path / 's2.tif', pixels, UTM, NORTH_UP, BANDS, nodata=0)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = SemanticSegmentation('fcn', 'resnet18', in_channels=3, num_classes=3, num_filters=4)
    return save_task(net, tmp_path / 'task.ckpt', {'geofm_legend': Legend.of(NAMES).entry()})


def fails(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    """Run a command that must fail, and return its error of one line."""
    with pytest.raises(SystemExit):
        main([str(word) for word in command])
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith('geofm ')]
    assert not any('traceback' in line for line in lines)
    return line


def predict(task: Path, scene: Path, output: Path, *options: object) -> list[object]:
    return ['predict', task, '--s2', scene, '--output', output, '--window', 32, *options]


# -- inputs are not overwritten -----------------------------------------------------------------


def test_a_reference_is_not_overwritten(
    task: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the map would be compared with itself, and the reference would be lost."""
    truth = write(tmp_path / 's2_classes.tif', np.ones((1, 40, 36), np.uint8), UTM, NORTH_UP)
    before = truth.read_bytes()
    (tmp_path / 'link').symlink_to(tmp_path)
    for output in (tmp_path, tmp_path / 'link'):
        line = fails(capsys, *predict(task, scene, output, '--reference', truth))
        assert 's2_classes.tif' in line
        assert 'overwritten' in line
        assert truth.read_bytes() == before
    main([str(w) for w in predict(task, scene, tmp_path / 'maps', '--reference', truth)])
    assert truth.read_bytes() == before


@pytest.mark.parametrize('options', [['--reference', 'none.tif'], ['--simplify', -1]])
def test_errors_are_reported_before_a_scene_is_mapped(
    task: Path,
    scene: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
) -> None:
    fails(capsys, *predict(task, scene, tmp_path / 'maps', *options))
    assert not list(tmp_path.glob('maps/*.tif'))


@pytest.mark.parametrize('product', ['classes', 'class_probability', 'uncertainty'])
def test_labels_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], product: str
) -> None:
    path = embedding(tmp_path, tokens())
    labels = write(tmp_path / f'a_{product}.tif', np.ones((1, 30, 30), np.uint8))
    before = labels.read_bytes()
    line = fails(capsys, 'classify', path, '--labels', labels, '--output', tmp_path)
    assert labels.name in line
    assert 'overwritten' in line
    assert labels.read_bytes() == before
    assert not (tmp_path / 'head.safetensors').exists()


def test_a_checkpoint_is_not_overwritten_by_its_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / 'last.ckpt'
    path.write_bytes(b'all that training needs to go on')
    assert 'overwritten' in fails(capsys, 'export', path, tmp_path / '.' / 'last.ckpt')
    assert path.read_bytes() == b'all that training needs to go on'


def test_an_output_folder_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / 'maps').write_text('mine')
    for folder in (tmp_path / 'maps', tmp_path / 'maps' / 'deeper'):
        with (
            pytest.raises(NotADirectoryError, match=r'maps.*choose another output'),
            locked_folder(folder),
        ):
            pass
    assert (tmp_path / 'maps').read_text() == 'mine'


# -- other rasters of the same model -----------------------------------------------------------


def test_only_embeddings_are_compared_or_classified(
    tmp_path: Path, scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class maps also have a tag with their model, but their cosine is meaningless."""
    main(['classify', str(embedding(tmp_path, tokens())), '--labels', str(points(tmp_path)),
          '--output', str(tmp_path / 'maps')])  # fmt: skip
    predict_scene(per_pixel(), {'s2': scene}, tmp_path / 'maps', options=PredictOptions(48))
    capsys.readouterr()
    for name in ('a_class_probability.tif', 'a_classes.tif', 's2_classes.tif'):
        path = tmp_path / 'maps' / name
        line = fails(capsys, 'change', path, path, '--output', tmp_path / 'change')
        assert f'{path}: not an embedding' in line
        line = fails(capsys, 'classify', path, '--labels', points(tmp_path))
        assert f'{path}: not an embedding' in line
    assert not list(tmp_path.glob('change/*.tif'))


# -- labels across 180 degrees -----------------------------------------------------------------


def test_turns() -> None:
    assert turns(-180, 180) == turns(10, 20) == (0,)
    assert turns(179.9, 180.1) == (0, 1)
    assert turns(-180.1, -179.9) == (-1, 0)
    assert turns(190, 200) == turns(180, 190) == (1,)


def test_features_on_both_sides_of_180_degrees(tmp_path: Path) -> None:
    """They are shifted to the longitudes of the grid."""
    west = [Point(179.99905, 9.9991), box(179.9985, 9.9975, 180, 9.9985)]
    east = [Point(-179.99935, 9.9991), box(-180, 9.9978, -179.9995, 9.9988)]
    both = [
        MultiPolygon([box(179.9998, 9.9972, 180, 9.9974), box(-180, 9.9972, -179.9998, 9.9974)])
    ]
    shapes = [*west, *east, *both]
    frame = gpd.GeoDataFrame({'class': range(5)}, geometry=shapes, crs=4326)
    frame.to_file(tmp_path / 'labels.gpkg')
    labels = open_labels(tmp_path / 'labels.gpkg')
    unrolled = [
        *west,
        *(translate(shape, 360) for shape in east),
        box(179.9998, 9.9972, 180.0002, 9.9974),
    ]
    wanted = rasterize(
        zip(unrolled, range(5), strict=True),
        ACROSS.shape,
        NO_CLASS,
        transform=ACROSS.transform,
        dtype='uint8',
    )
    assert len(np.unique(wanted)) == 6
    np.testing.assert_array_equal(labels.classes_on(ACROSS), wanted)
    found = samples_on(labels, ACROSS)
    np.testing.assert_array_equal(found.values, wanted[wanted != NO_CLASS])
    assert (found.points >= 0).all()


def test_rasters_on_both_sides_of_180_degrees(tmp_path: Path) -> None:
    """A raster across 180 degrees has labels on both sides."""
    zone = CRS.from_epsg(32760)
    # 180 degrees are at an easting of about 820 km at 16.5 degrees south.
    across = from_origin(815_000, 8_172_000, 100, 100)
    values = np.random.default_rng(0).integers(0, 5, (1, 60, 100)).astype(np.uint8)
    first = write(tmp_path / 'a.tif', values, zone, across)
    second = write(tmp_path / 'b.tif', values[:, :9, :9], zone, from_origin(300_000, 8e6, 100, 100))
    beyond = Grid(zone, across, 60, 100).crop(20, 80, 10, 10)
    assert beyond.footprint(CRS.from_epsg(4326)).bounds[0] < -179
    labels = open_labels([first, second])
    np.testing.assert_array_equal(labels.classes_on(beyond), values[0, 20:30, 80:90])


def test_a_polygon_that_cannot_be_transformed_is_reported(tmp_path: Path) -> None:
    """For example, a polygon with swapped longitudes and latitudes."""
    frame = gpd.GeoDataFrame({'class': [0]}, geometry=[box(45, 100, 46, 101)], crs=4326)
    frame.to_file(tmp_path / 'world.gpkg')
    labels = open_labels(tmp_path / 'world.gpkg')
    with pytest.warns(UserWarning, match=r'world.gpkg: 1 of 1 features'):
        labels.classes_on(Grid(UTM, NORTH_UP, 4, 4))


# -- classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'names', [['', 'a'], ['a\nb', 'a'], [f'class {i}' for i in range(300)]], ids=len
)
def test_errors_in_class_names_name_the_file(tmp_path: Path, names: list[str]) -> None:
    geometry = [Point(500_005 + 10 * i, 4_999_995) for i in range(len(names))]
    path = tmp_path / 'labels.parquet'
    gpd.GeoDataFrame({'class': names}, geometry=geometry, crs=32632).to_parquet(path)
    with pytest.raises(LabelError, match=r"labels.parquet: column 'class'"):
        _ = open_labels(path).legend


@pytest.mark.parametrize('value', ['1e400', '1.5', '"1"', 'true', 'null', '[1]'])
def test_values_of_a_legend_are_whole_numbers(value: str) -> None:
    entry = json.loads(f'[{{"value": {value}, "name": "a", "color": [1, 2, 3]}}]')
    with pytest.raises(LegendError, match='not a whole number'):
        Legend.from_entry(entry)


def test_every_class_is_in_the_legend_of_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its name is special in Matplotlib, or long."""
    from matplotlib.figure import Figure

    shown: list[str] = []

    def remember(figure: Figure, *args: Any, **kwargs: Any) -> None:
        legend = figure.axes[0].get_legend()
        assert legend is not None
        shown.extend(text.get_text() for text in legend.get_texts())
        plain(figure, *args, **kwargs)

    plain = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', remember)
    names = ['_water', r'$\frac{$', '[/x]', 'x' * 1000]
    raster = write(tmp_path / 'classes.tif', np.arange(4, dtype=np.uint8).reshape(1, 2, 2))
    draw_classes(raster, tmp_path / 'picture.png', Legend.of(names))
    assert shown == [*(f'{name}  25.0 %' for name in names[:3]), f'{"x" * 57}...  25.0 %']
    with rasterio.open(tmp_path / 'picture.png') as src:
        assert src.width < 2000


# -- damaged files -----------------------------------------------------------------------------


def heads() -> Iterator[tuple[str, dict[str, Any]]]:
    yield 'coefficients of one dimension', {'coef': np.zeros(12)}
    yield 'one class', {'classes': np.array(1, np.uint8)}
    yield 'a class twice', {'classes': np.zeros(3, np.uint8)}
    yield (
        'value beyond all numbers',
        {'legend': '[{"value": 1e400, "name": "a", "color": [1, 2, 3]}]'},
    )


@pytest.mark.parametrize('changed', [c for _, c in heads()], ids=[name for name, _ in heads()])
def test_damaged_heads(tmp_path: Path, changed: dict[str, Any]) -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 12), np.float32)
    values = np.arange(30, dtype=np.uint8) % 3
    path = tmp_path / 'head.safetensors'
    Head.fit('logistic', vectors, values, Legend.of(NAMES), 'a' * 64).save(path)
    assert Head.load(path).dimensions == 12
    about = {
        'method': 'logistic',
        'legend': json.dumps(Legend.of(NAMES).entry()),
        'weights_sha256': 'a' * 64,
        'model': '',
    }
    arrays = load_file(path) | {k: v for k, v in changed.items() if k != 'legend'}
    path.write_bytes(save(arrays, about | {k: v for k, v in changed.items() if k == 'legend'}))
    with pytest.raises(ValueError, match=r'head.safetensors: not a head'):
        Head.load(path)


def test_a_truncated_checkpoint(task: Path) -> None:
    content = task.read_bytes()
    for part in (100, len(content) // 2, len(content) - 10):
        task.write_bytes(content[:part])
        with pytest.raises(CheckpointError, match=r'task.ckpt: .*damaged or truncated'):
            read_file(task)


# -- numbers out of range ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['--window', 0], 'window=0 is not positive'),
        (['--window', 32 * 10**5], 'out of memory'),
        (['--device', 'gpu'], 'no such device'),
        (['--block_pixels', 0, '--reference', 'truth.tif'], 'at least one pixel'),
    ],
)
def test_options_out_of_range(
    task: Path,
    scene: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    said: str,
) -> None:
    assert said in fails(capsys, *predict(task, scene, tmp_path / 'maps', *options))
    assert not (tmp_path / 'maps').exists()


def test_blocks_smaller_than_a_metre() -> None:
    with pytest.raises(ValueError, match='must be at least'):
        Blocks(1e-9)
