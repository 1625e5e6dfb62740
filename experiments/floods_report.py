"""Tables and figure of `experiments/floods.py`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flood_backbone import PATCH
from flood_data import LEGEND, RUNS, SENSOR_SETS, Floods, Pixels, Split, run_of
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from geofm.atomic import atomic_file
from geofm.evaluation.accuracy import Estimate
from geofm.evaluation.metrics import ROUNDS, bootstrap_sums, confusion, interval, mean_iou
from geofm.legend import NO_CLASS

#: A pixel is bright if all bands of the optical image are above this, and a place is cloudy if more
#: than this fraction of it is bright.
BRIGHT = 60
CLOUDY = 0.1

#: Parts of a split that are scored, by what the table calls them.
SKIES = ('all', 'clear', 'cloudy')

type Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cell:
    """Scores of a method with a set of sensors.

    Attributes:
        method: Name of the method.
        sensors: Name of the set of sensors.
        minutes: CPU minutes that each seed took, training and mapping.
        scores: Scores of each split and sky, pooled over the seeds.
        seeds: Mean IoU and IoU of flood of each seed on the test split.
    """

    method: str
    sensors: str
    minutes: list[float]
    scores: dict[Split, dict[str, dict[str, Estimate]]]
    seeds: list[dict[str, float]]

    def entry(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            'method': self.method,
            'sensors': self.sensors,
            'seeds': self.seeds,
            'scores': {
                split: {
                    sky: {name: score.entry() for name, score in scores.items()}
                    for sky, scores in skies.items()
                }
                for split, skies in self.scores.items()
            },
        }


@cache
def skies_of(floods: Floods, split: Split) -> dict[str, Mask]:
    """Classify the sky over places as clear or cloudy by the brightness of their optical images."""
    bright = np.array(
        [
            (floods.image(split, place, ['optical']).min(axis=0) > BRIGHT).mean()
            for place in floods.places(split)
        ]
    )
    cloudy = bright > CLOUDY
    return {'all': np.ones_like(cloudy), 'clear': ~cloudy, 'cloudy': cloudy}


def confusions_of(maps: Sequence[Pixels], truth: Pixels) -> Tensor:
    """Return the confusion matrix of each place, summed over the seeds.

    Args:
        maps: Classes (N, H, W), of each seed.
        truth: Classes (N, H, W).

    Returns:
        float64 (N, 2, 2).
    """
    target = torch.from_numpy(truth).long()
    counts = [
        confusion(torch.from_numpy(seed).long(), target, LEGEND.size, NO_CLASS) for seed in maps
    ]
    return torch.stack(counts).sum(dim=0)


def scores(confusions: Tensor) -> dict[str, Estimate]:
    """Return scores over the pixels of all places, with intervals from a bootstrap over places.

    Args:
        confusions: Of each place, as of :func:`confusions_of`.

    Returns:
        'mean_iou' and 'flood_iou'.
    """
    drawn = bootstrap_sums(confusions.flatten(1), seed=0).unflatten(1, confusions.shape[1:])
    every = confusions.sum(dim=0)
    return {
        name: Estimate(score(every).item(), *interval(score(drawn)))
        for name, score in (('mean_iou', mean_iou), ('flood_iou', _flood_iou))
    }


def _flood_iou(confusions: Tensor) -> Tensor:
    """Return the IoU of class 1 for confusion matrices (..., 2, 2)."""
    right, union = confusions[..., 1, 1], confusions.sum(dim=(-2, -1)) - confusions[..., 0, 0]
    return right / union


def ceiling(truth: Pixels, patch: int) -> float:
    """Return the mean IoU of masks that are averaged over patches and interpolated to the pixels.

    Args:
        truth: Classes (N, H, W).
        patch: Side of a patch in pixels.

    Returns:
        The mean IoU.
    """
    mask = torch.from_numpy(truth)[:, None].float()
    shares = interpolate(avg_pool2d(mask, patch), mask.shape[-2:], mode='bilinear')
    return scores(confusions_of([(shares[:, 0] > 0.5).byte().numpy()], truth))['mean_iou'].value


def cell(
    floods: Floods,
    method: str,
    sensors: str,
    maps: Sequence[Mapping[Split, Pixels]],
    minutes: list[float],
) -> Cell:
    """Score the maps of a method.

    Args:
        floods: The places.
        method: Name of the method.
        sensors: Name of the set of sensors.
        maps: Classes (N, H, W) by split, of each seed.
        minutes: CPU minutes of each seed.

    Returns:
        The cell of the table.
    """
    found: dict[Split, dict[str, dict[str, Estimate]]] = {}
    for split in maps[0]:
        counts = confusions_of([seed[split] for seed in maps], floods.masks(split))
        found[split] = {
            sky: scores(counts[torch.from_numpy(chosen)])
            for sky, chosen in skies_of(floods, split).items()
            if chosen.any()
        }
    seeds = []
    for seed in maps:
        alone = scores(confusions_of([seed['test']], floods.masks('test')))
        seeds.append({name: score.value for name, score in alone.items()})
    return Cell(method, sensors, minutes, found, seeds)


def report(cells: Sequence[Cell], floods: Floods) -> str:
    """Return all tables and their caption."""
    names = {'mean_iou': 'mIoU', 'flood_iou': 'flood IoU'}
    parts = [
        _table(cells, name if sky == 'all' else f'{name}, {sky}', 'test', sky, score)
        for score, name in names.items()
        for sky, chosen in skies_of(floods, 'test').items()
        if chosen.any()
    ]
    parts.append(_table(cells, 'mIoU, validation', 'val', 'all', 'mean_iou'))
    intervals = f'Brackets: 95 % intervals from a bootstrap over places ({ROUNDS:,} draws).'
    return '\n\n'.join([*parts, f'{_caption(cells, floods)} {intervals}'])


def brief(cells: Sequence[Cell], floods: Floods) -> str:
    """Return two tables without intervals, and their caption."""

    def of_skies(cell: Cell, score: str) -> str:
        return ' / '.join(f'{skies[score].value:.3f}' for skies in cell.scores['test'].values())

    skies = ' / '.join(cells[0].scores['test'])
    parts = [
        _markdown(f'{name}, {skies}', cells, partial(of_skies, score=score))
        for score, name in (('mean_iou', 'mIoU'), ('flood_iou', 'flood IoU'))
    ]
    more = (
        'Intervals and the validation places are in '
        '[experiments/results/floods.md](../experiments/results/floods.md).'
    )
    return '\n\n'.join([*parts, f'{_caption(cells, floods)} {more}'])


def _caption(cells: Sequence[Cell], floods: Floods) -> str:
    counts = {sky: int(chosen.sum()) for sky, chosen in skies_of(floods, 'test').items()}
    seeds = max(len(cell.seeds) for cell in cells)
    fewer = {c.method: len(c.seeds) for c in cells if len(c.seeds) < seeds}
    except_for = ''.join(f', except for *{method}* ({count})' for method, count in fewer.items())
    groups = ', '.join(f'{first}-{last}' for first, last in RUNS['test'])
    minutes = [m for cell in cells if cell.method.startswith('U-Net') for m in cell.minutes]
    return (
        f'Mean of the IoU of flood and no flood (mIoU) and IoU of flood over the pixels of '
        f'{counts["all"]} test places in {len(RUNS["test"])} groups of consecutive numbers '
        f'({groups}), made by `python experiments/floods.py`; {seeds} seed{"s" * (seeds > 1)}'
        f'{except_for}{"; the confusion matrices of the seeds are added up" * (seeds > 1)}. '
        f'Cloudy: {counts["cloudy"]} places where all three bands of the optical image exceed '
        f'{BRIGHT} of 255 in more than {CLOUDY:.0%} of the pixels; '
        f'clear: the other {counts["clear"]}. Upper bound at the resolution of the patches: '
        f'{ceiling(floods.masks("test"), PATCH):.3f} mIoU (the masks, averaged over each patch and '
        f'interpolated like the output of a linear head).'
        + (f' The U-Net took {np.mean(minutes):.1f} CPU minutes per seed.' if minutes else '')
    )


def _table(cells: Sequence[Cell], title: str, split: Split, sky: str, score: str) -> str:
    return _markdown(title, cells, lambda cell: str(cell.scores[split][sky][score]))


def _markdown(title: str, cells: Sequence[Cell], text: Callable[[Cell], str]) -> str:
    """Return a table with one row per set of sensors and one column per method."""
    by_name = {(cell.sensors, cell.method): cell for cell in cells}
    methods = list(dict.fromkeys(cell.method for cell in cells))
    lines = [f'| {title} | ' + ' | '.join(methods) + ' |', '|---|' + '---:|' * len(methods)]
    for sensors in SENSOR_SETS:
        row = [by_name.get((sensors, method)) for method in methods]
        texts = ['not run' if cell is None else text(cell) for cell in row]
        lines.append(f'| {sensors} | ' + ' | '.join(texts) + ' |')
    return '\n'.join(lines)


def draw(floods: Floods, maps: Mapping[str, Pixels], path: Path) -> None:
    """Draw, for each group of the test split, the place with the median flooded fraction.

    Args:
        floods: The places.
        maps: Classes (N, H, W) of the test places, by what stands above them.
        path: File of the picture.
    """
    places, truth = floods.places('test'), floods.masks('test')
    shown = [_median_place(places, truth, run) for run in RUNS['test']]
    columns = ['S1', 'S2', 'mask', *maps]
    figure = Figure(figsize=(1.5 * len(columns), 1.58 * len(shown)), layout='constrained')
    axes = figure.subplots(len(shown), len(columns), squeeze=False)
    colors = ListedColormap([np.array(color) / 255 for color in LEGEND.colors.values()])
    for row, i in zip(axes, shown, strict=True):
        radar, optical = (floods.image('test', places[i], SENSOR_SETS[s]) for s in ('S1', 'S2'))
        row[0].imshow(radar[0], cmap='gray', vmin=0, vmax=255)
        # Most of the composite is dark.
        row[1].imshow(np.clip(optical.transpose(1, 2, 0) * 2.0 / 255, 0, 1))
        for ax, classes in zip(row[2:], [truth, *maps.values()], strict=True):
            ax.imshow(classes[i], cmap=colors, vmin=0, vmax=1, interpolation='nearest')
        row[0].set_ylabel(places[i], fontsize=8)
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    with atomic_file(path) as part:
        figure.savefig(part, dpi=110, format='png')


def _median_place(places: Sequence[str], truth: Pixels, run: tuple[int, int]) -> int:
    """Return the number of the place of a run with the median fraction of flooded pixels."""
    here = [i for i, place in enumerate(places) if run_of(int(place)) == ('test', run)]
    return sorted(here, key=lambda i: float(truth[i].mean()))[len(here) // 2]
