"""Predictions for scenes: placement, windows, and interrupted runs."""

import functools
import json
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, get_args

import geopandas as gpd
import lightning
import numpy as np
import pytest
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import from_origin
from shapely.geometry import box
from torch import nn
from torchgeo.tasks import Classification, PixelwiseRegression, Regression, SemanticSegmentation

from geofm.cli import main
from geofm.datasets.labels import open_labels
from geofm.evaluation.map_accuracy import assess_maps
from geofm.legend import NO_CLASS, Legend
from geofm.maps.make import survey
from geofm.maps.make.predict import ClassProduct, PredictOptions, Predictor
from geofm.maps.make.windows import Axis
from geofm.models import CheckpointError
from geofm.tasks.fine_tuned import FineTuned, load_fine_tuned
from geofm.transforms.statistics import InputStatistics
from tests.killing import kill_at_random
from tests.maps.predicting import predict_scene

BANDS = ('B04', 'B03', 'B02')
STATISTICS = InputStatistics(dict.fromkeys(BANDS, 1000.0), dict.fromkeys(BANDS, 500.0), None)
NAMES = ['water', 'forest', 'town']


@pytest.fixture(scope='module')
def scene(module_path: Path) -> Path:
    """A scene of 150 x 117 px whose upper left corner has no data."""
    path = module_path / 's2_20200101.tif'
    rng = np.random.default_rng(0)
    coarse = rng.integers(200, 3000, (3, 15, 12)).repeat(10, 1).repeat(10, 2)
    values = (coarse + rng.integers(0, 200, coarse.shape))[:, :150, :117].astype(np.uint16)
    values[:, :20, :30] = 0
    profile = {
        'driver': 'GTiff',
        'count': 3,
        'dtype': 'uint16',
        'height': 150,
        'width': 117,
        'nodata': 0,
        'crs': CRS.from_epsg(32632),
        'transform': from_origin(500_000, 5_000_000, 10, 10),
    }
    with rasterio.open(path, 'w', **profile) as dst:
        dst.write(values)
        dst.descriptions = BANDS
    return path


class PerPixel(nn.Module):
    """A network whose output at a pixel depends only on that pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def per_pixel() -> FineTuned:
    torch.manual_seed(0)
    legend = Legend.of(NAMES)
    model = PerPixel().eval()
    return FineTuned('segmentation', model, 'test', BANDS, STATISTICS, legend, False, 16)


def save(task: lightning.LightningModule, path: Path, state: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint as a Trainer does."""
    entry = {'input': STATISTICS.entry()} | (state or {})
    content = {
        'state_dict': task.state_dict(),
        'hyper_parameters': dict(task.hparams),
        'DataModule': entry,
        'pytorch-lightning_version': lightning.__version__,
    }
    torch.save(content, path)
    return path


def test_windows_equal_one_pass(scene: Path, tmp_path: Path) -> None:
    task = per_pixel()
    every: list[ClassProduct] = [*get_args(ClassProduct)]
    found = predict_scene(task, {'s2': scene}, tmp_path, every, PredictOptions(48, 0.4))
    with rasterio.open(scene) as src:
        image = torch.from_numpy(src.read().astype(np.float32))
        with torch.inference_mode():
            logits = task.task(((image - 1000) / 500)[None])[0]
        there = src.dataset_mask() > 0
        with rasterio.open(found['classes']) as dst:
            classes = dst.read(1)
            assert (dst.crs, dst.transform, dst.shape) == (src.crs, src.transform, src.shape)
            assert Legend.from_tags(dst.tags()) == task.legend
            assert dst.nodata == NO_CLASS
            assert dst.colormap(1)[1][:3] == task.legend.colors[1]
            assert dst.tags()['s2'] == scene.name
    assert ((classes == NO_CLASS) == ~there).all()
    assert (classes == logits.argmax(dim=0).numpy())[there].all()
    chances = logits.softmax(dim=0).numpy()
    with rasterio.open(found['probabilities']) as src:
        kept = src.read() * np.array(src.scales)[:, None, None]
        assert np.abs(kept - chances)[:, there].max() <= 0.5 / 254 + 1e-4
        assert src.descriptions[2] == 'probability of town'
    with rasterio.open(found['entropy']) as src:
        entropy = -(chances * np.log(chances)).sum(axis=0) / np.log(3)
        assert np.abs(src.read(1) / 254 - entropy)[there].max() <= 0.5 / 254 + 1e-4
    areas = gpd.read_parquet(found['polygons'])
    with rasterio.open(scene) as src:
        burnt = rasterize(
            zip(areas.geometry, areas['value'], strict=True),
            src.shape,
            fill=NO_CLASS,
            transform=src.transform,
            dtype='uint8',
        )
    assert (burnt == classes).all()
    assert found['picture'].read_bytes()[:4] == b'\x89PNG'


