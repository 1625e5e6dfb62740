"""Real patches of EuroSAT with 13 bands; B8A is last in the files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import Dataset

from geofm.cli import main
from geofm.datamodules import LabelledFolderDataModule, NamedBandsDataModule
from geofm.evaluation import BackboneConfig, LabelledData, knn_predict, labelled_data
from geofm.evaluation.backbones import Backbone, build_backbone
from geofm.evaluation.data.naming import innermost
from geofm.evaluation.features import Features, split_features
from geofm.sensors import SENTINEL2
from tests.evaluation.labelled import TINY

FILES = ('B01', 'B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B09', 'B10', 'B11', 'B12', 'B8A')
ROOT = Path(__file__).resolve().parents[2]
MODEL: dict[str, Any] = {'model': 'geofm_vit_tiny_patch16_linear', 'model_args': TINY}


@pytest.fixture(scope='module')
def folder(shared_data: Path) -> Path:
    path = shared_data / 'real' / 'eurosat_ms_geotorch' / 'eurosat'
    if not path.is_dir():
        pytest.skip('needs the real EuroSAT patches')
    return path


class Shuffled(Dataset[Any]):
    """The same images with their channels reordered or left out."""

    def __init__(self, dataset: Any, channels: list[int]) -> None:
        self.dataset, self.channels = dataset, channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return {**sample, 'image': sample['image'][self.channels]}


class ShuffledModule(LabelledFolderDataModule):
    """The folder with another order of bands."""

    channels: list[int]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split in ('train', 'val', 'test'):
            dataset = getattr(self, f'{split}_dataset')
            setattr(self, f'{split}_dataset', Shuffled(dataset, self.channels))


def eurosat(folder: Path, channels: list[int] | None = None) -> LabelledData:
    module = ShuffledModule(folder, batch_size=32)
    module.channels = list(range(13)) if channels is None else channels
    return labelled_data(NamedBandsDataModule([FILES[i] for i in module.channels], module))


def features(backbone: Backbone, data: LabelledData) -> tuple[Features, Features]:
    train, test = (
        split_features(backbone.encoder, backbone.adapter, data, split)
        for split in ('train', 'test')
    )
    return train, test


def test_each_class_is_split_by_itself(folder: Path) -> None:
    data = LabelledFolderDataModule(folder)
    data.setup('fit')
    splits = [data.train_dataset, data.val_dataset, data.test_dataset]
    indices = [set(split.indices) for split in splits]  # type: ignore[union-attr]
    whole = innermost(data.train_dataset)
    assert sum(map(len, indices)) == len(set().union(*indices)) == len(whole) == 150
    labels = torch.tensor(whole.targets)
    for share, chosen in zip((0.6, 0.2, 0.2), indices, strict=True):
        counts = labels[sorted(chosen)].bincount(minlength=10)
        assert (counts == share * 15).all()


def test_band_order_does_not_change_predictions(folder: Path) -> None:
    plain = eurosat(folder)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(5)).tolist()
    shuffled = eurosat(folder, order)
    assert plain.bands == shuffled.bands == SENTINEL2.band_names
    config = BackboneConfig(**MODEL)
    found = [
        features(build_backbone(config, data.bands, {}, seed=0), data) for data in (plain, shuffled)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.targets, theirs.targets)
    predictions = [
        knn_predict(bank.values[:, 1], bank.targets, queries.values[:, 1], k=5)
        for bank, queries in found
    ]
    assert torch.equal(*predictions)


def test_leaving_out_b10_changes_little(folder: Path) -> None:
    """B10 does not reach the ground: its DN are about 10."""
    whole, less = eurosat(folder), eurosat(folder, [i for i in range(13) if FILES[i] != 'B10'])
    model = build_backbone(
        BackboneConfig(**MODEL, bands=list(SENTINEL2.band_names)), whole.bands, {}, 0
    )
    filled = build_backbone(
        BackboneConfig(**MODEL, bands=list(SENTINEL2.band_names), missing_bands='zero'),
        less.bands,
        {},
        0,
    )
    bank, queries = features(model, whole)
    less_bank, less_queries = features(filled, less)
    same = (
        knn_predict(bank.values[:, 1], bank.targets, queries.values[:, 1], k=5)
        == knn_predict(less_bank.values[:, 1], bank.targets, less_queries.values[:, 1], k=5)
    ).float()
    assert same.mean() >= 0.9


def test_the_benchmark_runs_from_yaml(folder: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / 'configs' / 'benchmark' / 'eurosat_folder.yaml').read_text())
    config['data']['init_args']['datamodule']['init_args']['root'] = str(folder)
    config['backbones'].append({**MODEL, 'name': 'ours'})
    path = tmp_path / 'eurosat.yaml'
    path.write_text(yaml.safe_dump(config))
    output = tmp_path / 'out'
    cache = tmp_path / 'features'
    main(['benchmark', f'--config={path}', f'--output={output}', f'--cache={cache}', '--steps=50'])
    names = {p.name for p in output.iterdir()}
    assert names == {'scores.json', 'scores.csv', 'scores.md', 'scores.png'}
    rows = yaml.safe_load((output / 'scores.json').read_text())['scores']
    assert {row['backbone'] for row in rows} == {'RCF', 'patch words', 'ours', 'band mean and std'}
    # Ten classes of three test images each.
    assert {row['test'] for row in rows} == {30}
    assert max(row['value'] for row in rows) > 0.5
