"""Labels and masks are checked before training and evaluation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from geofm.evaluation import ProbeSettings, labelled_data, run_benchmark
from geofm.evaluation.data import class_labels, class_mask, number_of_classes
from geofm.evaluation.report import Report
from tests.evaluation.test_data import Images, Module, wrap


def benchmark(ignore_index: int | None = None, **targets: Tensor) -> Report:
    """The report of the baseline of band statistics only."""
    images = Images(len(next(iter(targets.values()))), **targets)
    data = labelled_data(
        wrap(Module(train=images, val=images, test=images)), ignore_index=ignore_index
    )
    settings = ProbeSettings(['linear'], (1,), 5, 1, progress=False)
    return run_benchmark([], data, settings, None, lambda line: None)


def masks(void: int) -> Tensor:
    mask = torch.zeros(6, 16, 16, dtype=torch.int32)
    mask[:, :, 8:] = 1
    mask[2:, :2] = void
    return mask


@pytest.mark.parametrize('void', [256, 300, 65535, 2**31 - 1])
def test_a_mask_value_above_any_class_is_an_error(void: int) -> None:
    with pytest.raises(ValueError, match=f'masks have the value {void}.*set ignore_index'):
        benchmark(mask=masks(void))
    report = benchmark(ignore_index=void, mask=masks(void))
    assert report.classes == 2


@pytest.mark.parametrize('void', [99, 200, 254])
def test_a_mask_value_far_above_all_others_is_an_error(void: int) -> None:
    with pytest.raises(ValueError, match=f'label of {void}, far above.*up to 1.*ignore_index'):
        benchmark(mask=masks(void))
    assert benchmark(ignore_index=void, mask=masks(void)).classes == 2
    # If ignore_index is given, other values are accepted as classes.
    assert benchmark(ignore_index=77, mask=masks(void)).classes == void + 1


def test_classes_with_even_gaps_are_classes() -> None:
    values = torch.tensor([10, 20, 30, 40, 60, 80, 90, 95, 100])
    assert number_of_classes(values, 0, 'worldcover', '', trust=False) == 101


def test_more_classes_than_names_are_an_error() -> None:
    assert number_of_classes(torch.tensor([1, 2, 3]), 3, 'x', '', trust=False) == 4
    with pytest.raises(ValueError, match='label of 4, but only 3 classes have names'):
        number_of_classes(torch.tensor([1, 4]), 3, 'x', '', trust=False)


def test_labels_of_any_common_shape_are_the_same_labels() -> None:
    labels = torch.arange(12) % 3
    scores = [
        [(s.probe, s.metric, s.value) for s in benchmark(label=shape).scores]
        for shape in (labels, labels[:, None], labels.to(torch.int32))
    ]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (torch.tensor([0, 1, -1, 2]), 'label -1 is not a class'),
        (torch.tensor([[0], [1], [-1], [2]]), 'label -1 is not a class'),
        (torch.tensor([4, 4, 4, 4]), r'all labels are \[4\].*at least two classes'),
        (
            torch.tensor([[0, 1], [1, 0], [-1, 0], [0, 1]]),
            'label -1: labels of multi-label data must be 0 or 1',
        ),
        (torch.tensor([[0, 1], [1, 0], [7, 0], [0, 1]]), 'label 7: labels of multi-label'),
        (torch.tensor([0, 1, 2, 255]), 'label of 255, far above all others'),
    ],
)
def test_invalid_labels_are_a_one_line_error(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        benchmark(label=labels)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'labels', [torch.rand(3), torch.zeros(2, 3, 4, dtype=torch.long), torch.tensor(1)]
)
def test_labels_of_another_shape_are_an_error(labels: Tensor) -> None:
    with pytest.raises(ValueError, match='data: labels of shape'):
        class_labels(labels, 'data')


def test_padding_of_masks_is_ignored() -> None:
    mask: Any = torch.tensor([[[-1, 0, 255, 3]]], dtype=torch.int16)
    assert class_mask(mask, 255, 'data').tolist() == [[[255, 0, 255, 3]]]
