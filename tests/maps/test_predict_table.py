"""Mapping every scene of a table by one command."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
import pytest
import rasterio
import timm
import torch
from safetensors import safe_open
from sklearn.metrics import accuracy_score
from torchgeo.tasks import SemanticSegmentation

from geofm.cli import main
from geofm.datasets import LAND_COVER, write_sample_scenes
from geofm.datasets.splitting import SplitRule
from geofm.datasets.table import RasterTable
from geofm.legend import NO_CLASS, Legend
from geofm.maps.make.predict import PredictOptions
from geofm.maps.scene import TableScenes
from geofm.sample import DEFAULT_ROIS
from geofm.sensors import bands_of, load_sensors
from geofm.tasks.fine_tuned import load_fine_tuned, logits, without_sensors
from tests.maps.predicting import predict_scene
from tests.maps.test_predict import save
from tests.registry import kept_registry

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = ROOT / 'configs' / 'layouts' / 'scenes_landcover.yaml'
SENSORS = ROOT / 'configs' / 'sensors' / 'landcover.yaml'
BANDS = bands_of(['s1', 's2'])
SIDE = 96


@pytest.fixture(scope='module')
def source(module_path: Path) -> Path:
    """Scenes of three places and two dates, their table, and a checkpoint of random weights."""
    write_sample_scenes(module_path / 'scenes', 'scene', DEFAULT_ROIS[:3], 2, SIDE)
    torch.manual_seed(0)
    task = SemanticSegmentation(
        'segformer', 'geofm_vit_nano_patch16_linear', in_channels=15, num_classes=8
    )
    legend = Legend.of([c.name for c in LAND_COVER]).entry()
    save(task, module_path / 'task.ckpt', {'geofm_legend': legend, 'input': None})
    return module_path


@pytest.fixture(autouse=True)
def land_cover() -> Iterator[None]:
    """The sensor of the classes."""
    with kept_registry():
        load_sensors(SENSORS)
        yield


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of the source, whose files may be changed."""
    copied = shutil.copytree(source, tmp_path / 'copy')
    index(copied)
    return copied


def index(folder: Path) -> None:
    table = ['--output', str(folder / 'table.parquet')]
    main(['index', str(folder / 'scenes'), '--layout', str(LAYOUT), *table])


def predict(folder: Path, *options: str) -> None:
    command = ['predict', str(folder / 'task.ckpt'), '--table', str(folder / 'table.parquet')]
    if '--products' not in options:
        options = ('--products', '[classes]', *options)
    main([*command, '--output', str(folder / 'maps'), '--window', '96', *options])


def pixels(path: Path) -> npt.NDArray[Any]:
    with rasterio.open(path) as src:
        values: npt.NDArray[Any] = src.read(1)
    return values


