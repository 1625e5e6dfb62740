"""The report of a benchmark, as tables and files."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from geofm.atomic import write_atomically
from geofm.evaluation.data import LabelledData
from geofm.evaluation.metrics import NOT_FRACTIONS, PRIMARY, Metric, Prediction
from geofm.printing import printable

#: Number of test images whose maps are drawn.
PICTURED = 4


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one probe on one backbone.

    Attributes:
        backbone: Name of the backbone, e.g. 'last' or 'random weights'.
        features: Kind of features, e.g. 'CLS token'. Empty if the backbone has only one kind.
        probe: Name of the probe, e.g. '5-NN'.
        metric: Name of the metric, e.g. 'overall accuracy'.
        value: Value on the test split.
        low: Lower end of the 95 % interval of a bootstrap over test images.
        high: Upper end of the interval.
        train: Number of training images.
        test: Number of test images.
        chosen: Settings that were chosen on the validation split.
    """

    backbone: str
    features: str
    probe: str
    metric: str
    value: float
    low: float
    high: float
    train: int
    test: int
    chosen: str = ''

    @classmethod
    def of(
        cls, backbone: str, prediction: Prediction, metric: Metric, train: int, test: int
    ) -> 'Score':
        """Create the score of a prediction.

        Args:
            backbone: Name of the backbone.
            prediction: Prediction of the probe.
            metric: Metric of the prediction.
            train: Number of training images.
            test: Number of test images.

        Returns:
            The score.
        """
        return cls(
            backbone,
            prediction.features,
            prediction.probe,
            metric.name,
            metric.value,
            metric.low,
            metric.high,
            train,
            test,
            prediction.chosen,
        )

    @property
    def row(self) -> str:
        """Name of the score's row in tables."""
        return f'{self.backbone}, {self.features}' if self.features else self.backbone

    def text(self) -> str:
        """Return the value with its interval, in per cent if it is a fraction."""
        if self.metric in NOT_FRACTIONS:
            return f'{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]'
        return f'{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]'


@dataclass
class Report:
    """Results of a benchmark.

    Attributes:
        data: The data.
        say: Function that prints a note, called for each of :attr:`notes` as it is added.
        scores: The scores.
        notes: Notes on how to interpret the scores.
        maps: Predicted maps of the first test images by backbone and probe, for dense tasks.
        classes: Number of classes.
    """

    data: LabelledData
    say: Callable[[str], None]
    scores: list[Score] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    classes: int = 0

    def note(self, line: str) -> None:
        """Add a note, unless it was added before.

        Args:
            line: The note.
        """
        if line not in self.notes:
            self.notes.append(line)
            self.say(line)

    def keep_maps(self, backbone: str, prediction: Prediction) -> None:
        """Keep the maps of a few images, for dense tasks.

        Args:
            backbone: Name of the backbone.
            prediction: Its prediction.
        """
        if self.data.dense:
            self.maps[f'{backbone}, {prediction.probe}'] = prediction.scores[:PICTURED].clone()

    @property
    def title(self) -> str:
        """Description of the data in one line."""
        sizes = f'{self.data.size("train")} training and {self.data.size("test")} test images'
        return f'{self.data.name}, {self.data.task}: {sizes}'

    def columns(self) -> list[tuple[str, str]]:
        """Return the probe and the metric of each column, starting with the primary metric."""
        pairs = dict.fromkeys((score.probe, score.metric) for score in self.scores)
        primary = PRIMARY[self.data.task]
        return sorted(pairs, key=lambda pair: pair[1] != primary)

    def rows(self) -> dict[str, dict[tuple[str, str], Score]]:
        """Return the scores by row and column."""
        rows: dict[str, dict[tuple[str, str], Score]] = {}
        for score in self.scores:
            rows.setdefault(score.row, {})[score.probe, score.metric] = score
        return rows


def with_unit(metric: str) -> str:
    """Return the name of a metric with its unit.

    Args:
        metric: The metric.

    Returns:
        The name, followed by ', %' if the metric is a fraction.
    """
    return metric if metric in NOT_FRACTIONS else f'{metric}, %'


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a table for each metric, starting with the primary metric.

    Args:
        report: The report.
        console: Console to print to. Default: standard output.
    """
    console = console or Console()
    for metric in dict.fromkeys(metric for _, metric in report.columns()):
        columns = [column for column in report.columns() if column[1] == metric]
        table = Table(
            'backbone, features',
            title=Text(printable(f'{report.title}\n{with_unit(metric)}, 95 % interval', '\n')),
        )
        for probe, _ in columns:
            table.add_column(probe, justify='right')
        for name, cells in report.rows().items():
            # The interval is printed below the value, to fit the width of a terminal.
            texts = [cells[c].text().replace(' [', '\n[') if c in cells else '' for c in columns]
            if any(texts):
                table.add_row(Text(printable(name)), *texts)
        console.print(table)


def write_report(report: Report, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write scores as JSON, CSV and Markdown, atomically.

    Args:
        report: The report.
        folder: Folder to write to.
        settings: Settings of the benchmark, for the JSON file.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        'data': report.title,
        'bands': list(report.data.bands),
        'settings': dict(settings),
        'notes': report.notes,
        'scores': [_without_nan(asdict(score)) for score in report.scores],
    }
    texts = {
        # Undefined metrics are null, because JSON has no NaN.
        'scores.json': json.dumps(content, indent=2) + '\n',
        'scores.csv': _csv(report),
        'scores.md': markdown(report),
    }
    return [_write(folder / name, text) for name, text in texts.items()]


def markdown(report: Report) -> str:
    """Return a Markdown table of all scores, with the notes.

    Args:
        report: The report.

    Returns:
        The text.
    """
    columns = report.columns()
    heads = [f'{probe}, {with_unit(metric)}' for probe, metric in columns]
    lines = [
        '| backbone, features | ' + ' | '.join(heads) + ' |',
        '|---|' + '---:|' * len(columns),
    ]
    for name, cells in report.rows().items():
        texts = [cells[c].text() if c in cells else '' for c in columns]
        lines.append(f'| {name} | ' + ' | '.join(texts) + ' |')
    chosen = [f'- {s.row}, {s.probe}: {s.chosen}' for s in report.scores if s.chosen]
    notes = [f'- {note}' for note in report.notes]
    parts = ['\n'.join(lines), f'{report.title}. Bootstrap 95 % intervals over test images.']
    if chosen:
        parts.append('Chosen on the validation split:\n\n' + '\n'.join(dict.fromkeys(chosen)))
    if notes:
        parts.append('Notes:\n\n' + '\n'.join(notes))
    return '\n\n'.join(parts) + '\n'


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if v != v else v for k, v in values.items()}


def _csv(report: Report) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Score.__dataclass_fields__), lineterminator='\n')
    writer.writeheader()
    writer.writerows(asdict(score) for score in report.scores)
    return text.getvalue()


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text)
    return path


def pictured_samples(data: LabelledData) -> list[dict[str, Any]]:
    """Read the test images whose maps are kept.

    Args:
        data: The data.

    Returns:
        Samples with 'image' and 'target'.
    """
    batch = data.collate_fn(
        [data.splits['test'][i] for i in range(min(PICTURED, data.size('test')))]
    )
    targets = data.targets(batch)
    return [
        {'image': image, 'target': target}
        for image, target in zip(torch.as_tensor(batch['image']), targets, strict=True)
    ]
