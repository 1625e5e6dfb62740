"""Ablation of the optional extensions of DINOv2, on the generated sample data.

Each row is `quickstart_dinov2.yaml` with one option, pretrained from the same seed for the same
number of steps, and evaluated by 5-NN of land cover on ROIs that were not used for training: with
both sensors, and with either one alone, where missing-sensor tokens replace the other.

    geofm sample-data data/sample
    python experiments/ablation.py [--seeds 0 1]

writes `experiments/results/ablation.json` and `ablation.md`, and fills the tables of docs. Finished
runs are not repeated.
"""

import argparse
import re
from pathlib import Path
from statistics import mean

import tables
from benchmarks.rounds import RESULTS, write_results
from rich.progress import track
from runs import DATA, DINOV2, NEIGHBOURS, TASK, pretrain, token_features
from sklearn.neighbors import KNeighborsClassifier

from geofm.datasets import SampleLandCover
from geofm.models import load_backbone

#: Sensors that the model is given: S1, S2.
GIVEN = {'S1 + S2': (True, True), 'S1 alone': (True, False), 'S2 alone': (False, True)}

#: Epochs of the first phase, and of the second at a higher resolution.
PHASES = (30, 10)
#: Crops of the second phase: half as large again, as DINOv3 mixes.
HIGH = [f'{TASK}global_size=96', f'{TASK}local_size=48']

#: Arguments of each phase of a row, by the extensions that they add to DINOv2.
ROWS: dict[str, list[list[str]]] = {
    'DINOv2': [[]],
    'sensor_dropout: 0.3': [[f'{TASK}sensor_dropout=0.3']],
    'one_sensor_masks: 0.5': [[f'{TASK}one_sensor_masks=0.5']],
    'n_dates: 2': [[f'{DATA}n_dates=2']],
    'global_sensors: [s1, s2]': [[f'{TASK}global_sensors=[s1,s2]']],
    'continue_from, larger crops': [[], HIGH],
    'continue_from, larger crops, gram_weight: 2': [
        [],
        [*HIGH, f'{TASK}gram_weight=2', f'{TASK}gram_size=128'],
    ],
}


def run_row(phases: list[list[str]], seed: int, output: Path) -> Path:
    """Run all phases of a row; all rows have the same total number of epochs."""
    if len(phases) == 1:
        return pretrain(DINOV2, phases[0], sum(PHASES), seed, output / 'phase_1')
    first = pretrain(DINOV2, phases[0], PHASES[0], seed, output / 'phase_1')
    # A short phase from a trained teacher.
    later = [f'{TASK}continue_from={first}', f'{TASK}warmup_epochs=1', f'{TASK}momentum=[0.99,1]']
    return pretrain(DINOV2, [*phases[1], *later], PHASES[1], seed, output / 'phase_2')


def measure(
    checkpoint: Path, train: SampleLandCover, test: SampleLandCover
) -> dict[str, dict[str, float]]:
    """Return the 5-NN accuracy by the sensors given to the model and by feature."""
    backbone = load_backbone(checkpoint)
    scores: dict[str, dict[str, float]] = {}
    for name, given in GIVEN.items():
        bank, labels = token_features(backbone, train, given)
        queries, truth = token_features(backbone, test, given)
        scores[name] = {}
        for feature, vectors in bank.items():
            knn = KNeighborsClassifier(NEIGHBOURS, weights='distance').fit(vectors, labels)
            scores[name][feature] = float(knn.score(queries[feature], truth))
    return scores


def table(scores: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Return a Markdown table with the mean over the seeds and each seed."""
    columns = [(given, feature) for feature in ('CLS', 'patches') for given in GIVEN]
    lines = [
        '| extension | ' + ' | '.join(f'{given}, {feature}' for given, feature in columns) + ' |',
        '|---|' + '---:|' * len(columns),
    ]
    for row, seeds in scores.items():
        cells = []
        for given, feature in columns:
            values = [100 * seed[given][feature] for seed in seeds]
            each = ', '.join(f'{value:.1f}' for value in values)
            cells.append(f'{mean(values):.1f} ({each})' if len(values) > 1 else each)
        lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def caption(seeds: int, windows: int) -> str:
    """Return the text below the table, with two standard errors of an accuracy of 75 %."""
    off = 200 * (0.75 * 0.25 / windows) ** 0.5
    return (
        f'5-NN accuracy in %, made by `python experiments/ablation.py`: {sum(PHASES)} epochs, '
        f'{seeds} seed{"s" * (seeds > 1)}, {windows} test windows. Two standard errors of a score '
        f'are about {off:.0f} points. Smaller differences are not significant.'
    )


def main() -> None:
    """Run and evaluate all rows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--data', type=Path, default=Path('data/sample'))
    parser.add_argument('--output', type=Path, default=Path('output/ablation'))
    options = parser.parse_args()
    train, test = (SampleLandCover(options.data, split) for split in ('train', 'test'))
    scores: dict[str, list[dict[str, dict[str, float]]]] = {}
    for name in track(options.rows, description='Rows'):
        phases = ROWS[name]
        for seed in options.seeds:
            folder = options.output / re.sub(r'\W+', '_', name) / f'seed_{seed}'
            data = [f'{DATA}paths={options.data}']
            checkpoint = run_row([[*phase, *data] for phase in phases], seed, folder)
            scores.setdefault(name, []).append(measure(checkpoint, train, test))
    text = f'{table(scores)}\n\n{caption(len(options.seeds), len(test))}'
    print(text)
    if options.rows != list(ROWS):
        return  # Incomplete tables do not go into the docs.
    about = {'seeds': options.seeds, 'neighbours': NEIGHBOURS, 'accuracy': scores}
    write_results(RESULTS, 'ablation', about, text)
    tables.main()


if __name__ == '__main__':
    main()
