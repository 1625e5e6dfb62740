"""The learning proof: pretraining from scratch on real patches, measured on cells never seen.

DINOv2, alone or after MAE, beside MAE, SimCLR and supervised training of TorchGeo, all on the same
backbone, data and threads. The patches are split by whole cells of one degree; pretraining sees the
training cells.

    python experiments/eurosat_rgb.py [--data data/eurosat_rgb] [--seeds 0 1 2]

writes `experiments/results/eurosat_rgb.json` and `eurosat_rgb.md`, draws
`docs/images/eurosat_rgb.png`, and fills the tables of docs. A run that is there is not run again.
"""

import argparse
import csv
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tables
import torch
import yaml
from benchmarks.rounds import RESULTS, write_results
from demo import geofm, read_scores
from matplotlib.figure import Figure
from rich.progress import track
from runs import latest_checkpoint

from geofm.datamodules import EuroSATRGBDataModule, NamedBandsDataModule
from geofm.evaluation import BackboneConfig, ProbeSettings, knn_accuracy, labelled_data
from geofm.evaluation.backbones import Backbone, build_backbone, statistics_backbone
from geofm.evaluation.benchmark import cached_features
from geofm.evaluation.cache import FeatureCache
from geofm.evaluation.features import side_by_side

BENCHMARK = Path('configs/benchmark/eurosat_rgb.yaml')
MODELS = Path('configs/models')
PRETRAIN = Path('configs/pretrain')
PICTURE = Path(__file__).parents[1] / 'docs' / 'images' / 'eurosat_rgb.png'

#: Where a configuration says where the data lie.
ROOT = '--data.init_args.datamodule.dict_kwargs.root'

#: Metrics of the curve, by what the picture calls them.
CURVES = {
    'CLS token': 'knn/top1_k5',
    'mean of patches': 'knn_mean_of_patches/top1_k5',
    'std of patches': 'knn_std_of_patches/top1_k5',
}

PROBES = ('5-NN', '20-NN', '5-NN, whitened', '20-NN, whitened', 'linear')


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train the backbone.

    Attributes:
        configs: Its configuration, and what is laid over it.
        validates: Whether training needs the validation cells.
        start: What trains the weights that it starts from.
        arguments: Further arguments of ``geofm fit``.
    """

    configs: tuple[Path, ...]
    validates: bool = False
    start: 'Method | None' = None
    arguments: tuple[str, ...] = ()


MAE = Method((PRETRAIN / 'eurosat_rgb_mae.yaml',))
DINOV2 = Method((PRETRAIN / 'eurosat_rgb.yaml',))
MAE_FIRST = Method(
    (*DINOV2.configs, Path('configs/overlays/eurosat_rgb_after_mae.yaml')),
    start=replace(MAE, arguments=('--trainer.max_epochs=25',)),
)

#: The benchmark of the first gives the floors.
METHODS = {
    'MAE, then DINOv2': MAE_FIRST,
    'DINOv2': DINOV2,
    'SimCLR': Method((PRETRAIN / 'eurosat_rgb_simclr.yaml',)),
    'MAE': MAE,
    'supervised': Method((Path('configs/finetune/eurosat_rgb_supervised.yaml'),), validates=True),
}

#: Methods that are run with each of --seeds; the others with each of --baseline-seeds.
OURS = ('MAE, then DINOv2', 'DINOv2')

#: Accuracy by row of the table and probe.
Accuracies = dict[str, dict[str, float]]


def check_architectures() -> None:
    """See that all methods train the same backbone, but for MAE's want of registers.

    Raises:
        ValueError: If they do not.
    """
    given = read_yaml(DINOV2.configs[0])['model']['init_args']
    ours, theirs = (
        json.loads((MODELS / name / 'config.json').read_text())
        for name in ('eurosat_rgb', 'eurosat_rgb_mae')
    )
    if (given['model'], given['model_args']) != (ours['architecture'], ours['model_args']):
        raise ValueError(
            f'{MODELS}/eurosat_rgb/config.json has {ours["architecture"]} {ours["model_args"]}, '
            f'but DINOv2 trains {given["model"]} {given["model_args"]}: write the latter there'
        )
    same = {k: v for k, v in ours['model_args'].items() if k != 'reg_tokens'}
    if {k: theirs['model_args'].get(k) for k in same} != same:
        raise ValueError(f'{MODELS}/eurosat_rgb_mae/config.json: model_args must have {same}')


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration."""
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def watching(data: Path, every_n_epochs: int) -> list[str]:
    """Callbacks: the time of training, then k-NN on the validation cells, which it leaves out."""
    datamodule = read_yaml(BENCHMARK)['data']
    datamodule['init_args']['datamodule']['dict_kwargs']['root'] = str(data)
    knn = {
        'class_path': 'geofm.callbacks.OnlineKNN',
        'init_args': {'datamodule': datamodule, 'every_n_epochs': every_n_epochs},
    }
    callbacks: list[dict[str, Any]] = [{'class_path': 'geofm.callbacks.TrainingTime'}, knn]
    return [f'--trainer.callbacks+={json.dumps(callback)}' for callback in callbacks]


