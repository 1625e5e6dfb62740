"""Accuracy of maps, compared with scikit-learn."""

import io
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console
from sklearn import metrics

from geofm.evaluation.accuracy import Accuracy, Confusions, Labels
from geofm.legend import NO_CLASS, Legend

LEGEND = Legend.of({'water': 0, 'crop | $x$': 3, 'urban [red]': 7, 'snow': 9})


def assess(
    prediction: Labels, reference: Labels, legend: Legend, block: int, *, seed: int = 0
) -> Accuracy:
    confusions = Confusions(legend, block)
    confusions.add(prediction, reference)
    return confusions.accuracy(seed=seed)


def maps(seed: int = 0, side: int = 64) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A prediction and a reference without snow, which partly agree."""
    generator = np.random.default_rng(seed)
    reference = generator.choice(np.array([0, 3, 7], np.uint8), (side, side))
    wrong = generator.choice(np.array([0, 3, 7], np.uint8), (side, side))
    prediction = np.where(generator.random((side, side)) < 0.6, reference, wrong)
    reference[generator.random((side, side)) < 0.1] = NO_CLASS
    prediction[:5, :7] = NO_CLASS
    return prediction, reference


def test_scores_are_those_of_scikit_learn() -> None:
    """Every score, over the pixels with a class in both."""
    prediction, reference = maps()
    found = assess(prediction, reference, LEGEND, 16)
    known = (prediction != NO_CLASS) & (reference != NO_CLASS)
    truth, guess = reference[known], prediction[known]
    labels = [0, 3, 7]
    matrix = metrics.confusion_matrix(truth, guess, labels=LEGEND.values)
    np.testing.assert_array_equal(found.confusion, matrix)
    assert found.samples == known.sum()
    assert found.unpredicted == (~known & (reference != NO_CLASS)).sum()
    overall = {score: value.value for score, value in found.overall.items()}
    assert overall == pytest.approx(
        {
            'accuracy': metrics.accuracy_score(truth, guess),
            'mean_iou': metrics.jaccard_score(truth, guess, labels=labels, average='macro'),
            'mean_f1': metrics.f1_score(truth, guess, labels=labels, average='macro'),
        }
    )
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(truth, guess, labels=labels)
    iou = metrics.jaccard_score(truth, guess, labels=labels, average=None)
    for i, name in enumerate(LEGEND.names[:3]):
        scores = {score: value.value for score, value in found.classes[name].items()}
        wanted = {'iou': iou[i], 'precision': precision[i], 'recall': recall[i], 'f1': f1[i]}
        assert scores == pytest.approx(wanted)
    # Snow occurs in neither.
    assert all(math.isnan(value.value) for value in found.classes['snow'].values())


def test_windows_give_the_accuracy_of_the_whole_map() -> None:
    """Windows in any order, cut across blocks, give the same scores and intervals."""
    prediction, reference = maps(1)
    parts = Confusions(LEGEND, 16)
    windows = [(row, col) for row in range(0, 64, 20) for col in range(0, 64, 27)]
    for row, col in reversed(windows):
        where = (slice(row, row + 20), slice(col, col + 27))
        parts.add(prediction[where], reference[where], row, col)
    assert parts.accuracy().as_json() == assess(prediction, reference, LEGEND, 16).as_json()


def test_interval_contains_the_value_and_is_reproducible() -> None:
    """The interval contains the value and depends only on the seed."""
    prediction, reference = maps(2)
    first = assess(prediction, reference, LEGEND, 8)
    for value in first.overall.values():
        assert value.low < value.value < value.high
    assert first.overall == assess(prediction, reference, LEGEND, 8).overall
    assert first.overall != assess(prediction, reference, LEGEND, 8, seed=1).overall


def test_clustered_errors_widen_the_interval() -> None:
    """Errors in a quarter of the map give wider intervals than scattered errors."""
    reference = np.zeros((64, 64), np.uint8)
    scattered, clustered = reference.copy(), reference.copy()
    scattered[::2, ::2] = 3
    clustered[:32, :32] = 3
    widths = []
    for prediction in (scattered, clustered):
        value = assess(prediction, reference, LEGEND, 8).overall['accuracy']
        assert value.value == 0.75
        widths.append(value.high - value.low)
    assert widths[0] == 0
    # A quarter of 64 blocks is wrong, so the interval is binomial.
    assert widths[1] == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 64), rel=0.2)


def test_one_block_gives_an_interval_without_width() -> None:
    """A bootstrap needs several blocks."""
    found = assess(*maps(3), LEGEND, 64)
    value = found.overall['accuracy']
    assert value.low == value.value == value.high
    assert 'one block' in found.notes[0]


@pytest.mark.parametrize(
    ('prediction', 'reference', 'message'),
    [
        (np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 'same shape'),
        (np.full((2, 2), 5, np.uint8), np.zeros((2, 2), np.uint8), r'prediction has values \[5\]'),
        (np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8), r'reference has values \[1\]'),
        (np.zeros((2, 2), np.uint8), np.full((2, 2), NO_CLASS, np.uint8), 'no pixel has both'),
    ],
)
def test_wrong_maps(
    prediction: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8], message: str
) -> None:
    """Maps that cannot be compared are an error."""
    with pytest.raises(ValueError, match=message):
        assess(prediction, reference, LEGEND, 16)


def test_files(tmp_path: Path) -> None:
    """JSON, table and picture; names are not interpreted as markup."""
    found: Accuracy = assess(*maps(), LEGEND, 16)
    paths = found.save(tmp_path / 'new', 'scene')
    assert [path.name for path in paths] == ['scene.json', 'scene.md', 'scene.png']
    entry = json.loads(paths[0].read_text())
    assert entry == found.as_json()
    assert entry['classes']['snow']['iou']['value'] is None
    assert r'crop \| $x$' in paths[1].read_text()
    assert paths[2].stat().st_size > 10_000
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(found.table())
    shown = console.export_text()
    assert 'urban [red]' in shown
    # In a terminal of 80 columns, no interval is wrapped or truncated.
    assert f'overall accuracy {found.overall["accuracy"]}' in shown
    score = found.classes['urban [red]']['iou']
    assert f'[{score.low:.2f}, {score.high:.2f}]' in shown
    assert '…' not in shown
