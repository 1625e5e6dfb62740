from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification, make_multilabel_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from geofm.evaluation.data import Split
from geofm.evaluation.features import Features
from geofm.evaluation.probes.dense import dense_probe, patch_targets
from geofm.evaluation.probes.heads import Link, train_heads
from geofm.evaluation.probes.images import linear_probe, logistic_probe


def split_up(features: Any, targets: Any, sizes: tuple[int, ...]) -> dict[Split, Features]:
    x = torch.as_tensor(np.asarray(features), dtype=torch.float32)[:, None]
    y = torch.as_tensor(np.asarray(targets)).long()
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    names: tuple[Split, ...] = ('train', 'val', 'test')
    return {name: Features(*part) for name, part in zip(names, parts, strict=True)}


@pytest.fixture(scope='module')
def classes() -> dict[Split, Features]:
    """Five overlapping classes, of which a linear head predicts about 80 % correctly."""
    x, y = make_classification(
        9000, 16, n_informative=10, n_classes=5, n_clusters_per_class=1, class_sep=1.1,
        flip_y=0.05, random_state=0,
    )  # fmt: skip
    return split_up(x, y, (4000, 1000, 4000))


def reference_accuracy(splits: dict[Split, Features]) -> float:
    train, test = splits['train'], splits['test']
    model = LogisticRegression(max_iter=1000).fit(train.values[:, 0], train.targets)
    return float(model.score(test.values[:, 0], test.targets))


def test_the_linear_probe_is_as_good_as_logistic_regression(
    classes: dict[Split, Features],
) -> None:
    found = linear_probe(
        classes, {'': (0,)}, {'all': (0,)}, 'classification', 5, 2000, 0, progress=False
    )
    accuracy = (found.scores.argmax(1) == classes['test'].targets).float().mean().item()
    expected = reference_accuracy(classes)
    assert 0.6 < expected < 0.95
    assert accuracy == pytest.approx(expected, abs=0.005)


def test_the_logistic_probe_equals_scikit_learn(classes: dict[Split, Features]) -> None:
    (found,) = logistic_probe(classes, {'': (0,)}, 'classification', 5, progress=False)
    accuracy = (found.scores.argmax(1) == classes['test'].targets).float().mean().item()
    assert accuracy == pytest.approx(reference_accuracy(classes), abs=0.005)


def test_multi_label_probes_are_as_good_as_logistic_regression() -> None:
    x, y = make_multilabel_classification(
        5000, 20, n_classes=6, n_labels=2, length=20, random_state=0
    )
    splits = split_up(x, y, (2500, 500, 2000))
    test = splits['test'].targets.numpy()
    model = OneVsRestClassifier(LogisticRegression(max_iter=2000)).fit(x[:2500], y[:2500])
    expected = average_precision_score(test, model.predict_proba(x[3000:]), average='micro')
    linear = linear_probe(
        splits, {'': (0,)}, {'all': (0,)}, 'multilabel', 6, 600, 0, progress=False
    )
    (logistic,) = logistic_probe(splits, {'': (0,)}, 'multilabel', 6, progress=False)
    for found in (linear, logistic):
        precision = average_precision_score(test, found.scores.numpy(), average='micro')
        assert precision == pytest.approx(expected, abs=0.005), found.probe


@pytest.mark.parametrize('link', ['softmax', 'sigmoid', 'identity'])
def test_heads_trained_together_equal_heads_trained_alone(link: Link) -> None:
    features, targets = torch.randn(200, 6), one_hot(torch.randint(0, 3, (200,)), 3).float()
    looks_at = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0]]).bool().repeat_interleave(2, dim=0)
    rates = (0.1, 0.01, 0.05)

    def train(heads: list[int]) -> Any:
        generator = torch.Generator().manual_seed(3)
        chosen = [rates[h] for h in heads]
        return train_heads(features, targets, looks_at[:, heads], chosen, link, 40, 32, generator)

    together = train([0, 1, 2])
    for head in range(3):
        alone = train([head])
        torch.testing.assert_close(together.weight[:, head], alone.weight[:, 0])
        torch.testing.assert_close(together.bias[head], alone.bias[0])
    assert (together.weight[2:4, 1] == 0).all()
    assert (together.weight[4:, 2] == 0).all()