def test_windows_equal_one_pass_beyond_the_receptive_field(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are equal where no window's edge is within the receptive field."""
    torch.manual_seed(0)
    network = SemanticSegmentation('fcn', in_channels=3, num_classes=3, num_filters=8).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # So that distant pixels have an effect.
            nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
    # Five convolutions of 3 x 3 reach one pixel further each.
    reach = 5
    task = load_fine_tuned(save(network, tmp_path / 'task.ckpt'))
    rows: list[np.ndarray[Any, Any]] = []
    finish = Predictor.finish

    def keep(self: Predictor, values: Any) -> Any:
        rows.append(values)
        return finish(self, values)

    monkeypatch.setattr(Predictor, 'finish', keep)
    window, overlap = 64, 0.3
    options = PredictOptions(window, overlap)
    predict_scene(task, {'s2': scene}, tmp_path / 'maps', ['classes'], options)
    blended = np.concatenate(rows, axis=1)[:, :150, :117]
    image = torch.zeros(1, 3, 160, 128)
    with rasterio.open(scene) as src:
        there = src.dataset_mask() > 0
        values = (torch.from_numpy(src.read().astype(np.float32)) - 1000) / 500
    image[0, :, :150, :117] = values * torch.from_numpy(there)
    with torch.inference_mode():
        whole = network(image)[0, :, :150, :117].numpy()
    sides = []
    for length in (160, 128):
        inside = np.ones(length, bool)
        for start in Axis.cover(length, window, overlap).starts:
            # A window that ends with the scene has the same padding as one pass.
            if start > 0:
                inside[start : start + reach] = False
            if start + window < length:
                inside[start + window - reach : start + window] = False
        sides.append(inside)
    inside = (sides[0][:150, None] & sides[1][:117]) & there
    assert inside.sum() > 0.4 * there.sum()
    difference = np.abs(blended - whole).max(axis=0)
    assert difference[inside].max() < 1e-4
    # Elsewhere, padding changes the logits by more than rounding.
    assert difference[there & ~inside].max() > 1e-2


def test_logits_are_averaged_before_the_class_is_chosen(scene: Path, tmp_path: Path) -> None:
    class Sided(nn.Module):
        """Predicts class 0 strongly in the left half of a window, class 1 weakly in the right."""

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = torch.arange(x.shape[-1]) < x.shape[-1] // 2
            first = torch.where(left, 5.0, 0.0).expand(len(x), *x.shape[-2:])
            return self.one * torch.stack([first, 1 - first.sign(), 0 * first], dim=1)

    task = FineTuned('segmentation', Sided(), 't', BANDS, STATISTICS, Legend.of(NAMES), False, 16)
    found = predict_scene(task, {'s2': scene}, tmp_path, ['classes'], PredictOptions(64, 0.5))
    with rasterio.open(found['classes']) as src:
        row = src.read(1)[100]
    # From a third of the way between windows, the strong prediction outweighs the weak one.
    assert (row[:32] == 0).all()
    assert (row[-10:] == 1).all()
    assert (row == 0).mean() > 0.6


@pytest.mark.parametrize('stop', [1, 2, 4, 5])
def test_a_stopped_run_resumes_with_the_same_bytes(
    stop: int, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PredictOptions(48, 0.4, batch_size=2)
    products: list[ClassProduct] = ['classes', 'probabilities']
    whole = predict_scene(per_pixel(), {'s2': scene}, tmp_path / 'a', products, options)
    calls = 0
    save_array = survey._save

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop * 3:
            raise KeyboardInterrupt
        save_array(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(survey, '_save', failing)
        with pytest.raises(KeyboardInterrupt):
            predict_scene(per_pixel(), {'s2': scene}, tmp_path / 'b', products, options)
    resumed = predict_scene(per_pixel(), {'s2': scene}, tmp_path / 'b', products, options)
    assert calls > 0
    for product in products:
        assert whole[product].read_bytes() == resumed[product].read_bytes()
    assert not list((tmp_path / 'b').glob('.*.work'))


def predict_in_small_windows(scene: Path, output: Path) -> dict[str, Path]:
    options = PredictOptions(32, 0.6, batch_size=2)
    return predict_scene(per_pixel(), {'s2': scene}, output, ['classes', 'probabilities'], options)


def test_a_run_killed_five_times_resumes_with_the_same_bytes(
    scene: Path, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    # Forked from a process in which GDAL has started no threads.
    predict = functools.partial(predict_in_small_windows, scene)
    args = (predict, tmp_path / 'killed', 5, 0)
    process = forkserver.Process(target=kill_at_random, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list((tmp_path / 'killed').glob('.*.work'))
    for path in predict_in_small_windows(scene, tmp_path / 'killed').values():
        assert path.read_bytes() == (tmp_path / 'undisturbed' / path.name).read_bytes()
    files = [{p.name for p in (tmp_path / name).iterdir()} for name in ('killed', 'undisturbed')]
    assert files[0] == files[1]


def test_segmentation_of_a_geofm_backbone(scene: Path, tmp_path: Path) -> None:
    task = SemanticSegmentation(
        'upernet', 'geofm_vit_nano_patch16_s2', in_channels=13, num_classes=3, labels=NAMES
    )
    checkpoint = save(task, tmp_path / 'task.ckpt')
    main(
        [
            *('predict', str(checkpoint), '--s2', str(scene), '--output', str(tmp_path / 'maps')),
            *('--window', '64', '--missing_bands', 'mean'),
        ]
    )
    with rasterio.open(tmp_path / 'maps' / 's2_20200101_classes.tif') as src:
        assert src.shape == (150, 117)
        legend = Legend.from_tags(src.tags())
        assert legend is not None
        assert list(legend.names) == NAMES
        values = src.read(1)
    assert (values[:20, :30] == NO_CLASS).all()
    assert set(np.unique(values[30:])) <= {0, 1, 2}


def test_one_window_equals_the_task(scene: Path, tmp_path: Path) -> None:
    task = SemanticSegmentation('unet', 'resnet18', in_channels=3, num_classes=3).eval()
    checkpoint = save(task, tmp_path / 'task.ckpt', {'geofm_legend': Legend.of(NAMES).entry()})
    loaded = load_fine_tuned(checkpoint)
    assert loaded.bands == BANDS
    assert loaded.legend.names == tuple(NAMES)
    options = PredictOptions(160)
    found = predict_scene(loaded, {'s2': scene}, tmp_path / 'maps', ['classes'], options)
    image = torch.zeros(1, 3, 160, 128)
    with rasterio.open(scene) as src:
        values = (torch.from_numpy(src.read().astype(np.float32)) - 1000) / 500
        there = src.dataset_mask() > 0
        image[0, :, :150, :117] = values * torch.from_numpy(there)
    with torch.inference_mode():
        expected = task(image)[0, :, :150, :117].argmax(dim=0).numpy()
    with rasterio.open(found['classes']) as src:
        assert (src.read(1) == expected)[there].mean() > 0.999


def test_regression_and_classification(scene: Path, tmp_path: Path) -> None:
    height = PixelwiseRegression('unet', 'resnet18', in_channels=3, num_outputs=1)
    loaded = load_fine_tuned(save(height, tmp_path / 'height.ckpt'))
    every: list[ClassProduct] = [*get_args(ClassProduct)]
    found = predict_scene(loaded, {'s2': scene}, tmp_path / 'h', every, PredictOptions(96))
    # A regression has no classes, whichever products are requested.
    assert list(found) == ['values']
    with rasterio.open(found['values']) as src:
        values = src.read(1)
    assert np.isnan(values[:20, :30]).all()
    assert np.isfinite(values[20:]).all()
    patches = Classification('geofm_vit_nano_patch8_s2', in_channels=13, num_classes=2)
    loaded = load_fine_tuned(save(patches, tmp_path / 'patches.ckpt'))
    options = PredictOptions(16, missing_bands='zero')
    found = predict_scene(loaded, {'s2': scene}, tmp_path / 'p', options=options)
    with rasterio.open(found['classes']) as src, rasterio.open(scene) as whole:
        assert src.shape == (10, 8)
        assert src.transform @ (0, 0) == whole.transform @ (0, 0)
        assert src.res == (160, 160)
        assert src.read(1)[0, 0] == NO_CLASS


def test_files_that_cannot_be_used(scene: Path, tmp_path: Path) -> None:
    image = Regression('resnet18', in_channels=3)
    with pytest.raises(CheckpointError, match='a regression of whole images'):
        load_fine_tuned(save(image, tmp_path / 'image.ckpt'))
    torch.save({'state_dict': {}}, tmp_path / 'bare.ckpt')
    with pytest.raises(CheckpointError, match='not a checkpoint of a task'):
        load_fine_tuned(tmp_path / 'bare.ckpt')
    task = SemanticSegmentation('unet', 'resnet18', in_channels=3, num_classes=3)
    half = save(task, tmp_path / 'half.ckpt')
    content = torch.load(half)
    del content['state_dict']['model.decoder.blocks.0.conv1.0.weight']
    torch.save(content, half)
    with pytest.raises(CheckpointError, match='Missing key'):
        load_fine_tuned(half)
    for key, value in (('backbone', 'hf-hub:a/b'), ('model', 'os.system'), ('in_channels', -1)):
        content = torch.load(save(task, tmp_path / 'task.ckpt'))
        content['hyper_parameters'][key] = value
        torch.save(content, tmp_path / 'task.ckpt')
        with pytest.raises(CheckpointError, match=r'task\.ckpt'):
            load_fine_tuned(tmp_path / 'task.ckpt')
    fused = SemanticSegmentation(
        'upernet', 'geofm_vit_nano_patch16_linear', in_channels=15, num_classes=3
    )
    loaded = load_fine_tuned(save(fused, tmp_path / 'fused.ckpt'))
    options = PredictOptions(64, missing_bands='mean')
    with pytest.raises(ValueError, match='fine-tuned with Sentinel-1'):
        predict_scene(loaded, {'s2': scene}, tmp_path / 'f', options=options)
    with pytest.raises(ValueError, match='batch_size=0 is not positive'):
        predict_scene(loaded, {'s2': scene}, tmp_path / 'f', options=PredictOptions(64, 0.5, 0))
    with pytest.raises(ValueError, match='multiples of 16 px'):
        predict_scene(loaded, {'s2': scene}, tmp_path / 'f', options=PredictOptions(50))


def test_accuracy_beside_the_map(scene: Path, tmp_path: Path) -> None:
    task = SemanticSegmentation('unet', 'resnet18', in_channels=3, num_classes=3, labels=NAMES)
    checkpoint = save(task, tmp_path / 'task.ckpt')
    with rasterio.open(scene) as src:
        truth = np.full(src.shape, 1, np.uint8)
        profile = {**src.profile, 'count': 1, 'dtype': 'uint8', 'nodata': 255}
    with rasterio.open(tmp_path / 'truth.tif', 'w', **profile) as dst:
        dst.write(truth, 1)
    command = ['predict', str(checkpoint), '--s2', str(scene), '--output', str(tmp_path / 'maps')]
    main(
        [
            *command,
            '--window',
            '96',
            '--reference',
            str(tmp_path / 'truth.tif'),
            '--block_pixels',
            '20',
        ]
    )
    with rasterio.open(tmp_path / 'maps' / 's2_20200101_classes.tif') as src:
        values = src.read(1)
    right = (values == 1)[values != NO_CLASS].mean()
    said = json.loads((tmp_path / 'maps' / 's2_20200101_classes_accuracy.json').read_text())
    assert said['overall']['accuracy']['value'] == pytest.approx(right)


def test_a_map_and_features(tmp_path: Path) -> None:
    legend = Legend.of({'water': 0, 'forest': 2, 'town': 7})
    guess = np.zeros((600, 40), np.uint8)
    guess[:, 20:] = 2
    profile = {
        'driver': 'GTiff',
        'count': 1,
        'dtype': 'uint8',
        'height': 600,
        'width': 40,
        'nodata': NO_CLASS,
        'crs': CRS.from_epsg(32632),
        'transform': from_origin(500_000, 5_000_000, 10, 10),
    }
    path = tmp_path / 'map.tif'
    with rasterio.open(path, 'w', **profile) as dst:
        dst.write(guess, 1)
        dst.update_tags(**legend.tags())
    # A quarter of the forest is water in the reference, which has no data beyond row 590.
    frame = gpd.GeoDataFrame(
        {'class': ['water', 'forest']},
        geometry=[
            box(500_000, 4_994_100, 500_250, 5_000_000),
            box(500_250, 4_994_100, 500_400, 5_000_000),
        ],
        crs='EPSG:32632',
    )
    frame.to_file(tmp_path / 'truth.gpkg')
    truth = open_labels(tmp_path / 'truth.gpkg', column='class', legend=legend)
    found = assess_maps({path: truth}, 'truth', 50)
    matrix = [[590 * 20, 590 * 5, 0], [0, 590 * 15, 0], [0, 0, 0]]
    assert found.confusion.tolist() == matrix
