"""geofm backbones in the interface and the probes of torchgeo-bench, on generated data."""

import importlib
import logging
import math
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from geofm.models import create_backbone, load_backbone, read_hparams
from geofm.sensors import BANDS, SENSORS, BandError, band_statistics
from geofm.transforms import Normalize
from tests.tasks.test_dinov2 import SMALL, small_task

bench = pytest.importorskip('torchgeo_bench', reason='needs the extra geofm[bench]')

from torchgeo_bench.datasets import get_bench_dataset_class  # noqa: E402
from torchgeo_bench.datasets.base import BandSpec  # noqa: E402
from torchgeo_bench.models.interface import BenchModel  # noqa: E402

from geofm.evaluation.torchgeo_bench import GeofmBench  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (dict(zip(BANDS, v.tolist(), strict=True)) for v in band_statistics(BANDS))
#: Band names of GEO-Bench: codes in version 2, words in version 1.
WORDS = {
    'B01': 'coastal_aerosol',
    'B02': 'blue',
    'B03': 'green',
    'B04': 'red',
    'B05': 'red_edge_1',
    'B06': 'red_edge_2',
    'B07': 'red_edge_3',
    'B08': 'nir',
    'B8A': 'red_edge_4',
    'B09': 'water_vapour',
    'B10': 'swir_cirrus',
    'B11': 'swir_1',
    'B12': 'swir_2',
}


def spec(band: str, words: bool = False, **kwargs: Any) -> Any:
    """A band as torchgeo-bench describes it, in dB or DN."""
    s1 = band in SENSORS['s1'].band_names
    name = WORDS[band] if words and not s1 else band.lower()
    low, high = (-60.0, 20.0) if s1 else (0.0, 18_000.0)
    described = {'mean': MEAN[band], 'std': STD[band], 'min': low, 'max': high}
    sensor = 'sar' if s1 and words else 's1' if s1 else 's2'
    return BandSpec(sensor, name, band, **{**described, **kwargs})


def specs(bands: Sequence[str], words: bool = False) -> list[Any]:
    return [spec(band, words) for band in bands]


def raw(bands: Sequence[str], images: int = 3, size: int = 32) -> Tensor:
    """Images in dB and DN, independent of the global random state."""
    mean, std = (v.view(-1, 1, 1) for v in band_statistics(bands))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, len(bands), size, size, generator=generator)
    # Each image has its own level, because noise alone looks the same to a backbone.
    level = torch.randn(images, len(bands), 1, 1, generator=generator)
    return mean + std * (noise + level)


@pytest.fixture(scope='module')
def checkpoints(module_path: Path) -> Callable[..., str]:
    """Function that makes pretrained checkpoints."""

    def make(model: str = SMALL['model'], bands: tuple[str, ...] = BANDS, depth: int = 2) -> str:
        path = module_path / f'{model}_{len(bands)}_{depth}.ckpt'
        if not path.exists():
            torch.manual_seed(1)
            model_args = {**SMALL['model_args'], 'depth': depth}
            task = small_task(
                model=model, in_channels=len(bands), bands=bands, model_args=model_args
            )
            with torch.no_grad():
                for parameter in task.model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            content = {'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}
            torch.save(content, path)
        return str(path)

    return make


# -- its interface --------------------------------------------------------------------------------


@pytest.mark.parametrize('words', [False, True])
@pytest.mark.parametrize('bands', [BANDS, BANDS[2:], BANDS[:2]], ids=['s1+s2', 's2', 's1'])
@pytest.mark.parametrize('model', ['linear', 'xattn', 'early'])
def test_features_are_those_of_the_backbone(
    model: str, bands: tuple[str, ...], words: bool, checkpoints: Callable[..., str]
) -> None:
    path = checkpoints(f'geofm_vit_tiny_patch16_{model}')
    ours = GeofmBench(specs(bands, words), checkpoint=path)
    assert isinstance(ours, BenchModel)
    assert ours.num_channels == len(bands)
    images = raw(bands)
    hparams = {**read_hparams(path), 'in_channels': len(bands), 'bands': bands}
    backbone = create_backbone(hparams).eval()
    backbone.load_state_dict(load_backbone(path).state_dict())
    normalised = Normalize(bands)({'image': images})['image']
    with torch.inference_mode():
        tokens = backbone.forward_features(normalised)
        features = ours.forward_patch_features(images)
    torch.testing.assert_close(features, tokens[:, 0])
    # Features must depend on the image, or the comparisons below would be meaningless.
    assert features.std(dim=0).mean() > 0.1 * features.std()
    patches = tokens[:, backbone.num_prefix_tokens :].mean(dim=1)
    for pool, expected in (('mean', patches), ('both', torch.cat([tokens[:, 0], patches], 1))):
        ours.pool = pool
        with torch.inference_mode():
            torch.testing.assert_close(ours(images), expected)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.permutations(BANDS), st.integers(1, len(BANDS)))