def train(method: Method, seed: int, output: Path, options: argparse.Namespace) -> list[Path]:
    """Run a method, unless it has been run.

    Returns:
        Its last checkpoint, after those of what it started from.

    Raises:
        ValueError: If it has been run otherwise: with another configuration or precision.
        FileNotFoundError: If it has not been run, and only what has been is asked for.
    """
    earlier: list[Path] = []
    if method.start is not None:
        earlier = train(method.start, seed, output / 'start', options)
    done = output / 'done.json'
    config = [read_yaml(path) for path in method.configs]
    fit = [*method.arguments, *options.fit]
    asked = {
        'config': config[0] if len(config) == 1 else config,
        'precision': options.precision,
        'fit': fit,
    }
    if done.exists() and json.loads(done.read_text()) != asked:
        raise ValueError(
            f'{output}: a run with another configuration, precision or arguments: '
            'remove it, or give another --output'
        )
    if not done.exists():
        if options.only_done:
            raise FileNotFoundError(f'{output}: not run')
        logger = {'class_path': 'CSVLogger', 'init_args': {'save_dir': str(output)}}
        geofm(
            'fit',
            *(f'--config={path}' for path in method.configs),
            f'--seed_everything={seed}',
            f'--trainer.default_root_dir={output}',
            f'--trainer.precision={options.precision}',
            f'--trainer.logger={json.dumps(logger)}',
            *watching(options.data, options.every_n_epochs),
            *([] if method.validates else ['--trainer.limit_val_batches=0']),
            *(f'--model.init_args.weights={path}' for path in earlier[-1:]),
            f'{ROOT}={options.data}',
            *fit,
        )
        done.write_text(json.dumps(asked))
    return [*earlier, latest_checkpoint(output)]


def read_curve(checkpoints: list[Path]) -> list[dict[str, float]]:
    """Epochs, minutes of training, and accuracies on the validation cells, of stage after stage."""
    points: list[dict[str, float]] = []
    epochs, minutes = 0, 0.0
    for checkpoint in checkpoints:
        with (checkpoint.parents[1] / 'metrics.csv').open(newline='') as file:
            rows = [row for row in csv.DictReader(file) if row.get(CURVES['CLS token'])]
        points += [
            {
                'epoch': epochs + int(row['epoch']) + 1,
                'minutes': minutes + float(row['time/training_minutes']),
                **{name: float(row[metric]) for name, metric in CURVES.items()},
            }
            for row in rows
        ]
        epochs, minutes = int(points[-1]['epoch']), points[-1]['minutes']
    return points


def measure(
    checkpoint: Path, seed: int, output: Path, beside: list[str], options: argparse.Namespace
) -> Accuracies:
    """Accuracies on the test cells, of the checkpoint and of the floors, unless measured before."""
    if not (output / 'scores.json').exists():
        geofm(
            'benchmark',
            f'--config={BENCHMARK}',
            f'--checkpoint={checkpoint}',
            f'--backbones={json.dumps(beside)}',
            f'--seed={seed}',
            f'--output={output}',
            f'--cache={options.output / "features"}',
            f'{ROOT}={options.data}',
        )
    found: Accuracies = {}
    for score in read_scores(output / 'scores.json'):
        # The linear probe chooses its tokens: it is of the backbone as a whole.
        row = score.backbone if score.probe == 'linear' else score.row
        found.setdefault(row, {})[score.probe] = score.value
    return found


