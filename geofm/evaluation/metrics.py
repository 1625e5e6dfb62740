"""Predictions of probes and their metrics, with bootstrap intervals."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multilabel_average_precision,
    multilabel_f1_score,
)

from geofm.evaluation.data import Task

#: Number of resamples of the test images.
ROUNDS = 1000

#: Number of resamples for metrics that need the images sorted by score.
RANKED_ROUNDS = 200

#: Fraction of the resamples in the interval.
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predictions of a probe for the test split.

    Attributes:
        probe: Name of the probe, e.g. '5-NN'.
        features: Kind of features that was used. Empty if there is only one kind.
        scores: For images, a score for each class (N, C). For maps, classes int64 or values
            float32 (N, H, W).
        chosen: Settings that were chosen on the validation split.
    """

    probe: str
    features: str
    scores: Tensor
    chosen: str = ''


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric with its 95 % interval.

    Attributes:
        name: Name of the metric.
        value: Value on the test split.
        low: Lower end of the 95 % interval of a bootstrap over test images.
        high: Upper end of the interval.
    """

    name: str
    value: float
    low: float
    high: float


#: Metric of the charts and of the first columns of tables, by task.
PRIMARY: dict[Task, str] = {
    'classification': 'overall accuracy',
    'multilabel': 'mAP micro',
    'segmentation': 'mIoU',
    'regression': 'R2',
}

#: Metrics that are not fractions, and therefore not written in per cent.
NOT_FRACTIONS = ('R2', 'RMSE')


def image_metrics(task: Task, scores: Tensor, targets: Tensor, seed: int = 0) -> list[Metric]:
    """Compute metrics of predictions for images.

    Args:
        task: 'classification' or 'multilabel'.
        scores: Score of each class, of shape (N, C). For 'multilabel', probabilities.
        targets: Classes int64 (N,), or 0 and 1 int64 (N, C).
        seed: Seed of the bootstrap.

    Returns:
        For 'classification', overall and average accuracy. For 'multilabel', micro and macro mAP,
        and micro F1 at a threshold of 0.5.
    """
    if task == 'classification':
        return _accuracies(scores.argmax(dim=1), targets, scores.shape[1], seed)
    return _multilabel(scores, targets, seed)


def _accuracies(predictions: Tensor, targets: Tensor, classes: int, seed: int) -> list[Metric]:
    def value(average: str) -> float:
        # 'micro' is the accuracy over all images, 'macro' the mean of the accuracies of classes.
        return multiclass_accuracy(predictions, targets, classes, average=average).item()  # type: ignore[arg-type]

    of_class = torch.nn.functional.one_hot(targets, classes).double()
    right = of_class * (predictions == targets)[:, None]
    summed = bootstrap_sums(torch.cat([right, of_class], dim=1), seed)
    right_of, all_of = summed.tensor_split(2, dim=1)
    overall = right_of.sum(dim=1) / all_of.sum(dim=1)
    present = all_of > 0
    average = (right_of / all_of.clamp_min(1)).sum(dim=1) / present.sum(dim=1)
    return [
        Metric('overall accuracy', value('micro'), *interval(overall)),
        Metric('average accuracy', value('macro'), *interval(average)),
    ]


def _multilabel(scores: Tensor, targets: Tensor, seed: int) -> list[Metric]:
    classes = targets.shape[1]
    # More than half, consistent with the votes of k-NN.
    predictions = (scores > 0.5).long()
    of_class = multilabel_average_precision(scores, targets, classes, average='none')
    # The precision of labels that no test image has is undefined.
    shown = targets.sum(dim=0) > 0
    values = {
        'mAP micro': multilabel_average_precision(scores, targets, classes, average='micro'),
        'mAP macro': of_class[shown].mean(),
        'F1 micro': multilabel_f1_score(predictions, targets, classes, average='micro'),
    }
    counts = torch.stack(
        [
            torch.bincount(rows, minlength=len(targets))
            for rows in _draws(len(targets), RANKED_ROUNDS, seed)
        ]
    ).double()
    several = torch.stack(
        [average_precision(scores[:, i], targets[:, i], counts) for i in range(classes)]
    )
    parts = (predictions & targets, predictions | targets)
    both, either = bootstrap_sums(
        torch.stack([part.sum(dim=1) for part in parts], dim=1).double(), seed
    ).T
    spreads = {
        'mAP micro': average_precision(
            scores.flatten(), targets.flatten(), counts.repeat_interleave(classes, dim=1)
        ),
        'mAP macro': several.nanmean(dim=0),
        # F1 = 2 TP / (2 TP + FP + FN), where *both* is TP and *either* is TP + FP + FN.
        'F1 micro': 2 * both / (both + either).clamp_min(1),
    }
    return [Metric(name, values[name].item(), *interval(spreads[name])) for name in values]


def average_precision(scores: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Compute the average precision of many resamples at once.

    It is the mean over all positives of the precision at the positive's score. Rows with equal
    scores share a threshold.

    Args:
        scores: Scores of shape (N,).
        targets: 0 and 1, of shape (N,).
        counts: Number of times that each row occurs in each resample, of shape (R, N).

    Returns:
        Average precision of shape (R,); NaN for resamples without positives.
    """
    order = scores.argsort(descending=True)
    ranked = scores[order]
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])
    results = []
    # A few resamples at a time, to save memory.
    for drawn in counts.split(16):
        weights = drawn[:, order]
        true = (weights * targets[order]).cumsum(dim=1)[:, last]
        every = weights.cumsum(dim=1)[:, last]
        gained = true.diff(dim=1, prepend=torch.zeros(len(true), 1))
        precision = true / every.clamp_min(1)
        results.append((gained * precision).sum(dim=1) / true[:, -1])
    return torch.cat(results)


