"""Accuracy of a map of classes, with intervals from a bootstrap over spatial blocks.

Neighbouring pixels are correlated, so they are not independent samples. The bootstrap therefore
draws spatial blocks instead of pixels.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from geofm.atomic import atomic_file, write_atomically
from geofm.legend import NO_CLASS, Legend

#: Scores per class, in the order of the columns of tables.
CLASS_SCORES = ('iou', 'precision', 'recall', 'f1')

#: Scores of the whole map.
OVERALL_SCORES = ('accuracy', 'mean_iou', 'mean_f1')

_TITLES = {
    'accuracy': 'overall accuracy',
    'mean_iou': 'mean IoU',
    'mean_f1': 'mean F1',
    'iou': 'IoU',
    'precision': 'precision',
    'recall': 'recall',
    'f1': 'F1',
}

#: Maximum number of classes of a confusion matrix that is drawn with numbers.
_MOST_NUMBERED = 20

type Counts = npt.NDArray[np.int64]
type Labels = npt.NDArray[np.uint8]
type _Numbers = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A score with its 95 % interval; NaN if it is undefined.

    Attributes:
        value: The score, 0 to 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return '-'
        return f'{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]'

    def lines(self) -> str:
        """Return the score above its interval, for narrow columns of a terminal."""
        if math.isnan(self.value):
            return '-'
        return f'{self.value:.3f}\n[{self.low:.2f}, {self.high:.2f}]'

    def entry(self) -> dict[str, float | None]:
        """Return plain data for JSON, with null for NaN."""
        return {k: None if math.isnan(v) else v for k, v in self._asdict().items()}


@dataclass(frozen=True)
class Accuracy:
    """Agreement of a map of classes with a reference.

    Attributes:
        legend: The classes.
        confusion: Confusion matrix (K, K) in the order of the legend. Rows are classes of the
            reference, columns classes of the prediction.
        overall: The scores :data:`OVERALL_SCORES`. Means are over the classes that occur in the
            reference or the prediction.
        classes: The scores :data:`CLASS_SCORES` of each class, by name.
        blocks: Number of spatial blocks with samples.
        block: Side of a block as text, e.g. '256 px'.
        unpredicted: Number of samples of the reference without a prediction. They are not part of
            the scores.
        unit: Unit of the samples, e.g. 'pixels'.
    """

    legend: Legend
    confusion: Counts
    overall: Mapping[str, Estimate]
    classes: Mapping[str, Mapping[str, Estimate]]
    blocks: int
    block: str
    unpredicted: int = 0
    unit: str = 'pixels'

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.confusion.sum())

    @property
    def notes(self) -> list[str]:
        """Notes on how to interpret the scores."""
        lines = [
            f'{self.samples} {self.unit} in {self.blocks} blocks of {self.block}. Brackets are '
            '95 % intervals of a bootstrap over blocks.'
        ]
        if self.blocks == 1:
            lines = [
                f'{self.samples} {self.unit} in one block of {self.block}: intervals have no '
                'width, because they need several blocks.'
            ]
        elif self.blocks < 10:
            lines.append(f'With only {self.blocks} blocks, intervals are too narrow.')
        if self.unpredicted:
            lines.append(f'{self.unpredicted} {self.unit} of the reference have no prediction.')
        return lines

    def table(self, title: str = 'Accuracy') -> Table:
        """Return a table for the terminal.

        Args:
            title: Title of the table.

        Returns:
            A table of the scores of each class, with the scores of the whole map in the title. It
            fits into 80 columns.
        """
        overall = (f'{_TITLES[score]} {value}' for score, value in self.overall.items())
        table = Table(
            title=escape('\n'.join([title, *overall])),
            caption=escape(' '.join(self.notes)),
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
        )
        table.add_column('class')
        table.add_column(self.unit, justify='right', no_wrap=True)
        for score in CLASS_SCORES:
            table.add_column(_TITLES[score], justify='right', no_wrap=True)
        for name, count, scores in self._rows():
            table.add_row(escape(name), count, *(escape(score.lines()) for score in scores))
        return table

    def markdown(self, title: str = 'Accuracy') -> str:
        """Return the scores as Markdown tables.

        Args:
            title: Title of the text.

        Returns:
            The text.
        """
        lines = [f'# {title}', '', '| Score | Value [95 % interval] |', '|---|---|']
        lines += [f'| {_TITLES[score]} | {value} |' for score, value in self.overall.items()]
        lines += ['', f'| Class | {self.unit} | ' + ' | '.join(_TITLES[s] for s in CLASS_SCORES)]
        lines[-1] += ' |'
        lines.append('|---|---' + '|---' * len(CLASS_SCORES) + '|')
        for name, count, scores in self._rows():
            name = name.replace('|', r'\|')
            lines.append(f'| {name} | {count} | {" | ".join(map(str, scores))} |')
        return '\n'.join([*lines, '', *self.notes, ''])

    def as_json(self) -> dict[str, Any]:
        """Return plain data for JSON, with null for undefined scores."""
        return {
            'unit': self.unit,
            'samples': self.samples,
            'unpredicted': self.unpredicted,
            'blocks': self.blocks,
            'block': self.block,
            'overall': {score: value.entry() for score, value in self.overall.items()},
            'classes': {
                name: {score: value.entry() for score, value in scores.items()}
                for name, scores in self.classes.items()
            },
            'legend': self.legend.entry(),
            'confusion': self.confusion.tolist(),
            'notes': self.notes,
        }

    def figure(self, title: str = '') -> Figure:
        """Draw the confusion matrix: percentages of each class of the reference, and counts.

        Args:
            title: Title of the figure.

        Returns:
            The figure.
        """
        count = len(self.legend.classes)
        side = 2.6 + 0.62 * count
        figure = Figure(figsize=(min(side + 0.9, 22), min(side, 20)), layout='constrained')
        ax = figure.add_subplot()
        totals = self.confusion.sum(axis=1, keepdims=True)
        parts = np.where(totals > 0, self.confusion / np.maximum(totals, 1), np.nan)
        image = ax.imshow(parts, cmap=colormaps['Blues'].with_extremes(bad='0.92'), vmin=0, vmax=1)
        # Names come from files, and may contain a dollar sign, which is not a formula.
        names = self.legend.names
        ax.set_xticks(range(count), names, rotation=40, ha='right', rotation_mode='anchor')
        ax.set_yticks(range(count), names)
        for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            label.set_parse_math(False)
        ax.set_xlabel('prediction')
        ax.set_ylabel('reference')
        if count <= _MOST_NUMBERED:
            for i, j in np.ndindex(count, count):
                if totals[i, 0]:
                    text = f'{100 * parts[i, j]:.0f} %\n{_short(int(self.confusion[i, j]))}'
                    color = 'white' if parts[i, j] > 0.55 else '0.2'
                    ax.text(j, i, text, ha='center', va='center', fontsize=7, color=color)
        bar = figure.colorbar(image, ax=ax, shrink=0.8)
        bar.set_label('fraction of the reference')
        overall = '\n'.join(f'{_TITLES[s]} {value}' for s, value in self.overall.items())
        ax.set_title(f'{title}\n{overall}'.strip(), fontsize='small', parse_math=False)
        return figure

    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write the accuracy to files.

        Args:
            folder: Folder to write to. It is created if it does not exist.
            stem: Stem of the names of the files.

        Returns:
            The files: ``.json``, ``.md`` and a picture of the confusion matrix, ``.png``.
        """
        paths = [folder / f'{stem}{suffix}' for suffix in ('.json', '.md', '.png')]
        write_atomically(paths[0], json.dumps(self.as_json(), indent=1, ensure_ascii=False) + '\n')
        write_atomically(paths[1], self.markdown(stem))
        with atomic_file(paths[2]) as part:
            self.figure(stem).savefig(part, dpi=150)
        return paths

    def _rows(self) -> Iterator[tuple[str, str, list[Estimate]]]:
        """Return the name, the count in the reference and the scores of each class."""
        counts = self.confusion.sum(axis=1)
        for (name, scores), count in zip(self.classes.items(), counts, strict=True):
            yield name, str(count), [scores[score] for score in CLASS_SCORES]