def validation_floors(checkpoint: Path, seed: int, options: argparse.Namespace) -> Accuracies:
    """5-NN on the validation cells, for the curve: of random weights, and of image statistics."""
    arguments = read_yaml(BENCHMARK)['data']['init_args']
    source = EuroSATRGBDataModule(root=options.data, **arguments.pop('datamodule')['init_args'])
    labelled = labelled_data(NamedBandsDataModule(datamodule=source, **arguments))
    config = BackboneConfig(str(checkpoint))
    floors: dict[str, Backbone] = {
        'random weights': build_backbone(
            config, labelled.bands, labelled.statistics, seed, random=True
        ),
        'band mean and std': statistics_backbone(labelled.bands, labelled.statistics),
    }
    # The benchmark has computed them.
    settings, cache = (
        ProbeSettings(progress=False),
        FeatureCache(options.output / 'features', print),
    )
    found: Accuracies = {}
    for name, floor in floors.items():
        bank, queries = (
            cached_features(floor, labelled, split, settings, cache) for split in ('train', 'val')
        )
        for kind, vectors in floor.encoder.features.items():
            known, asked = (side_by_side(split.values, vectors) for split in (bank, queries))
            accuracy = knn_accuracy(known, bank.targets, asked, queries.targets, k=5)
            found.setdefault(name, {})[kind] = accuracy
    return found


def renamed(found: Accuracies, method: str, with_floors: bool) -> Accuracies:
    """Rows of one benchmark as the table calls them."""
    rows = {}
    for row, scores in found.items():
        if row.startswith('pretrained'):
            rows[method + row.removeprefix('pretrained')] = scores
        elif with_floors:
            rows[row] = scores
    return rows


def cell(values: list[float], digits: int = 1) -> str:
    """Mean, standard deviation, and each."""
    if len(values) == 1:
        return f'{values[0]:.{digits}f}'
    each = ', '.join(f'{value:.{digits}f}' for value in values)
    return f'**{mean(values):.{digits}f}** ± {stdev(values):.{digits}f} ({each})'


def table(minutes: dict[str, list[float]], accuracy: dict[str, dict[str, list[float]]]) -> str:
    """Markdown table: a row for each method and kind of features, and for each floor."""
    lines = [
        '| features | minutes | ' + ' | '.join(f'{probe}, %' for probe in PROBES) + ' |',
        '|---|---:|' + '---:|' * len(PROBES),
    ]
    for row, scores in accuracy.items():
        cells = [cell(minutes[row], 0) if row in minutes else '']
        cells += [cell([100 * v for v in scores[p]]) if p in scores else '' for p in PROBES]
        lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(runs: dict[str, list[dict[str, Any]]], floors: list[Accuracies], path: Path) -> None:
    """Accuracy on the validation cells against epochs and minutes, beside its floors."""
    figure = Figure(figsize=(10, 9), layout='constrained')
    axes = figure.subplots(len(CURVES), 2, sharey='row', sharex='col')
    for row, kind in zip(axes, CURVES, strict=True):
        for ax, against in zip(row, ('epoch', 'minutes'), strict=True):
            for number, (method, seeds) in enumerate(runs.items()):
                for i, run in enumerate(seeds):
                    x = [point[against] for point in run['curve']]
                    y = [100 * point[kind] for point in run['curve']]
                    label = method if i == 0 else None
                    ax.plot(x, y, marker='.', color=f'C{number}', lw=1.2, alpha=0.8, label=label)
            for style, name in (('--', 'random weights'), (':', 'band mean and std')):
                values = [floor[name].get(kind, floor[name].get('', 0.0)) for floor in floors]
                label = f'{name} (floor)'
                ax.axhline(100 * mean(values), color='0.3', ls=style, lw=1.2, label=label)
            ax.grid(alpha=0.3)
        row[0].set_ylabel(f'5-NN of the {kind}, %')
    axes[-1, 0].set_xlabel('epochs')
    axes[-1, 1].set_xlabel('minutes of training')
    axes[0, 1].legend(fontsize='small')
    figure.suptitle('EuroSAT RGB, accuracy on the validation cells', fontsize='medium')
    beside = path.with_name(f'.{path.stem}.part.png')
    figure.savefig(beside, dpi=100)
    beside.replace(path)


