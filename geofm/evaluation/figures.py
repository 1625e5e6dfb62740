"""Figures of a benchmark."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from geofm.atomic import atomic_file
from geofm.datasets import colours, compose, drawing_order, stretch
from geofm.evaluation.metrics import NOT_FRACTIONS, PRIMARY
from geofm.evaluation.report import Report, pictured_samples, with_unit

_DPI = 150
_CLASSES = colormaps['tab20']


def plot_scores(report: Report) -> Figure:
    """Draw a bar chart of the primary metric with intervals, for each row and probe.

    Args:
        report: The report.

    Returns:
        The figure.
    """
    metric = PRIMARY[report.data.task]
    rows = {
        name: {probe: s for (probe, m), s in cells.items() if m == metric}
        for name, cells in report.rows().items()
    }
    probes = list(dict.fromkeys(probe for cells in rows.values() for probe in cells))
    bars = [(name, probe) for name, cells in rows.items() for probe in probes if probe in cells]
    # Narrow, so that the text can be read on a phone.
    figure = Figure(figsize=(5.5, 1.2 + 0.28 * len(bars) + 0.12 * len(rows)), layout='constrained')
    ax = figure.add_subplot()
    percent = 1 if metric in NOT_FRACTIONS else 100
    colors = colormaps['tab10'].colors  # type: ignore[attr-defined]
    place, ticks, labels = 0.0, [], []
    for name, cells in rows.items():
        start = place
        for probe, score in sorted(cells.items(), key=lambda item: probes.index(item[0])):
            value = percent * score.value
            ends = [[value - percent * score.low], [percent * score.high - value]]
            color = colors[probes.index(probe) % len(colors)]
            known = name == next(row for row, c in rows.items() if probe in c)
            ax.barh(place, value, 0.85, color=color, alpha=0.75, label=probe if known else None)
            # A percentile interval may not contain the value.
            ax.errorbar(value, place, xerr=np.clip(ends, 0, None), color='0.2', lw=1, capsize=2)
            place += 1
        ticks.append((start + place - 1) / 2)
        labels.append(name.replace(', ', '\n'))
        place += 0.5
    ax.set_yticks(ticks, labels)
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_xlabel(with_unit(metric))
    figure.suptitle(report.title, fontsize='medium')
    ax.grid(axis='x', alpha=0.3)
    ax.spines[['top', 'right']].set_visible(False)
    figure.legend(
        loc='outside lower center', ncols=min(4, len(probes)), frameon=False, columnspacing=1
    )
    return figure


def plot_maps(report: Report) -> Figure:
    """Draw a few test images, with the true map and each predicted map beside them.

    Args:
        report: The report of a dense task.

    Returns:
        The figure.
    """
    samples = pictured_samples(report.data)
    columns = ['image', 'truth', *report.maps]
    figure = Figure(figsize=(2.2 * len(columns), 2.35 * len(samples)), layout='constrained')
    axes = figure.subplots(len(samples), len(columns), squeeze=False)
    truths = np.stack([sample['target'].numpy() for sample in samples]).astype(np.float64)
    gaps = truths == report.data.ignore_index
    if report.data.task == 'regression':
        gaps = ~np.isfinite(truths)
    if report.data.task == 'segmentation':
        style: dict[str, Any] = {
            'cmap': _CLASSES,
            'vmin': 0,
            'vmax': max(report.classes, _CLASSES.N) - 1,
        }
    else:
        known = truths[~gaps]
        low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
        style = {'cmap': 'viridis', 'vmin': low, 'vmax': high}
    for i, sample in enumerate(samples):
        drawn = [picture(sample['image'].numpy(), report.data.bands)]
        drawn += [np.ma.masked_array(truths[i], gaps[i])]
        drawn += [maps[i].numpy() for maps in report.maps.values()]
        for ax, title, pixels in zip(axes[i], columns, drawn, strict=True):
            ax.imshow(pixels, interpolation='nearest', **({} if pixels.ndim == 3 else style))
            ax.set(xticks=[], yticks=[])
            if i == 0:
                ax.set_title(title.replace(', ', '\n'), fontsize='small')
    figure.suptitle(report.title, fontsize='medium')
    if report.data.task == 'segmentation':
        _name_classes(figure, report, style)
    return figure


def _name_classes(figure: Figure, report: Report, style: dict[str, Any]) -> None:
    """Add a legend of the classes if they have names."""
    names = report.data.classes[: report.classes]
    if len(names) == report.classes:
        patches = [
            Patch(color=_CLASSES(i / style['vmax']), label=name) for i, name in enumerate(names)
        ]
        figure.legend(
            handles=patches, loc='outside lower center', ncols=5, frameon=False, fontsize='small'
        )


def picture(image: npt.NDArray[np.float32], bands: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Return a picture of the first sensor that can be drawn, otherwise of the first band.

    Args:
        image: Raw values (C, H, W).
        bands: Names of the channels.

    Returns:
        Colours in [0, 1], of shape (H, W, 3).
    """
    for sensor in drawing_order(bands):
        channels = compose(image, bands, sensor)
        if channels is not None:
            return colours(channels, np.isfinite(channels).all(axis=0), sensor)
    return stretch(image[[0, 0, 0]], np.isfinite(image[0]))


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Write the figures as PNG files, atomically.

    Args:
        report: The report.
        folder: Folder to write to.

    Returns:
        The files.
    """
    figures = {'scores.png': plot_scores(report)} if report.scores else {}
    if report.maps:
        figures['maps.png'] = plot_maps(report)
    files = []
    for name, figure in figures.items():
        path = folder / name
        with atomic_file(path) as part:
            figure.savefig(part, dpi=_DPI)
        files.append(path)
    return files
