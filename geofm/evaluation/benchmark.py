"""Compare backbones with their floors on labelled data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchgeo.datamodules import BaseDataModule
from torchgeo.datasets.utils import Sample

from geofm.evaluation.features import Encoder, LabelledFeatures, extract_features
from geofm.evaluation.knn import knn_accuracy


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of a benchmark.

    Attributes:
        features: What was measured, e.g. 'pretrained'.
        probe: How, e.g. '5-NN'.
        accuracy: Share of test images labelled right, in [0, 1].
        train: Number of labelled images in the bank.
        test: Number of images to label.
    """

    features: str
    probe: str
    accuracy: float
    train: int
    test: int


def _loader(datamodule: BaseDataModule, split: str) -> DataLoader[Sample]:
    """All of a split, in order: a data module's own training loader shuffles and drops."""
    dataset: Dataset[Sample] = getattr(datamodule, f'{split}_dataset')
    return DataLoader(
        dataset,
        batch_size=datamodule.batch_size,
        num_workers=datamodule.num_workers,
        collate_fn=getattr(datamodule, 'collate_fn', None),
    )


def benchmark_knn(
    encoders: Mapping[str, Encoder],
    datamodule: BaseDataModule,
    k: Sequence[int] = (5, 20),
    device: torch.device | str = 'cpu',
) -> list[Score]:
    """k-NN accuracy of several kinds of features on the test split of labelled data.

    Args:
        encoders: From a normalised batch to features, by name.
        datamodule: Classification data; the training split is the bank.
        k: Numbers of neighbours.
        device: Where to compute.

    Returns:
        A score for each kind of features and number of neighbours.
    """
    datamodule.prepare_data()
    datamodule.setup('fit')
    datamodule.setup('test')
    scores = []
    for name, encoder in encoders.items():
        bank, queries = (
            extract_features(
                encoder, _loader(datamodule, split), datamodule.aug, device, f'{name}: {split}'
            )
            for split in ('train', 'test')
        )
        scores += [_score(name, bank, queries, neighbours) for neighbours in k]
    return scores


def _score(name: str, bank: LabelledFeatures, queries: LabelledFeatures, k: int) -> Score:
    accuracy = knn_accuracy(*bank, *queries, k=k)
    return Score(name, f'{k}-NN', accuracy, len(bank.labels), len(queries.labels))


def write_scores(scores: Sequence[Score], output: Path) -> None:
    """Write scores as JSON, beside and renamed into place.

    Args:
        scores: The scores.
        output: File to write.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f'.{output.name}.part')
    beside.write_text(json.dumps([asdict(score) for score in scores], indent=2) + '\n')
    beside.replace(output)


def print_scores(scores: Sequence[Score], title: str | None = None) -> None:
    """Print scores as a table, a row for each kind of features.

    Args:
        scores: The scores.
        title: Title of the table.
    """
    probes = list(dict.fromkeys(score.probe for score in scores))
    table = Table('features', title=title)
    for probe in probes:
        table.add_column(probe, justify='right')
    for name in dict.fromkeys(score.features for score in scores):
        cells = {s.probe: f'{100 * s.accuracy:.1f} %' for s in scores if s.features == name}
        table.add_row(name, *(cells[probe] for probe in probes))
    Console().print(table)
