"""Test whether the order of bands, or a missing band, changes results on EuroSAT patches.

    python experiments/band_order.py --data EuroSAT_MS --checkpoint last.ckpt

*data* is a folder of GeoTIFFs for each class, its bands in the order of EuroSAT's files. Writes
`experiments/results/band_order.json` and `band_order.md`: 5-NN accuracy over five random splits,
and how many predictions stay as they are with all bands in the order of the files; and fills the
tables of docs.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchgeo.datamodules import BaseDataModule

from geofm.datamodules import LabelledFolderDataModule, NamedBandsDataModule
from geofm.evaluation import BackboneConfig, knn_predict, labelled_data
from geofm.evaluation.backbones import build_backbone
from geofm.evaluation.features import split_features

FILES = ('B01', 'B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B09', 'B10', 'B11', 'B12', 'B8A')

#: Random splits, each with a fifth of the images to test on.
SPLITS = 5


class Rearranged(Dataset[Any]):
    """Data set whose channels are reordered or reduced."""

    def __init__(self, dataset: Any, channels: list[int]) -> None:
        self.dataset, self.channels = dataset, channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return {**sample, 'image': sample['image'][self.channels]}


class RearrangedModule(LabelledFolderDataModule):
    """Data module of the folder with other bands than those of its files."""

    def __init__(self, root: Path, bands: list[str], seed: int) -> None:
        super().__init__(root, val_fraction=0.2, test_fraction=0.2, seed=seed)
        self.channels = [FILES.index(band) for band in bands]

    def setup(self, stage: str) -> None:
        """Create the data sets."""
        super().setup(stage)
        for split in ('train', 'val', 'test'):
            dataset = getattr(self, f'{split}_dataset')
            setattr(self, f'{split}_dataset', Rearranged(dataset, self.channels))


def predict(config: BackboneConfig, root: Path, bands: list[str]) -> tuple[Tensor, Tensor]:
    """Return 5-NN predictions and labels of the test images of all splits."""
    found, labels = [], []
    for seed in range(SPLITS):
        module: BaseDataModule = NamedBandsDataModule(bands, RearrangedModule(root, bands, seed))
        data = labelled_data(module)
        backbone = build_backbone(config, data.bands, {}, seed=0)
        bank, queries = (
            split_features(backbone.encoder, backbone.adapter, data, split)
            for split in ('train', 'test')
        )
        # The mean of the patches.
        found.append(knn_predict(bank.values[:, 1], bank.targets, queries.values[:, 1], k=5))
        labels.append(queries.targets)
    return torch.cat(found), torch.cat(labels)


def main() -> None:
    """Compare the band orders and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--checkpoint', type=Path, required=True)
    parser.add_argument('--output', type=Path, default=Path(__file__).parent / 'results')
    args = parser.parse_args()
    whole = list(FILES)
    order = torch.randperm(len(FILES), generator=torch.Generator().manual_seed(0)).tolist()
    less = [band for band in FILES if band != 'B10']
    config = BackboneConfig(str(args.checkpoint))
    cases: dict[str, tuple[list[str], BackboneConfig]] = {
        'all 13 bands, as in the files': (whole, config),
        'all 13 bands, shuffled': ([FILES[i] for i in order], config),
        'B10 missing, replaced by its mean': (less, replace(config, missing_bands='mean')),
        'B10 missing, replaced by zero': (less, replace(config, missing_bands='zero')),
    }
    reference, _ = predict(config, args.data, whole)
    rows = {}
    for name, (bands, chosen) in cases.items():
        found, labels = predict(chosen, args.data, bands)
        rows[name] = {
            'accuracy': (found == labels).float().mean().item(),
            'unchanged': (found == reference).float().mean().item(),
            'predictions': len(labels),
        }
    lines = ['| bands | 5-NN | predictions unchanged |', '|---|---:|---:|']
    lines += [
        f'| {name} | {100 * row["accuracy"]:.1f} % '
        f'| {100 * row["unchanged"]:.1f} % of {row["predictions"]} |'
        for name, row in rows.items()
    ]
    text = '\n'.join(lines)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in (('band_order.json', json.dumps(rows, indent=2)), ('band_order.md', text)):
        beside = args.output / f'.{name}.part'
        beside.write_text(content + '\n')
        beside.replace(args.output / name)
    tables.main()


if __name__ == '__main__':
    main()
