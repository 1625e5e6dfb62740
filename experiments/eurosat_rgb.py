"""Pretrain from scratch on real patches and evaluate on cells that were not used for training.

DINOv2, alone or after MAE, beside MAE, SimCLR and supervised training of TorchGeo, all on the same
backbone, data and threads. The patches are split by whole cells of one degree; pretraining sees the
training cells.

    python experiments/eurosat_rgb.py [--data data/eurosat_rgb] [--seeds 0 1 2]

writes `experiments/results/eurosat_rgb.json` and `eurosat_rgb.md`, draws
`docs/images/eurosat_rgb.png`, and fills the tables of docs. Finished runs are not repeated.
With --only-done nothing is trained: missing runs are taken from the results file if
their settings are the current ones.
"""

import argparse
import csv
import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tables
import torch
import yaml
from benchmarks.rounds import RESULTS, write_results, write_text
from eurosat_rgb_report import CURVES, Accuracies, Run, brief, draw, report
from rich.progress import track
from runs import geofm, latest_checkpoint

from geofm.datamodules import EuroSATRGBDataModule, NamedBandsDataModule
from geofm.evaluation import BackboneConfig, ProbeSettings, Score, knn_accuracy, labelled_data
from geofm.evaluation.backbones import Backbone, build_backbone, statistics_backbone
from geofm.evaluation.benchmark import cached_features
from geofm.evaluation.features import FeatureCache, side_by_side

BENCHMARK = Path('configs/benchmark/eurosat_rgb.yaml')
MODELS = Path('configs/models')
PRETRAIN = Path('configs/pretrain')
PICTURE = Path(__file__).parents[1] / 'docs' / 'images' / 'eurosat_rgb.png'

#: Patch words, but more of them than the benchmark's baseline has.
MORE_WORDS = {
    'model': 'patch_words',
    'name': '1,600 patch words',
    'model_args': {'words': 1600},
}

#: Where a configuration names the folder of the data.
ROOT = '--data.init_args.datamodule.dict_kwargs.root'


@dataclass(frozen=True, slots=True)
class Method:
    """Method that trains the backbone.

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
WORDS = Method((PRETRAIN / 'eurosat_rgb_words.yaml',))
LONGER_WORDS = replace(WORDS, arguments=('--trainer.max_epochs=28',))
DINOV2 = Method((PRETRAIN / 'eurosat_rgb.yaml',))
MAE_FIRST = Method(
    (*DINOV2.configs, Path('configs/overlays/eurosat_rgb_after_mae.yaml')),
    start=replace(MAE, arguments=('--trainer.max_epochs=25',)),
)
LONGER = replace(
    MAE_FIRST,
    start=replace(MAE, arguments=('--trainer.max_epochs=35',)),
    arguments=('--trainer.max_epochs=18',),
)
SUPERVISED = Method(
    (Path('configs/finetune/eurosat_rgb_supervised.yaml'),),
    validates=True,
    arguments=('--trainer.max_epochs=32',),
)

#: The benchmark of the first gives the baselines.
METHODS = {
    'masked words (longer)': LONGER_WORDS,
    'masked words': WORDS,
    'MAE, then DINOv2': MAE_FIRST,
    'MAE, then DINOv2 (longer)': LONGER,
    'DINOv2 (longer)': replace(DINOV2, arguments=('--trainer.max_epochs=16',)),
    'DINOv2': DINOV2,
    'SimCLR': Method((PRETRAIN / 'eurosat_rgb_simclr.yaml',)),
    'MAE': MAE,
    'supervised': SUPERVISED,
}


def check_architectures() -> None:
    """Check that all methods train the same backbone, except that MAE has no registers.

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
    words = read_yaml(WORDS.configs[0])['model']['init_args']
    if (words['model'], words['model_args']) != (given['model'], given['model_args']):
        raise ValueError(f'{WORDS.configs[0]} must train the backbone of {DINOV2.configs[0]}')
    same = {k: v for k, v in ours['model_args'].items() if k != 'reg_tokens'}
    if {k: theirs['model_args'].get(k) for k in same} != same:
        raise ValueError(f'{MODELS}/eurosat_rgb_mae/config.json: model_args must have {same}')


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration."""
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def watching(data: Path, every_n_epochs: int) -> list[str]:
    """Return callbacks: training time (without k-NN), and k-NN on the validation cells."""
    datamodule = read_yaml(BENCHMARK)['data']
    datamodule['init_args']['datamodule']['dict_kwargs']['root'] = str(data)
    knn = {
        'class_path': 'geofm.callbacks.OnlineKNN',
        'init_args': {'datamodule': datamodule, 'every_n_epochs': every_n_epochs},
    }
    callbacks: list[dict[str, Any]] = [{'class_path': 'geofm.callbacks.TrainingTime'}, knn]
    return [f'--trainer.callbacks+={json.dumps(callback)}' for callback in callbacks]


def stages(method: Method, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the arguments of a method, preceded by those of the method it starts from."""
    config = [read_yaml(path) for path in method.configs]
    for part in config:
        # The precision is an argument of its own and overrides the configuration.
        part.get('trainer', {}).pop('precision', None)
    own = {
        'config': config[0] if len(config) == 1 else config,
        'precision': options.precision,
        'fit': [*method.arguments, *options.fit],
    }
    return [*(stages(method.start, options) if method.start else []), own]