def test_a_step_equals_torch_sgd() -> None:
    """The gradient is computed explicitly and must equal that of autograd."""
    features, labels = torch.randn(64, 5), torch.randint(0, 3, (64,))
    shares = 0.8 * one_hot(labels, 3).float() + 0.2 / 3
    weights = torch.rand(64)
    heads = train_heads(
        features, shares, torch.ones(5, 1, dtype=torch.bool), [0.4], 'softmax', 7, 64,
        torch.Generator().manual_seed(0), weights,
    )  # fmt: skip
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.4 * 64 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    x = (features - features.mean(0)) / features.std(0, correction=0)
    for _ in range(7):
        optimizer.zero_grad()
        losses = cross_entropy(layer(x), shares, reduction='none')
        (losses * weights).sum().div(weights.sum()).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(heads.outputs(features, 0), layer(x), atol=1e-5, rtol=1e-4)


def test_a_diverging_head_does_not_affect_others() -> None:
    features, targets = torch.randn(300, 4), one_hot(torch.randint(0, 2, (300,)), 2).float()
    looks_at = torch.ones(4, 2, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    heads = train_heads(
        features, targets, looks_at, [1e30, 0.1], 'identity', 60, 64, generator
    )  # fmt: skip
    assert not heads.weight[:, 0].isfinite().all()
    assert heads.weight[:, 1].isfinite().all()


def pixels(maps: Tensor) -> Tensor:
    return maps.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)


def test_a_linear_head_predicts_maps_of_classes() -> None:
    """The class is the largest of three features; ignored pixels have no effect."""
    splits: dict[Split, Features] = {}
    for split in ('train', 'val', 'test'):
        values = torch.randn(12, 8, 6, 6)
        maps = pixels(values[:, :3].argmax(dim=1))
        maps[:, :4, :4] = 255
        splits[split] = Features(values, maps)
    found = dense_probe(splits, 'segmentation', 3, 255, 400, 0, progress=False)
    truth = splits['test'].targets
    counted = truth != 255
    assert found.scores.shape == truth.shape
    # Bilinear interpolation is inexact at the borders of patches.
    centers = found.scores[:, 1::4, 1::4] == truth[:, 1::4, 1::4]
    assert centers[counted[:, 1::4, 1::4]].float().mean() > 0.8


def test_a_linear_head_predicts_values_in_their_unit() -> None:
    splits: dict[Split, Features] = {}
    for split in ('train', 'val', 'test'):
        values = torch.randn(12, 5, 6, 6)
        heights = 300 + 40 * values[:, 0] - 20 * values[:, 3]
        maps = heights.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        maps[0, :2, :2] = float('nan')
        splits[split] = Features(values, maps)
    found = dense_probe(splits, 'regression', 1, 255, 500, 0, progress=False)
    # With patches of 2 px, every pixel is interpolated between two patches.
    center = torch.nn.functional.avg_pool2d(found.scores[:, None], 2)[1:, 0]
    truth = splits['test'].targets[1:, ::2, ::2]
    residual = (center - truth).square().mean() / truth.var()
    assert residual < 0.2
    assert found.scores.mean().item() == pytest.approx(300, abs=10)


def test_patch_targets_are_fractions_of_classes() -> None:
    maps = torch.zeros(1, 4, 4, dtype=torch.long)
    maps[0, :2, 1] = 1
    maps[0, 2:, :2] = 255
    maps[0, 3, 3] = 255
    shares, counted = patch_targets(maps, (2, 2), 'segmentation', 2, 255)
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5], [1, 0], [0, 0], [1, 0]]))
    torch.testing.assert_close(counted, torch.tensor([1.0, 1.0, 0.0, 0.75]))


def test_one_class_in_the_training_images_is_not_an_error() -> None:
    splits = split_up(torch.randn(9, 4), [1] * 5 + [0, 1, 0, 1], (5, 2, 2))
    (found,) = logistic_probe(splits, {'': (0,)}, 'classification', 2, progress=False)
    assert found.scores.argmax(1).tolist() == [1, 1]
