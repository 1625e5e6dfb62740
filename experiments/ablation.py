"""Ablation of what came after DINOv2, on the generated sample data.

Each row is the quickstart with one switch, pretrained from the same seed and for as many steps, and
measured by 5-NN of land cover on ROIs never seen: with both sensors, and with either one alone, in
place of which the model puts its stand-in.

    geofm sample-data data/sample
    python experiments/ablation.py [--seeds 0 1]

writes `experiments/results/ablation.json` and `ablation.md`, and fills the tables of docs. A run
that is there is not run again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import tables
import torch
from demo import latest_checkpoint
from rich.progress import track
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import DataLoader

from geofm.datamodules import SampleLandCoverDataModule
from geofm.models import MultiSensorViT, load_backbone

RESULTS = Path(__file__).parent / 'results'
CONFIG = 'configs/pretrain/quickstart.yaml'
NEIGHBOURS = 5

#: Sensors that the model is given: S1, S2.
GIVEN = {'S1 + S2': (True, True), 'S1 alone': (True, False), 'S2 alone': (False, True)}

TASK, DATA = '--model.init_args.', '--data.init_args.'

#: Epochs of the first phase, and of the second at a higher resolution.
PHASES = (30, 10)
#: Crops of the second phase: half as large again, as DINOv3 mixes.
HIGH = [f'{TASK}global_size=96', f'{TASK}local_size=48']

#: Arguments of each phase of a row.
ROWS: dict[str, list[list[str]]] = {
    'DINOv2': [[]],
    'sensor dropout 0.3': [[f'{TASK}sensor_dropout=0.3']],
    'cross-sensor masking 0.5': [[f'{TASK}one_sensor_masks=0.5']],
    'two dates': [[f'{DATA}n_dates=2']],
    'global crops: student S1, teacher S2': [[f'{TASK}global_sensors=[s1,s2]']],
    'high-resolution phase': [[], HIGH],
    'high-resolution phase, Gram anchoring': [
        [],
        [*HIGH, f'{TASK}gram_weight=2', f'{TASK}gram_size=128'],
    ],
}


def pretrain(arguments: list[str], epochs: int, seed: int, output: Path) -> Path:
    """Run a phase, unless it has been run."""
    if not (output / 'done').exists():
        command = ['fit', f'--config={CONFIG}', f'--seed_everything={seed}']
        command += [f'--trainer.default_root_dir={output}', f'--trainer.max_epochs={epochs}']
        command += ['--trainer.limit_val_batches=0', *arguments]
        print(f'\n$ geofm {shlex.join(command)}', flush=True)
        subprocess.run([sys.executable, '-m', 'geofm', *command], check=True)
        (output / 'done').touch()
    return latest_checkpoint(output)


def run_row(phases: list[list[str]], seed: int, output: Path) -> Path:
    """Run all phases of a row, which together take as many epochs for each."""
    if len(phases) == 1:
        return pretrain(phases[0], sum(PHASES), seed, output / 'phase_1')
    first = pretrain(phases[0], PHASES[0], seed, output / 'phase_1')
    # Short, and from a teacher that has learnt already.
    later = [f'{TASK}continue_from={first}', f'{TASK}warmup_epochs=1', f'{TASK}momentum=[0.99,1]']
    return pretrain([*phases[1], *later], PHASES[1], seed, output / 'phase_2')


@torch.inference_mode()
def features(
    backbone: MultiSensorViT, datamodule: SampleLandCoverDataModule, split: str, given: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """CLS token and mean of patches, L2-normalised, and labels."""
    found: dict[str, list[Tensor]] = {'CLS': [], 'patches': []}
    labels = []
    loader: DataLoader[Any] = DataLoader(
        getattr(datamodule, f'{split}_dataset'),
        batch_size=64,
        collate_fn=getattr(datamodule, 'collate_fn', None),
    )
    for batch in loader:
        labels.append(batch['label'])
        inputs = datamodule.aug({k: v for k, v in batch.items() if isinstance(v, Tensor)})
        present = torch.tensor([given]).expand(len(inputs['image']), -1)
        tokens = backbone.forward_features(inputs['image'], inputs.get('dates'), present=present)
        found['CLS'].append(tokens[:, 0])
        found['patches'].append(tokens[:, backbone.num_prefix_tokens :].mean(dim=1))
    normalised = {k: torch.nn.functional.normalize(torch.cat(v), dim=1) for k, v in found.items()}
    return normalised, torch.cat(labels)


def measure(checkpoint: Path, datamodule: SampleLandCoverDataModule) -> dict[str, dict[str, float]]:
    """5-NN accuracy by what the model is given, and by which feature."""
    backbone = load_backbone(checkpoint)
    scores: dict[str, dict[str, float]] = {}
    for name, given in GIVEN.items():
        bank, labels = features(backbone, datamodule, 'train', given)
        queries, truth = features(backbone, datamodule, 'test', given)
        scores[name] = {}
        for feature, vectors in bank.items():
            knn = KNeighborsClassifier(NEIGHBOURS, weights='distance').fit(vectors, labels)
            scores[name][feature] = float(knn.score(queries[feature], truth))
    return scores


def table(scores: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Markdown table: mean over the seeds, and each one."""
    columns = [(given, feature) for feature in ('CLS', 'patches') for given in GIVEN]
    lines = [
        '| switch | ' + ' | '.join(f'{given}, {feature}' for given, feature in columns) + ' |',
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


def main() -> None:
    """Run, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--data', type=Path, default=Path('data/sample'))
    parser.add_argument('--output', type=Path, default=Path('output/ablation'))
    options = parser.parse_args()
    datamodule = SampleLandCoverDataModule(options.data)
    datamodule.setup('fit')
    datamodule.setup('test')
    scores: dict[str, list[dict[str, dict[str, float]]]] = {}
    for name in track(options.rows, description='Rows'):
        phases = ROWS[name]
        for seed in options.seeds:
            folder = options.output / name.replace(' ', '_').replace(':', '') / f'seed_{seed}'
            data = [f'{DATA}paths={options.data}']
            checkpoint = run_row([[*phase, *data] for phase in phases], seed, folder)
            scores.setdefault(name, []).append(measure(checkpoint, datamodule))
    windows = len(datamodule.test_dataset)  # type: ignore[arg-type]
    off = 200 * (0.75 * 0.25 / windows) ** 0.5
    text = (
        f'{table(scores)}\n\n5-NN accuracy in %, made by `python experiments/ablation.py`; '
        f'{len(options.seeds)} seed(s) of {sum(PHASES)} epochs, {windows} test windows: two '
        f'standard errors of a figure are about {off:.0f} points, so that smaller differences say '
        'nothing.'
    )
    print(text)
    if options.rows != list(ROWS):
        return  # Part of a table is not for the docs.
    about = {'seeds': options.seeds, 'neighbours': NEIGHBOURS, 'accuracy': scores}
    for file, content in (('ablation.json', json.dumps(about, indent=2)), ('ablation.md', text)):
        beside = RESULTS / f'.{file}.part'
        beside.write_text(content + '\n')
        beside.replace(RESULTS / file)
    tables.main()


if __name__ == '__main__':
    main()
