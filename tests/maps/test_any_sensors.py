"""Maps of scenes of other sensors than Sentinel-1 and Sentinel-2."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject

import geofm.commands.maps
from geofm.cli import main
from geofm.maps import map_scene, plot_products
from geofm.maps.scene import Scene, files_by_sensor
from geofm.maps.view.page import scene_layers
from geofm.sensors import SENSORS, SensorError, bands_of, load_sensors, registry

from ..registry import kept_registry
from .scenes import NORTH_UP, UTM, GroundModel, noise, write

HYPER = """
hyper:
  title: Hyperion
  quantity: reflectance
  unit: DN
  scale: 0.0001
  resampling: nearest
  bands:
    - {name: first, mean: 1000, std: 400}
    - {name: second, mean: 2000, std: 400}
    - {name: third, mean: 3000, std: 400}
"""


@pytest.fixture(autouse=True)
def hyper(tmp_path: Path) -> Iterator[Path]:
    """Definition of a sensor, not registered yet."""
    file = tmp_path / 'sensors.yaml'
    file.write_text(HYPER)
    with kept_registry():
        yield file


@pytest.fixture
def files(tmp_path: Path, hyper: Path) -> dict[str, Path]:
    """Sentinel-1 and a sensor from YAML on a grid of 10 m, elevation on one of 30 m."""
    load_sensors(hyper)
    coarse = NORTH_UP @ Affine.scale(3)
    return {
        's1': write(tmp_path / 'radar_2021-05-06.tif', noise('s1', 48, 72)),
        'dem': write(tmp_path / 'height.tif', noise('dem', 16, 24), transform=coarse),
        'hyper': write(
            tmp_path / 'hyper_2021-05-01.tif',
            noise('hyper', 48, 72),
            descriptions=('third', 'first', 'second'),
        ),
    }


def test_values_are_those_of_the_files(files: dict[str, Path]) -> None:
    with Scene(bands_of(['s1', 'dem', 'hyper']), files=files) as scene:
        assert scene.reference == 's1'
        sample = scene.read(0, 0, 48, 72)
    with rasterio.open(files['s1']) as src:
        np.testing.assert_array_equal(sample['image'][:2], src.read())
    with rasterio.open(files['hyper']) as src:
        np.testing.assert_array_equal(sample['image'][3:], src.read((2, 3, 1)))
    with rasterio.open(files['dem']) as src:
        expected = np.empty((48, 72), np.float32)
        reproject(
            src.read(1),
            expected,
            src_transform=src.transform,
            src_crs=UTM,
            dst_transform=NORTH_UP,
            dst_crs=UTM,
            resampling=Resampling.bilinear,
        )
    np.testing.assert_allclose(sample['image'][2], expected, rtol=1e-6)
    assert sample['valid'].all()
    day = int(np.datetime64('2021-05-06').astype(int))
    unknown = torch.iinfo(torch.int64).min
    assert sample['dates'].tolist() == [day, unknown, day - 5]


def test_the_grid_is_that_of_the_reference_sensor(files: dict[str, Path]) -> None:
    with Scene(bands_of(['s1', 'dem']), files=files, reference='dem') as scene:
        assert (scene.reference, scene.stem, scene.grid.shape) == ('dem', 'height', (16, 24))
    with pytest.raises(ValueError, match='reference sensor s2: it has no raster'):
        Scene(bands_of(['s1', 'dem']), files=files, reference='s2')


def test_files_by_sensor(files: dict[str, Path]) -> None:
    s1, dem = files['s1'], files['dem']
    assert files_by_sensor(s1, None, {'dem': dem}) == {'s1': s1, 'dem': dem}
    assert list(files_by_sensor(None, s1, {'dem': dem, 's1': s1})) == ['s1', 's2', 'dem']
    assert files_by_sensor(None, None, None) == {}
    with pytest.raises(ValueError, match='two rasters of the sensor s1'):
        files_by_sensor(s1, None, {'s1': dem})
    with pytest.raises(SensorError, match=r"'demm'.*did you mean 'dem'"):
        files_by_sensor(None, None, {'demm': dem})
    with Scene(bands_of(['s1', 'dem']), s1=s1, dem=dem) as scene:
        assert list(scene.rasters) == ['s1', 'dem']


def test_each_sensor_alone_makes_maps(files: dict[str, Path], tmp_path: Path) -> None:
    model = GroundModel(bands_of(['s1', 'dem', 'hyper']))
    for key, path in files.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            made = map_scene(
                model, output=tmp_path / key, products=['embedding'], scene={key: path}
            )
        said = [str(warning.message) for warning in caught]
        absent = [k for k in files if k != key]
        assert all(any(SENSORS[k].title in text for text in said) for k in absent)
        assert any('--scene dem=FILE' in text for text in said) == (key != 'dem')
        with rasterio.open(made['embedding']) as src:
            assert np.isfinite(src.read()).any()
    with pytest.raises(ValueError, match=r'no raster given for .*\(--s1\) or .*--scene dem=FILE'):
        map_scene(model, output=tmp_path, scene={'rgb': files['s1']})


def test_each_sensor_changes_the_map(files: dict[str, Path], tmp_path: Path) -> None:
    model = GroundModel(bands_of([*files]))

    def embedding(name: str, scene: dict[str, Path]) -> Any:
        made = map_scene(model, output=tmp_path / name, products=['embedding'], scene=scene)
        with rasterio.open(made['embedding']) as src:
            return src.read()

    whole = embedding('whole', files)
    for key, path in files.items():
        with rasterio.open(path) as src:
            pixels, transform, names = src.read(), src.transform, src.descriptions
        changed = write(
            tmp_path / f'changed_{path.name}',
            pixels + SENSORS[key].bands[0].std,
            transform=transform,
            descriptions=names,
        )
        assert not np.allclose(embedding(key, {**files, key: changed}), whole)


def test_commands_take_any_sensor(
    files: dict[str, Path],
    hyper: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = GroundModel(bands_of([*files]))
    monkeypatch.setattr(geofm.commands.maps, 'load_model', lambda *_: model)
    given = [f'--scene={key}={path}' for key, path in files.items()]
    given[1:2] = ['--scene', f'dem={files["dem"]}']
    common = [*given, '--sensors', str(hyper), '--output', f'{tmp_path}/out']
    main(['map', 'a.ckpt', *common, '--products', '[attention,pca]', '--dates', 'dem=2000-01-01'])
    main(['attention', '--checkpoint=a.ckpt', *common])
    main(['pca', '--checkpoint=a.ckpt', *common, '--reference-sensor', 'hyper'])
    main(['embed', '--checkpoint=a.ckpt', *common])
    main(['figure', f'{tmp_path}/out', *given, '--sensors', str(hyper)])
    main(['page', f'{tmp_path}/out', *given, f'--sensors={hyper}', '--name', 'radar_2021-05-06'])
    out = tmp_path / 'out'
    for name in (
        'radar_2021-05-06_attention.png',
        'radar_2021-05-06_figure.pdf',
        'radar_2021-05-06_embedding.parquet',
        'hyper_2021-05-01_pca.tif',
        'radar_2021-05-06_page/index.html',
    ):
        assert (out / name).exists(), sorted(path.name for path in out.iterdir())
    with rasterio.open(out / 'radar_2021-05-06_attention.tif') as src:
        assert src.tags()['dem'] == 'height.tif'
    capsys.readouterr()


def test_pictures_of_any_sensor(files: dict[str, Path]) -> None:
    figure = plot_products({}, scene=files)
    titles = [ax.get_title() for ax in figure.get_axes()]
    assert titles == ['Sentinel-1 VV, VH, VV/VH', 'Hyperion first, second, third',
                      'Elevation']  # fmt: skip
    layers = scene_layers(scene=files)
    assert [layer.name for layer in layers] == ['Radar', 'First, second, third', 'Elevation']
    assert [layer.raster for layer in layers] == [files['s1'], files['hyper'], files['dem']]


def test_bands_of_files_without_names(files: dict[str, Path], tmp_path: Path) -> None:
    plain = write(tmp_path / 'plain.tif', noise('hyper', 48, 72))
    names = {'hyper': ['third', 'second', 'hyper.first']}
    with Scene(bands_of(['hyper']), files={'hyper': plain}, names=names) as scene:
        read = scene.read(0, 0, 8, 8)['image'].numpy()
    with rasterio.open(plain) as src:
        np.testing.assert_array_equal(read, src.read((3, 2, 1))[:, :8, :8])
    with pytest.warns(UserWarning, match=r'name them with --scene_bands hyper=\[\.\.\.\]'):
        Scene(bands_of(['hyper']), files={'hyper': plain}).__exit__()


def test_a_checkpoint_contains_its_sensors(
    files: dict[str, Path], hyper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GroundModel(bands_of(['s1', 'hyper']))
    for channel in registry._sensors.pop('hyper').band_names:
        registry._channels.pop(channel)

    def load_model(*_: object) -> GroundModel:
        load_sensors(hyper)
        return model

    monkeypatch.setattr(geofm.commands.maps, 'load_model', load_model)
    given = [f'--scene={key}={files[key]}' for key in ('s1', 'hyper')]
    main(['attention', '--checkpoint=a.ckpt', *given, f'--output={tmp_path}/out'])
    assert (tmp_path / 'out' / 'radar_2021-05-06_attention.png').exists()
