"""The benchmark with TorchGeo's data modules, on TorchGeo's small test data sets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchgeo.datamodules import (
    BaseDataModule,
    BigEarthNetDataModule,
    EuroSATDataModule,
    NonGeoDataModule,
    SEN12MSDataModule,
    So2SatDataModule,
    TreeSatAIDataModule,
)
from torchgeo.datasets import (
    CopernicusBenchDFC2020S1,
    CopernicusBenchDFC2020S2,
    CopernicusBenchEuroSATS1,
    CopernicusBenchEuroSATS2,
)

from geofm.evaluation import (
    BackboneConfig,
    PairedDataModule,
    ProbeSettings,
    Report,
    labelled_data,
    run_benchmark,
)
from geofm.evaluation.data import Task
from geofm.sensors import BANDS, SENTINEL2

S1, S2 = ('VV', 'VH'), SENTINEL2.band_names
NO_B10 = tuple(band for band in S2 if band != 'B10')
SO2SAT = tuple(band for band in S2 if band not in ('B01', 'B09', 'B10'))

TINY: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'init_values': 1.0}


def copernicus(root: Path, *datasets: Any) -> BaseDataModule:
    modules = [NonGeoDataModule(d, 2, root=root / 'copernicus' / folder) for folder, d in datasets]
    return modules[0] if len(modules) == 1 else PairedDataModule(*modules)


EUROSAT_S1 = ('l2_eurosat_s1s2', CopernicusBenchEuroSATS1)
EUROSAT_S2 = ('l2_eurosat_s1s2', CopernicusBenchEuroSATS2)
DFC_S1 = ('l2_dfc2020_s1s2', CopernicusBenchDFC2020S1)
DFC_S2 = ('l2_dfc2020_s1s2', CopernicusBenchDFC2020S2)

CASES: dict[str, tuple[Callable[[Path], BaseDataModule], Task, tuple[str, ...]]] = {
    'EuroSAT': (
        lambda root: EuroSATDataModule(2, root=root / 'eurosat'),
        'classification',
        S2,
    ),
    'BigEarthNet': (
        lambda root: BigEarthNetDataModule(2, root=root / 'bigearthnet' / 'v1', bands='all'),
        'multilabel',
        S1 + NO_B10,
    ),
    'SEN12MS': (
        lambda root: SEN12MSDataModule(2, root=root / 'sen12ms', checksum=False),
        'segmentation',
        BANDS,
    ),
    'So2Sat': (
        lambda root: So2SatDataModule(2, root=root / 'so2sat', checksum=False),
        'classification',
        S1 + SO2SAT,
    ),
    'TreeSatAI': (
        lambda root: TreeSatAIDataModule(2, root=root / 'treesatai', sensors=('s1', 's2')),
        'multilabel',
        S1 + NO_B10,
    ),
    'DFC2020 S1+S2': (lambda root: copernicus(root, DFC_S1, DFC_S2), 'segmentation', BANDS),
    'DFC2020 S2': (lambda root: copernicus(root, DFC_S2), 'segmentation', S2),
    'EuroSAT S1+S2': (
        lambda root: copernicus(root, EUROSAT_S1, EUROSAT_S2),
        'classification',
        BANDS,
    ),
    'EuroSAT S1': (lambda root: copernicus(root, EUROSAT_S1), 'classification', S1),
}


#: Test data sets whose few samples have a single class.
ONE_CLASS = ('EuroSAT S1', 'EuroSAT S1+S2')


def run(datamodule: BaseDataModule, tmp_path: Path) -> Report:
    config = BackboneConfig('geofm_vit_tiny_patch16_linear', name='ours', model_args=TINY)
    return run_benchmark(
        [config],
        labelled_data(datamodule),
        ProbeSettings(k=(1,), steps=5, progress=False),
        tmp_path,
        lambda line: None,
    )


@pytest.mark.parametrize('case', CASES)
def test_the_benchmark_runs_on_the_stand_in(case: str, shared_data: Path, tmp_path: Path) -> None:
    make, task, bands = CASES[case]
    if case in ONE_CLASS:
        with pytest.raises(ValueError, match='at least two classes'):
            run(make(shared_data / 'torchgeo'), tmp_path)
        return
    report = run(make(shared_data / 'torchgeo'), tmp_path)
    assert report.data.task == task
    assert report.data.bands == bands
    assert {score.backbone for score in report.scores} == {'ours', 'band mean and std'}
    probes = {'linear'} if report.data.dense else {'1-NN', 'linear', 'logistic'}
    assert {score.probe for score in report.scores} == probes
    for score in report.scores:
        assert score.test == report.data.size('test') > 0
        assert 0 <= score.low <= score.high <= 1 or score.value != score.value, score
    notes = '\n'.join(report.notes)
    if case == 'DFC2020 S1+S2':
        assert report.data.name == 'CopernicusBenchDFC2020S1 and CopernicusBenchDFC2020S2'
    if case == 'So2Sat':
        assert 'has mean 0 and std 255' in notes or 'leaves bands with' in notes
    if case == 'TreeSatAI':
        assert 'normalisation of several images is not used' in notes
    if case == 'DFC2020 S2':
        assert "s1 is not in the data: replaced by the model's missing-sensor tokens" in notes
    if case == 'BigEarthNet':
        assert "built without ['B10']" in notes


def test_sen12ms_has_the_classes_of_its_data_module(shared_data: Path) -> None:
    datamodule = SEN12MSDataModule(1, root=shared_data / 'torchgeo' / 'sen12ms', checksum=False)
    data = labelled_data(datamodule)
    raw: Tensor = data.splits['train'][0]['mask']
    (batch, *_) = data.loader('train')
    mapped = torch.take(SEN12MSDataModule.DFC2020_CLASS_MAPPING, raw)
    assert torch.equal(data.targets(batch)[0], mapped)


def test_so2sat_is_in_decibels_and_digital_numbers(shared_data: Path) -> None:
    h5py = pytest.importorskip('h5py')
    root = shared_data / 'torchgeo' / 'so2sat'
    data = labelled_data(So2SatDataModule(1, root=root, checksum=False))
    image = data.splits['test'][0]['image']
    with h5py.File(root / 'testing.h5') as file:
        s1 = torch.from_numpy(file['sen1'][0].astype('float64')).movedim(-1, 0)
        s2 = torch.from_numpy(file['sen2'][0].astype('float64')).movedim(-1, 0)
    for band, channel in (('VH', 4), ('VV', 5)):
        expected = (10 * s1[channel].log10()).float()
        actual = image[data.bands.index(band)]
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(image[2], (10_000 * s2[0]).float())
    assert data.bands[2] == 'B02'


def test_pairs_with_different_labels_are_an_error(shared_data: Path) -> None:
    module = copernicus(shared_data / 'torchgeo', EUROSAT_S1, EUROSAT_S2)
    data = labelled_data(module)
    pairs: Any = data.splits['test']
    original = pairs.second

    class Relabelled(torch.utils.data.Dataset[Any]):
        bands = original.bands

        def __getitem__(self, index: int) -> Any:
            sample = original[index]
            return {**sample, 'label': sample['label'] + 1}

    pairs.second = Relabelled()
    with pytest.raises(ValueError, match="'label' of sample 0 differs"):
        pairs[0]
