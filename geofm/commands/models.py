"""Commands that measure a backbone."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import seed_everything
from torchgeo.datamodules import BaseDataModule

# Imported so that data modules can be named without their module; TorchGeo's already are.
import geofm.datamodules  # noqa: F401
from geofm.evaluation import (
    backbone_encoder,
    band_statistics_encoder,
    benchmark_knn,
    print_scores,
    write_scores,
)
from geofm.models import create_backbone, load_backbone, read_hparams


def benchmark(
    checkpoint: Path,
    data: BaseDataModule,
    output: Path | None = None,
    k: Sequence[int] = (5, 20),
    seed: int = 0,
    device: str = 'cpu',
) -> None:
    """Measure a pretrained backbone by k-NN, beside its floors.

    The floors are the same backbone with random weights, and the mean and standard deviation of
    every band.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        data: Labelled data: a classification data module.
        output: JSON file for the scores.
        k: Numbers of neighbours.
        seed: Seed of the random weights.
        device: Where to compute, e.g. cuda.
    """
    pretrained = load_backbone(checkpoint).to(device)
    seed_everything(seed, verbose=False)
    untrained = create_backbone(read_hparams(checkpoint)).eval().to(device)
    encoders = {
        'pretrained, CLS token': backbone_encoder(pretrained),
        'pretrained, mean of patches': backbone_encoder(pretrained, 'patches'),
        'random weights, CLS token': backbone_encoder(untrained),
        'random weights, mean of patches': backbone_encoder(untrained, 'patches'),
        'band mean and std': band_statistics_encoder,
    }
    scores = benchmark_knn(encoders, data, k, device)
    if output is not None:
        write_scores(scores, output)
    print_scores(scores, f'Accuracy on {scores[0].test} test images, {scores[0].train} in the bank')
