import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torchmetrics.functional import r2_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from geofm.evaluation.metrics import (
    average_precision,
    bootstrap_sums,
    confusion,
    image_metrics,
    regression_metrics,
    regression_sums,
    segmentation_metrics,
)


def test_accuracies_equal_scikit_learn() -> None:
    targets = torch.randint(0, 4, (300,))
    scores = torch.randn(300, 4) + 2 * torch.nn.functional.one_hot(targets, 4)
    overall, average = image_metrics('classification', scores, targets)
    predictions = scores.argmax(1)
    assert overall.value == pytest.approx(sklearn.accuracy_score(targets, predictions))
    assert average.value == pytest.approx(sklearn.balanced_accuracy_score(targets, predictions))
    for metric in (overall, average):
        assert metric.low < metric.value < metric.high


def test_the_interval_of_a_fraction_is_binomial() -> None:
    """For many images, the interval is 1.96 standard errors to either side."""
    right, count = 700, 1000
    targets = torch.arange(count) % 2
    predictions = torch.where(torch.arange(count) < right, targets, 1 - targets)
    overall, _ = image_metrics('classification', torch.eye(2)[predictions], targets)
    error = 1.96 * (0.7 * 0.3 / count) ** 0.5
    assert overall.low == pytest.approx(0.7 - error, abs=0.006)
    assert overall.high == pytest.approx(0.7 + error, abs=0.006)


def test_multi_label_precision_equals_scikit_learn() -> None:
    targets = torch.randint(0, 2, (200, 5))
    # Fractions of votes have many ties.
    scores = ((targets + torch.randint(0, 4, targets.shape)) / 4).float()
    micro, macro, f1 = image_metrics('multilabel', scores, targets)
    y, s = targets.numpy(), scores.numpy()
    assert micro.value == pytest.approx(sklearn.average_precision_score(y, s, average='micro'))
    assert macro.value == pytest.approx(sklearn.average_precision_score(y, s, average='macro'))
    assert f1.value == pytest.approx(sklearn.f1_score(y, s > 0.5, average='micro'))
    for metric in (micro, macro, f1):
        assert metric.low < metric.value < metric.high


@pytest.mark.parametrize('classes', [2, 5])
def test_iou_equals_torchmetrics_without_ignored_pixels(classes: int) -> None:
    targets = torch.randint(0, classes, (6, 9, 7))
    predictions = torch.where(torch.rand(targets.shape) < 0.6, targets, 0)
    targets[torch.rand(targets.shape) < 0.2] = 255
    iou, accuracy = segmentation_metrics(confusion(predictions, targets, classes, 255))
    expected = multiclass_jaccard_index(predictions, targets, classes, ignore_index=255)
    assert iou.value == pytest.approx(expected.item(), abs=1e-6)
    counted = targets != 255
    assert accuracy.value == pytest.approx(
        (predictions == targets)[counted].float().mean().item(), abs=1e-6
    )
    assert iou.low <= iou.value <= iou.high


def test_regression_metrics_equal_torchmetrics_without_unknown_pixels() -> None:
    targets = 100 * torch.randn(5, 8, 8)
    predictions = targets + 20 * torch.randn(targets.shape)
    targets[torch.rand(targets.shape) < 0.1] = float('nan')
    known = targets.isfinite()
    r2, rmse = regression_metrics(regression_sums(predictions, targets))
    assert r2.value == pytest.approx(r2_score(predictions[known], targets[known]).item(), abs=1e-5)
    expected = sklearn.root_mean_squared_error(targets[known], predictions[known])
    assert rmse.value == pytest.approx(expected, rel=1e-5)


def test_a_resample_draws_as_many_rows_with_replacement() -> None:
    sums = bootstrap_sums(torch.ones(50, 1, dtype=torch.float64), 0)
    assert (sums == 50).all()
    spread = bootstrap_sums(torch.arange(50.0, dtype=torch.float64)[:, None], 0)
    expected = 50**0.5 * np.arange(50.0).std()
    assert spread.std().item() == pytest.approx(expected, rel=0.1)
    assert torch.equal(spread, bootstrap_sums(torch.arange(50.0, dtype=torch.float64)[:, None], 0))


def test_precision_of_a_resample_is_that_of_its_images() -> None:
    targets = torch.randint(0, 2, (60,))
    # Many ties, as in fractions of votes.
    scores = torch.randint(0, 8, (60,)) / 8
    drawn = torch.randint(60, (20, 60))
    counts = torch.stack([torch.bincount(rows, minlength=60) for rows in drawn]).double()
    expected = [sklearn.average_precision_score(targets[rows], scores[rows]) for rows in drawn]
    np.testing.assert_allclose(average_precision(scores, targets, counts), expected)


def test_a_label_without_images_is_left_out() -> None:
    targets = torch.randint(0, 2, (80, 3))
    scores = torch.rand(80, 3)
    _, without, _ = image_metrics('multilabel', scores[:, :2], targets[:, :2])
    targets[:, 2] = 0
    _, macro, _ = image_metrics('multilabel', scores, targets)
    assert macro.value == pytest.approx(without.value)
    assert macro.low < macro.value < macro.high