def states(folder: Path) -> dict[str, int]:
    """Modification time of each map."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob('maps/*/*_classes.tif')}


def test_every_scene_is_mapped_once_despite_failures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = TableScenes(folder / 'table.parquet', BANDS)
    assert len(scenes) == len(set(scenes.names)) == 6
    broken = folder / 'scenes' / 'europa_1868_121'
    victim = min(broken.glob('s2_*.tif'))
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r'1 of 6 scenes failed, the others are done') as error:
        predict(folder)
    assert error.value.code == 1
    said = capsys.readouterr().out
    assert said.count('failed: ') == 1
    assert victim.name in said
    before = states(folder)
    assert len(before) == 5
    assert set(before) < set(scenes.names)
    # Each scene equals the prediction for its files.
    task = load_fine_tuned(folder / 'task.ckpt')
    name = next(name for name in before if name.startswith('america'))
    place, _, day = name.rpartition('_')
    files = {'s2': folder / 'scenes' / place / f's2_{day.replace("-", "")}.tif'}
    (number,) = (i for i, n in enumerate(scenes.names) if n == name)
    files['s1'] = files['s2'].with_name(scenes.scene(number).tags()['s1'])
    alone = predict_scene(task, files, folder / 'alone', ['classes'], PredictOptions(96))
    found = folder / 'maps' / name / f'{name}_classes.tif'
    assert (pixels(found) == pixels(alone['classes'])).all()
    with rasterio.open(found) as src, rasterio.open(files['s2']) as scene:
        assert (src.crs, src.transform, src.shape) == (scene.crs, scene.transform, scene.shape)
        assert src.tags()['s2_date'] == day
    # After the file is repaired, only its scene is mapped.
    victim.write_bytes(content)
    predict(folder, '--reference', 'landcover.class', '--block_pixels', '48')
    assert '6 of 6 scenes are mapped, 5 of them earlier' in capsys.readouterr().out
    after = states(folder)
    assert before.items() <= after.items()
    assert set(after) == set(scenes.names)
    check_pooled(folder)
    # Other options make another map.
    predict(folder, '--overlap', '0.2', '--place', 'america_1868_36')
    assert {n for n, t in states(folder).items() if t != after[n]} == {
        n for n in scenes.names if n.startswith('america_1868_36')
    }


def check_pooled(folder: Path) -> None:
    """The accuracy is over all scenes, and the dates of a place share blocks."""
    truth, guess, blocks = [], [], set()
    for path in folder.glob('maps/*/*_classes.tif'):
        place = path.parent.name.rpartition('_')[0]
        labels, classes = pixels(folder / 'scenes' / place / 'land_cover.tif'), pixels(path)
        both = (classes != NO_CLASS) & (labels != NO_CLASS)
        truth.append(labels[both])
        guess.append(classes[both])
        rows, cols = np.nonzero(both)
        blocks |= {(place, r, c) for r, c in zip(rows // 48, cols // 48, strict=True)}
    said = json.loads((folder / 'maps' / 'accuracy.json').read_text())
    expected = accuracy_score(np.concatenate(truth), np.concatenate(guess))
    assert said['overall']['accuracy']['value'] == pytest.approx(expected)
    assert said['samples'] == sum(map(len, truth))
    assert said['blocks'] == len(blocks) == 12


def test_the_split_is_that_of_training(source: Path) -> None:
    table = source / 'by_split.csv'
    rows = ['path,sensor,datetime,place,split']
    for path in sorted(source.glob('scenes/*/s[12]_*.tif')):
        sensor, day = path.stem.split('_')
        part = 'test' if path.parent.name == 'europa_1868_121' else 'train'
        rows.append(f'{path},{sensor},{day},{path.parent.name},{part}')
    table.write_text('\n'.join(rows) + '\n')
    scenes = TableScenes(table, BANDS, split='test')
    assert {name.rpartition('_')[0] for name in scenes.names} == {'europa_1868_121'}
    with pytest.raises(ValueError, match='a split by blocks divides scenes'):
        TableScenes(table, BANDS, split='test', split_by=SplitRule('blocks'))
    with pytest.raises(ValueError, match="the place 'europe_1868_121'; did you mean 'europa"):
        TableScenes(table, BANDS, places=['europe_1868_121'])
    with pytest.raises(ValueError, match='no scene belongs to the chosen places'):
        TableScenes(table, BANDS, split='test', places=['america_1868_36'])


def test_scenes_without_a_sensor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / 'scenes' / 'europa_1868_121').glob('s1_*.tif'):
        path.unlink()
    index(folder)
    predict(folder)
    said = capsys.readouterr().out
    assert 'left out: 2 samples without s1' in said
    assert '4 of 4 scenes are mapped' in said
    place = ['--place', 'europa_1868_121', '--products', '[probabilities]']
    with pytest.warns(UserWarning, match='predicted without Sentinel-1'):
        predict(folder, *place, '--missing_sensors')
    # The backbone gets the same missing sensor.
    task = load_fine_tuned(folder / 'task.ckpt')
    scenes = TableScenes(
        folder / 'table.parquet', BANDS, places=['europa_1868_121'], missing_sensors=True
    )
    scene = scenes.scene(0)
    assert scene.absent == ('s1',)
    sample = scene.read(0, 0, SIDE, SIDE)
    image = task.statistics.normalize(BANDS)(sample)['image'][None]
    seen = []
    for pixels_of_s1 in (0.0, 3.0):
        image[:, :2] = pixels_of_s1
        with torch.inference_mode(), without_sensors(task, ['s1']):
            seen.append(logits(task, image).softmax(dim=1)[0].numpy())
    np.testing.assert_array_equal(seen[0], seen[1])
    file = folder / 'maps' / scene.stem / f'{scene.stem}_probabilities.tif'
    with rasterio.open(file) as src:
        found = src.read() / 254
    valid = sample['valid'].numpy()
    assert np.abs(found - seen[0])[:, valid].max() <= 0.5 / 254 + 1e-4
    with torch.inference_mode():
        assert np.abs(logits(task, image).softmax(dim=1)[0].numpy() - seen[0]).max() > 1e-3


def test_unsuitable_options(folder: Path) -> None:
    s2 = min(folder.glob('scenes/*/s2_*.tif'))
    with pytest.raises(SystemExit, match='give --table or the files of one scene'):
        predict(folder, '--s2', str(s2))
    main_command = ['predict', str(folder / 'task.ckpt'), '--s2', str(s2), '--window', '96']
    with pytest.raises(SystemExit, match='--missing_sensors to predict without'):
        main([*main_command, '--output', str(folder / 'one')])
    with pytest.raises(SystemExit, match='give --table'):
        main([*main_command, '--split', 'test'])
    table = RasterTable.read(folder / 'table.parquet')
    s2_alone = table.take(np.flatnonzero(table.sensor == table.sensors.index('s2')))
    s2_alone.write(folder / 'table.parquet')
    with pytest.raises(SystemExit, match='no usable raster of Sentinel-1'):
        predict(folder)


def contents(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(path, 'numpy') as file:
        return file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118


def test_parts_write_the_bytes_of_one_process(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two parts write the same predictions, maps and catalogue as one process."""
    folder = source
    index(folder)
    torch.manual_seed(0)
    model = timm.create_model('geofm_vit_nano_patch16_linear', in_chans=15)
    backbone = tmp_path / 'backbone.ckpt'
    torch.save(model.state_dict(), backbone)
    table = ['--table', str(folder / 'table.parquet'), '--window', '96']
    wholes = (
        ['predict', str(folder / 'task.ckpt'), '--products', '[classes]', *table],
        ['map', str(backbone), '--model', 'geofm_vit_nano_patch16_linear', *table],
    )
    wholes[1].extend(['--products', '[pca]', '--bands', f'[{",".join(BANDS)}]'])
    for command in wholes:
        # The files contain the command.
        monkeypatch.setattr('sys.argv', ['geofm', command[0]])
        outputs = {name: tmp_path / command[0] / name for name in ('whole', 'parts')}
        main([*command, '--output', str(outputs['whole'])])
        for number in range(2):
            monkeypatch.setattr('sys.argv', ['geofm', command[0], '--part', f'{number}/2'])
            part = ['--part', f'{number}/2', '--output', str(outputs['parts'])]
            main([*command, *part])
            assert (outputs['parts'] / 'catalog.json').exists() == (number == 1)
        assert '3 of 3 scenes are mapped' in capsys.readouterr().out
        files = [p for p in outputs['whole'].rglob('*') if p.is_file()]
        assert len(files) > 6 * 3
        for file in files:
            twin = outputs['parts'] / file.relative_to(outputs['whole'])
            if file.suffix == '.safetensors':
                # The order of the metadata varies between runs.
                assert contents(twin) == contents(file)
            else:
                assert twin.read_bytes() == file.read_bytes(), file.name
        catalogue = pystac.Catalog.from_file(str(outputs['whole'] / 'catalog.json'))
        items = list(catalogue.get_items())
        assert len(items) == 6
        for item in items:
            for asset in item.assets.values():
                assert Path(asset.get_absolute_href() or '').is_file()
