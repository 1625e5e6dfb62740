"""Tables and figure of `experiments/eurosat_rgb.py`."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from geofm.atomic import atomic_file

#: Metrics of the curve, by what the picture calls them.
CURVES = {
    'CLS token': 'knn/top1_k5',
    'mean of patches': 'knn_mean_of_patches/top1_k5',
    'std of patches': 'knn_std_of_patches/top1_k5',
    'CLS and mean of patches': 'knn_cls_and_mean_of_patches/top1_k5',
}

#: Features whose curves are drawn: those that every method has.
PICTURED = ('CLS token', 'mean of patches')

#: Features of networks that the brief table shows.
FEATURE = 'CLS and mean of patches'

PROBES = ('5-NN', '20-NN', '5-NN, whitened', '20-NN, whitened', 'linear')


#: Accuracy by row of the table and probe.
Accuracies = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Run:
    """Run of a method with one seed, as in the results file.

    Attributes:
        seed: Its seed.
        device: What trained it.
        curve: Epochs, minutes and accuracies on the validation cells.
        accuracy: Accuracies on the test cells, by row of the table.
        validation_floors: Accuracies of the baselines on the validation cells, where it gives them.
    """

    seed: int
    device: str
    curve: list[dict[str, float]]
    accuracy: Accuracies
    validation_floors: Accuracies = field(default_factory=dict)


def cell(values: list[float], digits: int = 1) -> str:
    """Return the mean, the standard deviation and each value."""
    if len(values) == 1:
        return f'{values[0]:.{digits}f}'
    each = ', '.join(f'{value:.{digits}f}' for value in values)
    return f'**{mean(values):.{digits}f}** ± {stdev(values):.{digits}f} ({each})'


def table(minutes: dict[str, list[float]], accuracy: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table with one row per method and feature, and per baseline."""
    lines = [
        '| features | minutes | ' + ' | '.join(f'{probe}, %' for probe in PROBES) + ' |',
        '|---|---:|' + '---:|' * len(PROBES),
    ]
    for row, scores in accuracy.items():
        cells = [cell(minutes[row], 0) if row in minutes else '']
        cells += [cell([100 * v for v in scores[p]]) if p in scores else '' for p in PROBES]
        lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the accuracy on the validation cells over time, beside the baselines.

    The figure is narrow, so that it can be read on a phone.
    """
    figure = Figure(figsize=(5, 8), layout='constrained')
    axes = figure.subplots(len(PICTURED), 1, sharex=True)
    floors = [run.validation_floors for run in chain(*runs.values()) if run.validation_floors]
    for ax, kind in zip(axes, PICTURED, strict=True):
        for number, (method, seeds) in enumerate(runs.items()):
            for i, run in enumerate(seeds):
                points = [point for point in run.curve if kind in point]
                x = [point['minutes'] for point in points]
                y = [100 * point[kind] for point in points]
                label = method if i == 0 else None
                ax.plot(x, y, marker='.', color=f'C{number}', lw=1.2, alpha=0.8, label=label)
        styles = {'random weights': '--', 'band mean and std': ':'} if floors else {}
        for name, style in styles.items():
            values = [floor[name].get(kind, floor[name].get('', 0.0)) for floor in floors]
            ax.axhline(100 * mean(values), color='0.3', ls=style, lw=1.2, label=name)
        ax.grid(alpha=0.3)
        ax.set_title(kind, fontsize='large')
        ax.set_ylabel('5-NN accuracy, %')
    axes[-1].set_xlabel('minutes of training')
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc='outside lower center', ncols=2, frameon=False)
    with atomic_file(path) as part:
        figure.savefig(part, dpi=200)


def report(runs: dict[str, list[Run]], precision: str) -> str:
    """Return the table and its caption."""
    accuracy: dict[str, dict[str, list[float]]] = {}
    devices: dict[str, list[str]] = {}
    for name, seeds in runs.items():
        for run in seeds:
            devices.setdefault(run.device, []).append(name)
            for row, scores in run.accuracy.items():
                for probe, value in scores.items():
                    accuracy.setdefault(row, {}).setdefault(probe, []).append(value)
    # Methods before baselines, a method's own row before those of its features.
    order = sorted(accuracy, key=lambda row: _place(row, list(runs)))
    minutes = {name: [run.curve[-1]['minutes'] for run in seeds] for name, seeds in runs.items()}
    where = '; '.join(
        f'{device} ({", ".join(f"*{name}*" for name in dict.fromkeys(names))})'
        for device, names in devices.items()
    )
    caption = (
        'Accuracy on the test cells, mean ± standard deviation over the seeds where there are '
        'several (individual seeds in parentheses), made by `python experiments/eurosat_rgb.py`. '
        f'Minutes are those of training, precision {precision}, on: {where}. The linear probe '
        'chooses its tokens on the validation cells.'
    )
    return f'{table(minutes, {row: accuracy[row] for row in order})}\n\n{caption}'


def brief(runs: dict[str, list[Run]]) -> str:
    """Return one row per method and baseline: 5-NN of CLS and mean of patches, and linear probe."""
    of_pooled: dict[str, list[float]] = {}
    of_linear: dict[str, list[float]] = {}
    for seeds in runs.values():
        for run in seeds:
            for row, scores in run.accuracy.items():
                name = row.removesuffix(f', {FEATURE}')
                if '5-NN' in scores and (row.endswith(FEATURE) or ', ' not in row):
                    of_pooled.setdefault(name, []).append(100 * scores['5-NN'])
                if 'linear' in scores:
                    of_linear.setdefault(row, []).append(100 * scores['linear'])
    minutes = {name: [run.curve[-1]['minutes'] for run in seeds] for name, seeds in runs.items()}
    lines = ['| features | minutes | seeds | 5-NN, % | linear, % |', '|---|---:|---:|---:|---:|']
    for name in sorted(of_pooled, key=lambda name: -mean(of_pooled[name])):
        cells = [short(minutes[name], 0) if name in minutes else '', str(len(of_pooled[name]))]
        cells += [short(values[name]) for values in (of_pooled, of_linear)]
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    caption = (
        'Accuracy on the test cells (cells of one degree of latitude and longitude that were not '
        'used for training), mean ± standard deviation over the seeds. The 5-NN features '
        'of networks are the CLS token and the mean of the patch tokens, concatenated, without '
        'whitening. *MAE, then DINOv2* begins with fewer epochs of MAE than *MAE* has, and its '
        'minutes include both stages. All probes and the processors are in '
        '[experiments/results/eurosat_rgb.md](../experiments/results/eurosat_rgb.md).'
    )
    return '\n'.join(lines) + f'\n\n{caption}'


def short(values: list[float], digits: int = 1) -> str:
    """Return the mean and the standard deviation."""
    spread = f' ± {stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{mean(values):.{digits}f}{spread}'


def _place(row: str, methods: list[str]) -> tuple[int, str]:
    # 'MAE, then DINOv2, CLS token' is of 'MAE, then DINOv2', not of 'MAE'.
    of = [name for name in methods if row == name or row.startswith(f'{name}, ')]
    return (methods.index(max(of, key=len)) if of else len(methods), row)