def main() -> None:
    """Train, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--data', type=Path, default=Path('data/eurosat_rgb'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--baseline-seeds',
        type=int,
        nargs='*',
        default=[0, 1, 2],
        help='of SimCLR, MAE, supervised',
    )
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--output', type=Path, default=Path('output/eurosat_rgb'))
    parser.add_argument('--precision', default='32-true', help='of training; see Lightning')
    parser.add_argument('--every-n-epochs', type=int, default=10, help='points of the curve')
    parser.add_argument('--only-done', action='store_true', help='train nothing: what has been run')
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('--picture', type=Path, default=PICTURE)
    parser.add_argument('fit', nargs='*', help='after --: further arguments of geofm fit')
    options = parser.parse_args()
    check_architectures()
    runs: dict[str, list[dict[str, Any]]] = {}
    minutes: dict[str, list[float]] = {}
    accuracy: dict[str, dict[str, list[float]]] = {}
    floors = []
    # Seed by seed: what is there after the first says where it is going.
    for seed in track(sorted({*options.seeds, *options.baseline_seeds}), description='Seeds'):
        for name in options.methods:
            if seed not in (options.seeds if name in OURS else options.baseline_seeds):
                continue
            folder = options.output / name / f'seed_{seed}'
            try:
                checkpoints = train(METHODS[name], seed, folder, options)
            except FileNotFoundError as error:
                print(f'{error}: left out')
                continue
            checkpoint = checkpoints[-1]
            first = name == options.methods[0]
            beside = ['rcf'] if first else []
            found = measure(checkpoint, seed, folder / 'benchmark', beside, options)
            rows = renamed(found, name, with_floors=first)
            curve = read_curve(checkpoints)
            runs.setdefault(name, []).append({'seed': seed, 'curve': curve, 'accuracy': rows})
            minutes.setdefault(name, []).append(curve[-1]['minutes'])
            for row, scores in rows.items():
                for probe, value in scores.items():
                    accuracy.setdefault(row, {}).setdefault(probe, []).append(value)
            if first:
                floors.append(validation_floors(checkpoint, seed, options))
    # Methods before floors, a method's own row before those of its features.
    names = list(options.methods)
    order = sorted(accuracy, key=lambda row: _place(row, names))
    accuracy = {row: accuracy[row] for row in order}
    threads = torch.get_num_threads()
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f'{threads} threads of a CPU with {os.cpu_count()} cores'
    )
    caption = (
        'Accuracy on the test cells, mean ± standard deviation over the seeds (each of them), '
        'where there are several, made by `python experiments/eurosat_rgb.py`. Minutes are those '
        f'of training, on {where}, precision {options.precision}. The linear probe '
        'chooses its tokens on the validation cells.'
    )
    text = f'{table(minutes, accuracy)}\n\n{caption}'
    print(text)
    if options.methods != list(METHODS):
        return  # Part of a table is not for the docs.
    about = {
        'seeds': options.seeds,
        'baseline seeds': options.baseline_seeds,
        'precision': options.precision,
        'device': where,
        'fit': options.fit,
        'runs': runs,
        'floors on the validation cells': floors,
    }
    draw(runs, floors, options.picture)
    write_results(options.results, 'eurosat_rgb', about, text)
    tables.main()


def _place(row: str, methods: list[str]) -> tuple[int, str]:
    # 'MAE, then DINOv2, CLS token' is of 'MAE, then DINOv2', not of 'MAE'.
    of = [name for name in methods if row == name or row.startswith(f'{name}, ')]
    return (methods.index(max(of, key=len)) if of else len(methods), row)


if __name__ == '__main__':
    main()