@dataclass
class Confusions:
    """Confusion counts that are accumulated window by window, for scenes of any size.

    Attributes:
        legend: The classes.
        block: Side of a spatial block in pixels.
        unit: Unit of the samples.
        side: Side of a block as text. Default: *block* in px.
    """

    legend: Legend
    block: int = 256
    unit: str = 'pixels'
    side: str | None = None
    _confusion: Counts = field(init=False)
    _blocks: dict[tuple[int, ...], Counts] = field(init=False, default_factory=dict)
    _unpredicted: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Check the block.

        Raises:
            ValueError: If it is not positive.
        """
        if self.block < 1:
            raise ValueError(f'block {self.block}: a block must have at least one pixel')
        count = len(self.legend.classes)
        self._confusion = np.zeros((count, count), np.int64)

    def add(
        self, prediction: Labels, reference: Labels, row: int = 0, col: int = 0, scene: int = 0
    ) -> None:
        """Count a window.

        Args:
            prediction: Classes (H, W), with :data:`~geofm.legend.NO_CLASS` where there is none.
            reference: Classes (H, W), likewise.
            row: First row of the window in the scene.
            col: First column of the window in the scene.
            scene: Index of the scene. Scenes do not share blocks.

        Raises:
            ValueError: If the shapes differ, or a value is not in the legend.
        """
        if prediction.shape != reference.shape or prediction.ndim != 2:
            raise ValueError(
                f'prediction {prediction.shape} and reference {reference.shape} must have the same '
                'shape (H, W)'
            )
        labelled = reference != NO_CLASS
        rows, cols = np.nonzero(labelled)
        place = np.full(len(rows), scene)
        groups = np.stack([place, (rows + row) // self.block, (cols + col) // self.block], axis=1)
        self.add_samples(prediction[labelled], reference[labelled], groups)

    def add_samples(
        self, prediction: Labels, reference: Labels, groups: npt.NDArray[np.integer]
    ) -> None:
        """Count single samples.

        Args:
            prediction: Classes (N,).
            reference: Classes (N,).
            groups: Indices that identify the block of each sample, (N, ...).

        Raises:
            ValueError: If a value is not in the legend.
        """
        self._unpredicted += int(((prediction == NO_CLASS) & (reference != NO_CLASS)).sum())
        known = (prediction != NO_CLASS) & (reference != NO_CLASS)
        truth = self._indices(reference[known], 'reference')
        guess = self._indices(prediction[known], 'prediction')
        if not len(truth):
            return
        count = len(self.legend.classes)
        pairs = np.bincount(truth * count + guess, minlength=count**2)
        self._confusion += pairs.reshape(count, count)
        keys, which = np.unique(groups[known].reshape(len(truth), -1), axis=0, return_inverse=True)
        which = which.reshape(-1)
        # The scores need the correct, reference and predicted counts of each class.
        parts = []
        for chosen, values in ((truth == guess, truth), (None, truth), (None, guess)):
            flat = which * count + values
            flat = flat if chosen is None else flat[chosen]
            parts.append(np.bincount(flat, minlength=len(keys) * count).reshape(-1, count))
        for key, counts in zip(keys.tolist(), np.stack(parts, axis=1), strict=True):
            place = tuple(key)
            before = self._blocks.get(place)
            self._blocks[place] = counts if before is None else before + counts

    def accuracy(self, *, bootstrap: int = 500, seed: int = 0) -> Accuracy:
        """Compute the accuracy of all windows and samples that were added.

        Args:
            bootstrap: Number of resamples of the blocks.
            seed: Seed of the bootstrap.

        Returns:
            The accuracy.

        Raises:
            ValueError: If no sample was added.
        """
        if not self._blocks:
            raise ValueError(
                'no pixel has both a prediction and a reference; check that both cover the same '
                'place and that the reference has labels there'
            )
        # Sorted, so that the interval of a seed does not depend on the order of the windows.
        blocks = np.stack([self._blocks[key] for key in sorted(self._blocks)]).astype(np.float64)
        generator = np.random.default_rng(seed)
        equal = np.full(len(blocks), 1 / len(blocks))
        weights = generator.multinomial(len(blocks), equal, size=bootstrap).astype(np.float64)
        drawn = (weights @ blocks.reshape(len(blocks), -1)).reshape(bootstrap, 3, -1)
        value, draws = _scores(blocks.sum(axis=0)[None]), _scores(drawn)
        found = {name: _estimates(value[name][0], draws[name]) for name in value}
        return Accuracy(
            self.legend,
            self._confusion.copy(),
            {score: found[score][0] for score in OVERALL_SCORES},
            {
                name: {score: found[score][i] for score in CLASS_SCORES}
                for i, name in enumerate(self.legend.names)
            },
            len(blocks),
            self.side or f'{self.block} px',
            self._unpredicted,
            self.unit,
        )

    def _indices(self, values: Labels, what: str) -> npt.NDArray[np.intp]:
        """Return the positions of values in the legend."""
        table = np.full(NO_CLASS + 1, -1, np.intp)
        table[list(self.legend.values)] = np.arange(len(self.legend.values))
        indices = table[values]
        if (indices < 0).any():
            wrong = np.unique(values[indices < 0]).tolist()
            raise ValueError(
                f'the {what} has values {wrong}, which are not among the classes '
                f'({", ".join(f"{c.value} {c.name}" for c in self.legend.classes)})'
            )
        return indices


def _scores(counts: _Numbers) -> dict[str, _Numbers]:
    """Compute scores from correct, reference and predicted counts (N, 3, K).

    Scores are of shape (N, K) per class and (N, 1) of the whole map.
    """
    right, truth, guess = counts[:, 0], counts[:, 1], counts[:, 2]
    iou = _ratio(right, truth + guess - right)
    f1 = _ratio(2 * right, truth + guess)
    return {
        'accuracy': _ratio(right.sum(axis=1), truth.sum(axis=1))[:, None],
        'mean_iou': _mean(iou),
        'mean_f1': _mean(f1),
        'iou': iou,
        'precision': _ratio(right, guess),
        'recall': _ratio(right, truth),
        'f1': f1,
    }


def _ratio(part: _Numbers, whole: _Numbers) -> _Numbers:
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _mean(scores: _Numbers) -> _Numbers:
    """Compute the mean over classes (N, 1) of scores (N, K), leaving out NaN."""
    known = np.isfinite(scores)
    return _ratio(np.where(known, scores, 0).sum(axis=1), known.sum(axis=1).astype(float))[:, None]


def _estimates(values: _Numbers, draws: _Numbers) -> list[Estimate]:
    """Combine values (K,) with the percentiles of their resamples (N, K)."""
    found = []
    for value, column in zip(values, draws.T, strict=True):
        known = column[np.isfinite(column)]
        if math.isnan(value) or not len(known):
            found.append(Estimate(float(value), math.nan, math.nan))
        else:
            low, high = np.percentile(known, [2.5, 97.5])
            found.append(Estimate(float(value), float(low), float(high)))
    return found


def _short(count: int) -> str:
    """Abbreviate a count."""
    for unit, size in (('G', 10**9), ('M', 10**6), ('k', 10**3)):
        if count >= 10 * size:
            return f'{count / size:.0f}{unit}'
    return str(count)