def confusion(predictions: Tensor, targets: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Compute the confusion matrix of each map.

    Args:
        predictions: Classes int64 (N, H, W).
        targets: Classes int64 (N, H, W).
        classes: Number of classes C.
        ignore_index: Value of pixels that are ignored.

    Returns:
        Number of pixels by target and prediction, float64 of shape (N, C, C).
    """
    counted = targets != ignore_index
    image = torch.arange(len(targets)).view(-1, 1, 1).expand_as(targets)
    cell = (image * classes + targets) * classes + predictions
    counts = torch.bincount(cell[counted], minlength=len(targets) * classes * classes)
    return counts.view(len(targets), classes, classes).double()


def segmentation_metrics(confusions: Tensor, seed: int = 0) -> list[Metric]:
    """Compute metrics of maps of classes.

    Args:
        confusions: Confusion matrix of each map, of shape (N, C, C).
        seed: Seed of the bootstrap.

    Returns:
        mIoU over the classes that occur in targets or predictions, and pixel accuracy.
    """
    resampled = bootstrap_sums(confusions.flatten(1), seed).unflatten(1, confusions.shape[1:])
    every = confusions.sum(dim=0, keepdim=True)
    return [
        Metric(name, metric(every).item(), *interval(metric(resampled)))
        for name, metric in (('mIoU', mean_iou), ('pixel accuracy', _pixel_accuracy))
    ]


def mean_iou(confusions: Tensor) -> Tensor:
    """Compute the mIoU of confusion matrices (..., C, C), as torchmetrics' macro average."""
    right = confusions.diagonal(dim1=-2, dim2=-1)
    union = confusions.sum(dim=-1) + confusions.sum(dim=-2) - right
    return (right / union.clamp_min(1)).sum(dim=-1) / (union > 0).sum(dim=-1).clamp_min(1)


def _pixel_accuracy(confusions: Tensor) -> Tensor:
    right = confusions.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return right / confusions.sum(dim=(-2, -1)).clamp_min(1)


def regression_sums(predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute the sums from which RMSE and R2 are computed.

    Args:
        predictions: Values (N, H, W).
        targets: Values (N, H, W), NaN where unknown.

    Returns:
        Number of pixels, sums of the targets, their squares and the squared errors, float64 of
        shape (N, 4).
    """
    known = targets.isfinite()
    y = targets.double().masked_fill(~known, 0.0)
    error = (predictions.double() - y).masked_fill(~known, 0.0)
    parts = (known.double(), y, y.square(), error.square())
    return torch.stack([part.flatten(1).sum(dim=1) for part in parts], dim=1)


def regression_metrics(sums: Tensor, seed: int = 0) -> list[Metric]:
    """Compute the metrics of predicted maps of continuous values.

    Args:
        sums: Sums of :func:`regression_sums`.
        seed: Seed of the bootstrap.

    Returns:
        R2, and RMSE over all pixels in the unit of the target.
    """
    resampled, every = bootstrap_sums(sums, seed), sums.sum(dim=0, keepdim=True)
    return [
        Metric(name, metric(every).item(), *interval(metric(resampled)))
        for name, metric in (('R2', r2), ('RMSE', _rmse))
    ]


def r2(sums: Tensor) -> Tensor:
    """Compute the fraction of the variance explained from sums (..., 4)."""
    count, total, squares, error = sums.unbind(dim=-1)
    return 1 - error / (squares - total.square() / count.clamp_min(1)).clamp_min(1e-12)


def _rmse(sums: Tensor) -> Tensor:
    return (sums[..., 3] / sums[..., 0].clamp_min(1)).sqrt()


def bootstrap_sums(values: Tensor, seed: int) -> Tensor:
    """Compute sums over resamples of the rows, drawn with replacement.

    Args:
        values: Values of shape (N, K).
        seed: Seed of the draws.

    Returns:
        Sums of shape (R, K) for R resamples.
    """
    count = len(values)
    sums = values.new_empty(ROUNDS, values.shape[1])
    for i, rows in enumerate(_draws(count, ROUNDS, seed)):
        sums[i] = torch.bincount(rows, minlength=count).to(values.dtype) @ values
    return sums


def _draws(count: int, rounds: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(count, (count,), generator=generator) for _ in range(rounds)]


def interval(resampled: Tensor) -> tuple[float, float]:
    """Return the 95 % percentile interval of a bootstrap.

    Args:
        resampled: Metric of each resample.

    Returns:
        Lower and upper end.
    """
    tail = (1 - LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    known = resampled.double()[resampled.isfinite()]
    if not len(known):
        return float('nan'), float('nan')
    low, high = known.quantile(ends).tolist()
    return low, high