def this_device() -> str:
    """Return the name of the GPU or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    names = [
        line.split(':', 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith('model name')
    ]
    threads = torch.get_num_threads()
    return f'{threads} thread{"s" * (threads > 1)} of {[*names, platform.machine()][0]}'


def train(method: Method, seed: int, output: Path, options: argparse.Namespace) -> list[Path]:
    """Run a method unless it has been run before.

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
    asked = stages(method, options)[-1]
    if done.exists() and json.loads(done.read_text())['asked'] != asked:
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
            *asked['fit'],
        )
        done.write_text(json.dumps({'asked': asked, 'device': this_device()}))
    return [*earlier, latest_checkpoint(output)]


def read_scores(path: Path) -> list[Score]:
    """Return the accuracies that a benchmark wrote."""
    scores = [Score(**score) for score in json.loads(path.read_text())['scores']]
    return [score for score in scores if score.metric == 'overall accuracy']


def read_curve(checkpoints: list[Path]) -> list[dict[str, float]]:
    """Return epochs, minutes and accuracies on the validation cells of all stages in order."""
    points: list[dict[str, float]] = []
    epochs, minutes = 0, 0.0
    for checkpoint in checkpoints:
        with (checkpoint.parents[1] / 'metrics.csv').open(newline='') as file:
            rows = [row for row in csv.DictReader(file) if row.get(CURVES['CLS token'])]
        points += [
            {
                'epoch': epochs + int(row['epoch']) + 1,
                'minutes': minutes + float(row['time/training_minutes']),
                **{name: float(row[metric]) for name, metric in CURVES.items() if row.get(metric)},
            }
            for row in rows
        ]
        epochs, minutes = int(points[-1]['epoch']), points[-1]['minutes']
    return points


def measure(
    checkpoint: Path, seed: int, output: Path, beside: list[Any], options: argparse.Namespace
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
    """Return 5-NN accuracies of random weights and image statistics on the validation cells."""
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
    """Return the rows of a benchmark under the names of the table."""
    rows = {}
    for row, scores in found.items():
        if row.startswith('pretrained'):
            rows[method + row.removeprefix('pretrained')] = scores
        elif with_floors:
            rows[row] = scores
    return rows


def run_of(name: str, seed: int, options: argparse.Namespace) -> Run:
    """Train a method unless it has been trained, and evaluate it.

    Raises:
        FileNotFoundError: If it has not been run, and only what has been is asked for.
    """
    folder = options.output / name / f'seed_{seed}'
    checkpoints = train(METHODS[name], seed, folder, options)
    first = name == options.methods[0]
    beside = ['rcf', 'patch_words', MORE_WORDS] if first else []
    found = measure(checkpoints[-1], seed, folder / 'benchmark', beside, options)
    return Run(
        seed,
        json.loads((folder / 'done.json').read_text())['device'],
        read_curve(checkpoints),
        renamed(found, name, with_floors=first),
        validation_floors(checkpoints[-1], seed, options) if first else {},
    )


def recorded_runs(options: argparse.Namespace) -> dict[str, dict[int, Run]]:
    """Return the runs of the results file that have the current settings, by method and seed."""
    path = options.results / 'eurosat_rgb.json'
    about = json.loads(path.read_text()) if path.exists() else {'runs': {}, 'settings': {}}
    found = {
        name: {run['seed']: Run(**run) for run in runs}
        for name, runs in about['runs'].items()
        if name in METHODS and about['settings'][name] == stages(METHODS[name], options)
    }
    # Baselines are those beside the first method.
    return {
        name: {
            seed: replace(
                run,
                accuracy=run.accuracy if name == options.methods[0] else _of_method(run, name),
                validation_floors=run.validation_floors if name == options.methods[0] else {},
            )
            for seed, run in runs.items()
        }
        for name, runs in found.items()
    }


def _of_method(run: Run, name: str) -> Accuracies:
    """Return the rows of a method without those of the baselines measured beside it."""
    return {k: v for k, v in run.accuracy.items() if k == name or k.startswith(f'{name}, ')}


def main() -> None:
    """Train and evaluate all methods, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--data', type=Path, default=Path('data/eurosat_rgb'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
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
    if not torch.cuda.is_available():
        # Fused attention goes backward slowly on a CPU in bf16: a step of MAE takes a third longer.
        os.environ.setdefault('TIMM_FUSED_ATTN', '0')
    recorded = recorded_runs(options) if options.only_done else {}
    runs: dict[str, list[Run]] = {name: [] for name in options.methods}
    # Seed by seed: what is there after the first says where it is going.
    for seed in track(options.seeds, description='Seeds'):
        for name in options.methods:
            try:
                run = run_of(name, seed, options)
            except FileNotFoundError as error:
                if seed not in recorded.get(name, {}):
                    print(f'{error}: left out')
                    continue
                print(f'{error}: taken from the results file')
                run = recorded[name][seed]
            runs[name].append(run)
    runs = {name: seeds for name, seeds in runs.items() if seeds}
    if not runs:
        parser.error('nothing has been run: leave out --only-done')
    text = report(runs, options.precision)
    print(text)
    if options.methods != list(METHODS):
        return  # Incomplete tables do not go into the docs.
    about = {
        'settings': {name: stages(METHODS[name], options) for name in runs},
        'runs': {name: [asdict(run) for run in seeds] for name, seeds in runs.items()},
    }
    draw(runs, options.picture)
    write_results(options.results, 'eurosat_rgb', about, text)
    write_text(options.results / 'eurosat_rgb_brief.md', brief(runs))
    tables.main()


if __name__ == '__main__':
    main()