def test_bands_are_matched_by_name(
    checkpoints: Callable[..., str], order: list[str], count: int
) -> None:
    """A subset of the bands in any order gives the same features as in canonical order."""
    given_bands = order[:count]
    canonical = [band for band in BANDS if band in given_bands]
    images = raw(canonical, images=2, size=16)
    path = checkpoints(depth=1)
    with torch.inference_mode():
        expected = GeofmBench(specs(canonical), checkpoint=path)(images)
        shuffled = images[:, [canonical.index(band) for band in given_bands]]
        features = GeofmBench(specs(given_bands), checkpoint=path)(shuffled)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_a_missing_band_is_treated_as_its_mean(
    checkpoints: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoints()
    images = raw(BANDS)
    missing = ('B10', 'B01', 'VH')
    for band in missing:
        images[:, BANDS.index(band)] = MEAN[band]
    rest = [band for band in BANDS if band not in missing]
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        whole = GeofmBench(specs(BANDS), checkpoint=path)(images)
        assert not caplog.messages
        less = GeofmBench(specs(rest), checkpoint=path)(images[:, [BANDS.index(b) for b in rest]])
    torch.testing.assert_close(less, whole, rtol=1e-4, atol=1e-5)
    assert "['VH'] are missing" in caplog.text
    assert "['B01', 'B10'] are missing" in caplog.text


def test_a_missing_sensor_is_logged(
    checkpoints: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        GeofmBench(specs(BANDS[2:]), checkpoint=checkpoints())
    assert "the data have no S1: replaced by the model's missing-sensor tokens" in caplog.text


def test_a_backbone_of_some_bands(checkpoints: Callable[..., str]) -> None:
    """A backbone pretrained on true colour only."""
    rgb = ('B04', 'B03', 'B02')
    path = checkpoints('geofm_vit_tiny_patch16_s2', rgb)
    images = raw(('B02', 'B03', 'B04'))
    with torch.inference_mode():
        features = GeofmBench(specs(('B02', 'B03', 'B04'), True), checkpoint=path)(images)
        normalised = Normalize(rgb)({'image': images.flip(1)})['image']
        torch.testing.assert_close(features, load_backbone(path)(normalised))
    with pytest.raises(BandError, match=r"does not know the bands \['B08'\]"):
        GeofmBench(specs(('B04', 'B08')), checkpoint=path)


# -- units ----------------------------------------------------------------------------------------


def test_reflectance_and_power_become_dn_and_db(checkpoints: Callable[..., str]) -> None:
    """Units of So2Sat and Kuro Siwo, with band specifications in these units."""
    path = checkpoints()
    images = raw(BANDS).clamp_min(-40)
    scaled = images.clone()
    scaled[:, :2] = 10 ** (images[:, :2] / 10)
    scaled[:, 2:] /= 10_000
    optical = {b: {'mean': MEAN[b] / 1e4, 'std': STD[b] / 1e4, 'max': 2.8} for b in BANDS[2:]}
    radar = {'VV': {'mean': 0.13, 'min': 0.0}, 'VH': {'mean': 0.03, 'min': 0.0}}
    other = [spec(b, **(radar | optical)[b]) for b in BANDS]
    with torch.inference_mode():
        ours, theirs = (GeofmBench(bands, checkpoint=path) for bands in (specs(BANDS), other))
        expected, got = ours.normalize_inputs(images), theirs.normalize_inputs(scaled)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(theirs(scaled), ours(images), rtol=1e-3, atol=1e-3)


def test_pixels_without_data_are_at_the_mean(checkpoints: Callable[..., str]) -> None:
    ours = GeofmBench(
        [spec('VV', mean=0.13, min=0.0), spec('VH', mean=0.03, min=0.0)], checkpoint=checkpoints()
    )
    images = torch.full((1, 2, 16, 16), 0.1)
    images[0, 0, 0, 0], images[0, 1, 1, 1], images[0, 0, 2, 2] = 0.0, float('nan'), -1.0
    normalised = ours.normalize_inputs(images)
    assert normalised.isfinite().all()
    for i in range(3):
        assert (normalised[0, :, i, i] == 0).all()
    assert (normalised[0, :, 3, 3] != 0).all()
    # Pixels without data of Sentinel-2 are 0 in all bands; a single dark band is data.
    ours = GeofmBench(specs(('B03', 'B04')), checkpoint=checkpoints())
    images = torch.full((1, 2, 16, 16), 900.0)
    images[0, :, 0, 0] = images[0, 1, 1, 1] = 0
    normalised = ours.normalize_inputs(images)
    assert (normalised[0, :, 0, 0] == 0).all()
    assert (normalised[0, :, 1, 1] != 0).all()


def test_other_strategies_are_those_of_torchgeo_bench(checkpoints: Callable[..., str]) -> None:
    bands = specs(('B03', 'VV', 'B8A'))
    images = raw(('B03', 'VV', 'B8A'))
    for strategy in ('bandspec_zscore', 'minmax', 'identity'):

        class Theirs(BenchModel):
            def _forward_patch_features(self, images: Tensor) -> Tensor:
                return images

        options: dict[str, Any] = {'checkpoint': checkpoints(), 'normalization': strategy}
        expected = Theirs(bands, strategy)(images)
        assert torch.equal(GeofmBench(bands, **options).normalize_inputs(images), expected)
        less = GeofmBench(bands, **options, names={'vv': None})
        assert torch.equal(less.normalize_inputs(images), expected[:, [0, 2]])


@pytest.mark.parametrize(
    ('bands', 'message'),
    [
        ([spec('VV', mean=60197.8, min=0.0)], 'neither dB nor power'),
        ([spec('VV', mean=0.0, min=-107.0)], 'neither dB nor power'),
        ([spec('B04', max=255.0)], 'neither DN nor reflectance'),
        ([spec('B04'), spec('B11', max=255.0)], 'neither DN nor reflectance'),
    ],
    ids=['treesatai', 'so2sat', 'forestnet', 'brick-kiln'],
)
def test_unknown_units_are_an_error(
    bands: list[Any], message: str, checkpoints: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match=f'{message}.*dataset.normalization'):
        GeofmBench(bands, checkpoint=checkpoints())
    GeofmBench(bands, checkpoint=checkpoints(), normalization='bandspec_zscore')


# -- names ----------------------------------------------------------------------------------------


def test_unknown_bands_are_an_error_or_left_out(checkpoints: Callable[..., str]) -> None:
    dem = BandSpec('dem', 'dem', 'dem', 100.0, 50.0, 0.0, 3000.0)
    aerial = BandSpec('aerial', 'red', 'red', 100.0, 50.0, 0.0, 255.0)
    path = checkpoints()
    with pytest.raises(BandError, match=r"\['dem/dem', 'aerial/red'\].*model.names.NAME=null"):
        GeofmBench([spec('VV'), dem, aerial], checkpoint=path)
    images = raw(('VV', 'B04'))
    both = torch.cat([images[:, :1], torch.full_like(images[:, :1], 9.0), images[:, 1:]], dim=1)
    with torch.inference_mode():
        expected = GeofmBench(specs(('VV', 'B04')), checkpoint=path)(images)
        left_out = GeofmBench([spec('VV'), dem, spec('B04')], checkpoint=path, names={'dem': None})(
            both
        )
    torch.testing.assert_close(left_out, expected)
    with pytest.raises(BandError, match='given twice'):
        GeofmBench(specs(('VV', 'VH')), checkpoint=path, names={'vh': 'VV'})
    with pytest.raises(BandError, match=r"names of \['nope'\]"):
        GeofmBench([spec('VV')], checkpoint=path, names={'nope': 'VV'})
    with pytest.raises(BandError, match='no bands given'):
        GeofmBench([dem], checkpoint=path, names={'dem': None})


#: Descriptions of data with wrong band names, and the correct names: B8A is last in
#: EuroSAT, and VV, which is brighter, comes after VH in BigEarthNet.
WRONG: dict[str, dict[str, str | None]] = {
    'm-eurosat': {
        'red_edge_4': 'B09',
        'water_vapour': 'B10',
        'swir_cirrus': 'B11',
        'swir_1': 'B12',
        'swir_2': 'B8A',
    },
    'benv2': {'vv': 'VH', 'vh': 'VV'},
    'm-brick-kiln': {
        'red_edge_2': 'B07',
        'red_edge_3': 'B8A',
        'red_edge_4': 'B11',
        'water_vapour': 'B12',
        'swir_cirrus': None,
        'swir_1': None,
        'swir_2': None,
    },
}


@pytest.mark.parametrize('name', WRONG)
def test_names_that_contradict_the_statistics_are_an_error(
    name: str, checkpoints: Callable[..., str]
) -> None:
    bands = get_bench_dataset_class(name).bands
    with pytest.raises(ValueError, match=r'give the right ones in model\.names'):
        GeofmBench(bands, checkpoint=checkpoints())
    ours = GeofmBench(bands, checkpoint=checkpoints(), names=WRONG[name])
    assert ours(torch.rand(1, len(bands), 16, 16)).isfinite().all()


def test_m_brick_kiln_is_an_error_without_its_files(checkpoints: Callable[..., str]) -> None:
    bands = [spec for spec in get_bench_dataset_class('m-brick-kiln').bands if spec.max > 255]
    assert len(bands) == 10
    with pytest.raises(ValueError, match=r"'red_edge_4' is darker.*probably not B8A"):
        GeofmBench(bands, checkpoint=checkpoints())
    names = {k: v for k, v in WRONG['m-brick-kiln'].items() if v is not None}
    ours = GeofmBench(bands, checkpoint=checkpoints(), names=names)
    assert ' '.join(ours.model.bands) == 'B01 B02 B03 B04 B05 B07 B8A B08 B11 B12'
    with pytest.raises(BandError, match='has 13 channels, but 10 bands'):
        ours(torch.rand(1, 13, 16, 16))


def test_the_names_of_m_eurosat_are_wrong() -> None:
    """With correct names, its statistics equal those of torchgeo-bench's eurosat."""
    names = {word: band for band, word in WORDS.items()} | WRONG['m-eurosat']
    theirs = {spec.source_name: spec for spec in get_bench_dataset_class('eurosat').bands}
    for one in get_bench_dataset_class('m-eurosat').bands:
        assert one.mean == pytest.approx(theirs[names[one.name]].mean, rel=0.05)


#: Expected errors for the other data with all of their Sentinel-1 and Sentinel-2 bands.
VERDICTS = {
    'benv2': 'names',
    'burn_scars': None,
    'cloudsen12': None,
    'dynamic_earthnet': 'names',
    'eurosat': None,
    'eurosat-spatial': None,
    'forestnet': 'neither DN nor reflectance',
    'fotw': None,
    'kuro_siwo': None,
    'm-bigearthnet': None,
    'm-brick-kiln': 'names',
    'm-eurosat': 'names',
    'm-so2sat': 'not known as bands',
    'pastis': None,
    'so2sat': 'neither dB nor power',
    'treesatai': 'neither dB nor power',
}


@pytest.mark.parametrize('name', VERDICTS)
def test_data_of_geo_bench(name: str, checkpoints: Callable[..., str]) -> None:
    bands = [
        spec
        for spec in get_bench_dataset_class(name).bands
        if spec.sensor in ('s1', 's2', 'sar') and spec.name != 'vv_vh'
    ]
    if VERDICTS[name] is None:
        ours = GeofmBench(bands, checkpoint=checkpoints())
        middle = torch.tensor([spec.mean for spec in bands]).view(1, -1, 1, 1).expand(2, -1, 16, 16)
        normalised = ours.normalize_inputs(middle)
        # The mean is within two standard deviations of ours, so the unit was recognised.
        assert normalised.abs().max() < 2.5
    else:
        with pytest.raises(ValueError, match=str(VERDICTS[name])):
            GeofmBench(bands, checkpoint=checkpoints())


# -- its probes -----------------------------------------------------------------------------------


class Labelled(Dataset[dict[str, Tensor]]):
    """Two classes that differ in the brightness of the near infrared."""

    def __init__(self, bands: Sequence[str], length: int, segment: bool = False) -> None:
        generator = torch.Generator().manual_seed(length)
        mean, std = (v.view(-1, 1, 1) for v in band_statistics(bands))
        noise = torch.randn(length, len(bands), 32, 32, generator=generator)
        self.labels = torch.arange(length) % 2
        self.masks = torch.zeros(length, 32, 32, dtype=torch.long)
        self.masks[:, :16] = 1
        nir = list(bands).index('B08')
        shift = self.masks if segment else self.labels[:, None, None].expand_as(self.masks)
        noise[:, nir] += 4 * shift
        self.images = mean + 0.3 * std * noise
        self.segment = segment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        target = {'mask': self.masks[index]} if self.segment else {'label': self.labels[index]}
        return {'image': self.images[index], **target}


def test_its_knn_and_linear_probes(checkpoints: Callable[..., str]) -> None:
    from torchgeo_bench.main import embed_split, evaluate_knn, evaluate_logistic

    bands = ('VH', 'B08', 'VV', 'B04')
    ours = GeofmBench(specs(bands), checkpoint=checkpoints(), pool='mean').eval()
    splits = [
        embed_split(ours, DataLoader(Labelled(bands, n), 8), torch.device('cpu'), False)
        for n in (40, 10, 20)
    ]
    (x, y), (x_val, y_val), (x_test, y_test) = splits
    assert x.shape == (40, 32)
    accuracy, *_ = evaluate_knn(x, y, x_test, y_test, seed=0, n_bootstrap=5)
    assert accuracy == 1
    data = (x, y, x_val, y_val, x_test, y_test)
    accuracy, *_ = evaluate_logistic(*data, [1.0, 100.0], 0, 5, merge_val=True, device='cpu')
    assert accuracy == 1


@pytest.mark.parametrize('head', ['linear', 'fpn', 'patch_linear'])
def test_its_segmentation_probe(head: str, checkpoints: Callable[..., str]) -> None:
    from omegaconf import OmegaConf
    from torchgeo_bench.segmentation_probe import SegmentationProbe
    from torchgeo_bench.segmentation_task import SegmentationSolver

    bands = ('VV', 'VH', 'B04', 'B08')
    ours = GeofmBench(specs(bands), checkpoint=checkpoints())
    config = OmegaConf.load(ROOT / 'configs' / 'torchgeo_bench' / 'model' / 'geofm.yaml')
    # The small model has two blocks.
    layers = [n for n in config.eval.segmentation.layers if int(n[-1]) < len(ours.levels)]
    assert layers == ['levels.1', 'levels.0']
    probe = SegmentationProbe(ours, layers, num_classes=2, head_type=head, hidden_dim=32)
    assert probe.channels_list == [32, 32]
    solver = SegmentationSolver(probe, num_classes=2, lr=0.02, device='cpu')
    train, test = (DataLoader(Labelled(bands, n, segment=True), 8) for n in (24, 8))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    solver.fit(train, epochs=40, verbose=False)
    assert solver.evaluate(test)['mIoU'] > 0.8
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(('depth', 'blocks'), [(2, [0, 1]), (8, [1, 3, 5, 7]), (4, [0, 1, 2, 3])])
def test_levels_are_maps_after_each_quarter_of_the_blocks(
    depth: int, blocks: list[int], checkpoints: Callable[..., str]
) -> None:
    ours = GeofmBench(specs(BANDS), checkpoint=checkpoints(depth=depth))
    seen: list[Tensor] = []
    for level in ours.levels:
        level.register_forward_hook(lambda _, __, output: seen.append(output))
    images = raw(BANDS, size=48)
    with torch.inference_mode():
        ours(images)
        normalised = ours.normalize_inputs(images)
        expected = ours.model.forward_intermediates(normalised, blocks, intermediates_only=True)
    for got, wanted in zip(seen, expected, strict=True):
        assert got.shape == (3, 32, 6, 6)
        assert torch.equal(got, wanted)


def test_random_weights_are_the_baseline(checkpoints: Callable[..., str]) -> None:
    path = checkpoints()
    images = raw(('B04', 'B08'))
    features = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        floor = GeofmBench(specs(('B04', 'B08')), checkpoint=path, random_weights=True)
        with torch.inference_mode():
            features.append(floor(images))
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2])


