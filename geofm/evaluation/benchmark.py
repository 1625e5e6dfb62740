"""Evaluating backbones on labelled data, compared with baselines."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.markup import escape
from torch import Tensor

from geofm.evaluation.backbones import (
    Backbone,
    BackboneConfig,
    build_backbone,
    statistics_backbone,
)
from geofm.evaluation.data import SPLITS, LabelledData, Split, number_of_classes
from geofm.evaluation.features import (
    FeatureCache,
    Features,
    feature_key,
    prepared_batches,
    split_features,
)
from geofm.evaluation.metrics import (
    Metric,
    Prediction,
    confusion,
    image_metrics,
    regression_metrics,
    regression_sums,
    segmentation_metrics,
)
from geofm.evaluation.probes.decoders import Decoder, UnsuitableError, decoder_probe
from geofm.evaluation.probes.dense import dense_probe
from geofm.evaluation.probes.images import knn_probe, linear_probe, logistic_probe
from geofm.evaluation.report import Report, Score
from geofm.printing import printable

#: Names of probes. DPT and UPerNet are decoders, trained on a frozen or a fine-tuned backbone.
Probe = Literal[
    'knn', 'knn_whitened', 'linear', 'logistic', 'dpt', 'dpt_tuned', 'upernet', 'upernet_tuned'
]

IMAGE_PROBES: tuple[Probe, ...] = ('knn', 'knn_whitened', 'linear', 'logistic')
#: Default probes of images.
DEFAULT_PROBES: tuple[Probe, ...] = ('knn', 'linear', 'logistic')
DECODERS: dict[Probe, Decoder] = {
    'dpt': Decoder('dpt', tuned=False),
    'dpt_tuned': Decoder('dpt', tuned=True),
    'upernet': Decoder('upernet', tuned=False),
    'upernet_tuned': Decoder('upernet', tuned=True),
}
DENSE_PROBES: tuple[Probe, ...] = ('linear', *DECODERS)

#: Name of the baseline with random weights.
RANDOM = 'random weights'

#: Number of maps whose metrics are computed at once.
_MAPS = 64


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How probes are run.

    Attributes:
        probes: Names of probes. None: k-NN, linear and logistic for images; linear for maps.
        k: Numbers of neighbours.
        steps: Number of steps of the linear probe.
        epochs: Number of epochs of DPT and UPerNet.
        seed: Seed of all random draws.
        device: Device on which features are computed and decoders are trained.
        progress: Whether to show progress bars.
    """

    probes: Sequence[Probe] | None = None
    k: Sequence[int] = (5, 20)
    steps: int = 2000
    epochs: int = 10
    seed: int = 0
    device: str = 'cpu'
    progress: bool = True


def run_benchmark(
    configs: Sequence[BackboneConfig],
    data: LabelledData,
    settings: ProbeSettings,
    cache_folder: Path | None,
    say: Callable[[str], None],
) -> Report:
    """Evaluate backbones, compared with band statistics and architectures with random weights.

    Args:
        configs: The backbones.
        data: The data.
        settings: How probes are run.
        cache_folder: Folder in which features are kept. None: features are not kept.
        say: Function that prints a note, called for each note as it is added.

    Returns:
        The scores, the notes, and maps of a few test images.

    Raises:
        BandError: If the data lack bands that a backbone needs.
        CheckpointError: If weights cannot be read or downloaded.
        ValueError: If a probe does not fit the task, or a target is invalid.
    """
    report = Report(data, say)
    for line in data.notes:
        report.note(line)
    probes = _probes(settings, data)
    cache = FeatureCache(cache_folder, report.note)
    classes: int | None = None
    for backbone in _backbones(configs, data, settings.seed):
        for line in backbone.lines:
            report.note(line)
        if data.dense and not backbone.encoder.gives_patches:
            report.note(f'{backbone.name}: left out, because it has no feature maps')
            continue
        splits = {
            split: cached_features(backbone, data, split, settings, cache) for split in SPLITS
        }
        for line in backbone.adapter.lines:
            report.note(f'{backbone.name}: {line}')
        if classes is None:
            _require_known(splits, data)
            classes = _classes(splits, data)
        for prediction in _predictions(probes, backbone, splits, data, classes, settings, report):
            metrics = score(prediction.scores, splits['test'].targets, data, classes, settings.seed)
            sizes = len(splits['train'].targets), len(splits['test'].targets)
            report.scores += [Score.of(backbone.name, prediction, m, *sizes) for m in metrics]
            report.keep_maps(backbone.name, prediction)
    report.classes = classes or 0
    return report


def score(
    predictions: Tensor, targets: Tensor, data: LabelledData, classes: int, seed: int
) -> list[Metric]:
    """Compute metrics of predictions for the test split.

    Args:
        predictions: Scores (N, C) of images, or maps (N, H, W).
        targets: Targets of the test split.
        data: The data.
        classes: Number of classes.
        seed: Seed of the bootstrap.

    Returns:
        Metrics with their intervals. The first is the primary metric of the task.
    """
    if data.task == 'classification' or data.task == 'multilabel':
        return image_metrics(data.task, predictions, targets, seed)
    pairs = list(zip(predictions.split(_MAPS), targets.split(_MAPS), strict=True))
    if data.task == 'segmentation':
        counts = [confusion(p, t, classes, data.ignore_index) for p, t in pairs]
        return segmentation_metrics(torch.cat(counts), seed)
    return regression_metrics(torch.cat([regression_sums(p, t) for p, t in pairs]), seed)