def test_unsuitable_sizes_and_pools_are_an_error(checkpoints: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r'dataset\.image_size to a multiple of 8'):
        GeofmBench(specs(BANDS), checkpoint=checkpoints())(raw(BANDS, size=20))
    with pytest.raises(ValueError, match="pool must be 'cls', 'mean' or 'both'"):
        GeofmBench(specs(BANDS), checkpoint=checkpoints(), pool='max')  # type: ignore[arg-type]


def run_command(folder: Path, arguments: Sequence[str]) -> None:
    """Run torchgeo-bench in a folder."""
    os.chdir(folder)
    sys.argv = ['torchgeo-bench', *arguments]
    runpy.run_module('torchgeo_bench.cli', run_name='__main__')


def test_torchgeo_bench_runs_from_the_config(
    checkpoints: Callable[..., str], tmp_path: Path, forkserver: ForkServerContext
) -> None:
    """Run `torchgeo-bench run` with k-NN and linear probes on a generated EuroSAT."""
    from torchgeo.datasets import EuroSAT

    from tests.datasets.tree import grid_at, write_raster

    rng = np.random.default_rng(0)
    root = tmp_path / 'data' / 'eurosat'
    for i in range(24):
        name = ('Forest', 'River')[i % 2]
        pixels = rng.integers(500, 1500, (13, 64, 64)) + 3000 * (i % 2)
        grid = grid_at(32632, 0, 0, 64)
        write_raster(
            root / EuroSAT.base_dir / name / f'{name}_{i}.tif', pixels.astype('uint16'), grid
        )
    names = [f'{("Forest", "River")[i % 2]}_{i}.jpg' for i in range(24)]
    for split, part in (('train', names[:12]), ('val', names[12:16]), ('test', names[16:])):
        (root / f'eurosat-{split}.txt').write_text('\n'.join(part))
    arguments = [
        *('run', 'model=geofm'),
        *(f'model.checkpoint={checkpoints()}', 'model.pool=mean'),
        *('dataset.names=[eurosat]', 'dataset.bands=all', 'dataset.normalization=model_native'),
        *('dataset.image_size=null', 'dataset.num_workers=0', 'dataset.batch_size=8'),
        *('device=cpu', 'eval.bootstrap=5', 'eval.c_range=[0,2,2]', 'eval.knn_k=3'),
        *('--config-dir', str(ROOT / 'configs' / 'torchgeo_bench')),
    ]
    process = forkserver.Process(target=run_command, args=(tmp_path, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0
    rows = (tmp_path / 'results' / 'all_results.csv').read_text().splitlines()
    header, *values = [row.split(',') for row in rows]
    scores = {
        row[header.index('method')]: float(row[header.index('metric_value')]) for row in values
    }
    assert scores == {'knn3': 1.0, 'linear': 1.0}
    assert {row[header.index('normalization')] for row in values} == {'model_native'}


def test_without_torchgeo_bench_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchgeo.datasets import DependencyNotFoundError

    monkeypatch.delitem(sys.modules, 'geofm.evaluation.torchgeo_bench')
    monkeypatch.setitem(sys.modules, 'torchgeo_bench', None)
    monkeypatch.setitem(sys.modules, 'torchgeo_bench.datasets.base', None)
    with pytest.raises(DependencyNotFoundError, match=r'geofm\[bench\]'):
        importlib.import_module('geofm.evaluation.torchgeo_bench')
    assert math.isfinite(MEAN['VV'])