def _probes(settings: ProbeSettings, data: LabelledData) -> Sequence[Probe]:
    possible = DENSE_PROBES if data.dense else IMAGE_PROBES
    probes: Sequence[Probe] = settings.probes or (('linear',) if data.dense else DEFAULT_PROBES)
    unknown = [probe for probe in probes if probe not in possible]
    if unknown:
        known = [probe for probe in get_args(Probe) if probe in possible]
        raise ValueError(
            f'{data.name}: probes {unknown} are not available for {data.task}: use {known}'
        )
    return probes


def _backbones(
    configs: Sequence[BackboneConfig], data: LabelledData, seed: int
) -> Iterator[Backbone]:
    """Build the backbones, then the baselines.

    The baselines are random weights, once per architecture, and band statistics.
    """
    architectures: dict[str, BackboneConfig] = {}
    names: set[str] = set()
    random: set[str] = set()
    for config in configs:
        backbone = build_backbone(config, data.bands, data.statistics, seed)
        if backbone.name in names:
            raise ValueError(f"two backbones are named '{backbone.name}': give each its own name")
        prepared = prepared_batches(backbone.adapter, data, 'train')
        backbone.encoder.learn(prepared, data.size('train'), seed)
        names.add(backbone.name)
        if backbone.architecture is not None:
            if backbone.learned:
                architectures.setdefault(backbone.architecture, config)
            else:
                random.add(backbone.architecture)
        yield backbone
    baselines = {a: config for a, config in architectures.items() if a not in random}
    for config in baselines.values():
        backbone = build_backbone(config, data.bands, data.statistics, seed, random=True)
        name = RANDOM if len(baselines) == 1 else f'{RANDOM}: {backbone.name}'
        yield replace(backbone, name=name, lines=[])
    yield statistics_backbone(data.bands, data.statistics)


def cached_features(
    backbone: Backbone,
    data: LabelledData,
    split: Split,
    settings: ProbeSettings,
    cache: FeatureCache,
) -> Features:
    """Return the features of a split, computed unless they are in the cache.

    Args:
        backbone: The backbone.
        data: The data.
        split: The split.
        settings: Device, and whether to show progress.
        cache: Cache of features.

    Returns:
        Features and targets, on the CPU.
    """
    encoder = backbone.encoder
    key = feature_key(encoder, backbone.adapter, data, split, settings.device)
    description = None
    if settings.progress:
        description = escape(printable(f'{backbone.name}: {split}'))
    encoder.to(settings.device)
    try:
        return cache.get(
            key,
            lambda: split_features(
                encoder, backbone.adapter, data, split, settings.device, description
            ),
        )
    finally:
        encoder.cpu()


def _require_known(splits: dict[Split, Features], data: LabelledData) -> None:
    """Raise an error if all pixels of a split's masks are ignored."""
    for split in SPLITS if data.dense else ():
        targets = splits[split].targets
        known = targets.isfinite() if data.task == 'regression' else targets != data.ignore_index
        if not known.any():
            raise ValueError(
                f'{data.name}: every pixel of the masks of the {split} split is '
                + ('NaN' if data.task == 'regression' else f'{data.ignore_index} (ignore_index)')
                + ': probes can be neither trained nor evaluated'
            )


def _classes(splits: dict[Split, Features], data: LabelledData) -> int:
    """Return the number of classes, from their names or from the data."""
    targets = [splits[split].targets for split in SPLITS]
    if data.task == 'regression':
        return 1
    if data.task == 'multilabel':
        return targets[0].shape[1]
    values = torch.cat([t.unique() for t in targets])
    advice = 'Remove images without a label from the data set'
    if data.dense:
        values = values[values != data.ignore_index]
        advice = 'If it means no data, set ignore_index to it'
    return number_of_classes(values, len(data.classes), data.name, advice, data.says_nodata)


def _predictions(
    probes: Sequence[Probe],
    backbone: Backbone,
    splits: dict[Split, Features],
    data: LabelledData,
    classes: int,
    settings: ProbeSettings,
    report: Report,
) -> Iterator[Prediction]:
    encoder, seed, progress = backbone.encoder, settings.seed, settings.progress
    for probe in probes:
        if probe in ('knn', 'knn_whitened'):
            bank = len(splits['train'].targets)
            whitened = probe == 'knn_whitened'
            if whitened and bank < 2:
                report.note('k-NN of whitened features left out: there is only 1 training image')
                continue
            if too_many := [k for k in settings.k if k > bank]:
                report.note(f'k = {too_many} left out: there are only {bank} training images')
            ks = [k for k in settings.k if k <= bank]
            if ks:
                yield from knn_probe(splits, encoder.features, ks, classes, whitened)
        elif probe == 'logistic':
            yield from logistic_probe(splits, encoder.features, data.task, classes, progress)
        elif probe == 'linear' and data.dense:
            yield dense_probe(
                splits,
                data.task,
                classes,
                data.ignore_index,
                settings.steps,
                seed,
                progress=progress,
            )
        elif probe == 'linear':
            yield linear_probe(
                splits,
                encoder.features,
                encoder.inputs,
                data.task,
                classes,
                settings.steps,
                seed,
                progress=progress,
            )
        else:
            try:
                yield decoder_probe(
                    DECODERS[probe],
                    backbone,
                    data,
                    splits['train'].targets,
                    classes,
                    settings.epochs,
                    seed,
                    settings.device,
                    progress,
                )
            except UnsuitableError as error:
                if backbone.model is not None:
                    report.note(f'{DECODERS[probe].name}: left out: {error}')
