"""The whole line on generated data: write it, pretrain, evaluate, draw. `make demo` runs this.

Each step is a command that a user would type, printed before it runs. All run in this process,
so that PyTorch and Lightning are imported once.
"""

import argparse
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import (
    NEIGHBOURS,
    few_label_accuracy,
    latest_checkpoint,
    patch_words,
    pooled_features,
    token_features,
)
from torch import Tensor
from torch.nn.functional import normalize

from geofm.cli import main as geofm
from geofm.datasets import SampleLandCover
from geofm.evaluation import knn_accuracy
from geofm.evaluation.backbones import Encoder, StatisticsEncoder
from geofm.models import MultiSensorViT, create_backbone, load_backbone, read_hparams
from geofm.sensors import BANDS, SENSORS

CONFIG = Path('configs/pretrain/quickstart.yaml')

#: Features of the pretrained ViT that are measured, side by side. Chosen on the validation ROIs.
FEATURES = ('CLS', 'patches')

#: The same for random weights, whose CLS token is much worse than the mean of their patches.
RANDOM_FEATURES = ('patches',)

#: Labelled windows per class in the first column of the table.
FEW = 5

#: Columns of the table: which labels there are.
COLUMNS = (f'{FEW} labels per class', 'all labels')

#: Accuracy by row and column of the table.
type Accuracies = dict[str, dict[str, float]]
#: Features by name, and labels.
type Features = tuple[dict[str, Tensor], Tensor]


@dataclass
class Clock:
    """Seconds that each step took, printed after it."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        print(f'({name}: {self.seconds[name]:.0f} s)', flush=True)


def command(*words: str | Path) -> None:
    """Run a command of geofm, and show it."""
    args = [str(word) for word in words]
    print(f'\n$ geofm {shlex.join(args)}', flush=True)
    geofm(args)


def measure(checkpoint: Path, data: Path, seed: int) -> Accuracies:
    """Measure the model and its baselines by k-NN on unseen ROIs, with few labels and with all."""
    bank, test = SampleLandCover(data, 'train'), SampleLandCover(data, 'test')
    backbone = load_backbone(checkpoint).eval()
    torch.manual_seed(seed)
    random = create_backbone(read_hparams(checkpoint)).eval()

    def accuracy(features: Callable[[SampleLandCover], Features]) -> dict[str, float]:
        (vectors, labels), (queries, truth) = features(bank), features(test)
        given = side_by_side(vectors), labels, side_by_side(queries), truth
        values = few_label_accuracy(*given, FEW), knn_accuracy(*given, NEIGHBOURS)
        return dict(zip(COLUMNS, values, strict=True))

    def of_tokens(model: MultiSensorViT, *given: bool) -> dict[str, float]:
        names = RANDOM_FEATURES if model is random else FEATURES

        def features(part: SampleLandCover) -> Features:
            found, labels = token_features(model, part, given or None)
            return {name: found[name] for name in names}, labels

        return accuracy(features)

    def of_baseline(encoder: Encoder) -> dict[str, float]:
        return accuracy(lambda part: pooled_features(encoder, part, BANDS))

    alone = {
        SENSORS[key].short_title: of_tokens(backbone, *(other == key for other in backbone.sensors))
        for key in backbone.sensors
    }
    better = max(alone, key=lambda title: alone[title][COLUMNS[0]])
    print(f'The best single sensor is {better}.')
    return {
        'pretrained, both sensors': of_tokens(backbone),
        'pretrained, best single sensor': alone[better],
        'random weights': of_tokens(random),
        'patch words': of_baseline(patch_words(bank, BANDS, seed)),
        'band mean and std': of_baseline(StatisticsEncoder()),
    }


def side_by_side(vectors: dict[str, Tensor]) -> Tensor:
    """Concatenate normalised features along their dimension."""
    return torch.cat([normalize(vector, dim=1) for vector in vectors.values()], dim=1)


def draw_ground(data: Path, output: Path) -> tuple[Path, dict[str, Path]]:
    """Picture of a test patch: true colour, S1 composite and land cover; and its files."""
    dataset = SampleLandCover(data, split='test', window=256, min_purity=0.0, dates='clear')
    figure: Figure = dataset.plot(dataset[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120, bbox_inches='tight')
    row = dataset.pairs.index.iloc[int(dataset.index.iloc[0]['pair'])]
    return output, {key: Path(row[key]) for key in ('s1', 's2')}


def run(config: Path, data: Path, output: Path, seed: int) -> Accuracies:
    """Run all steps, and print the table.

    Returns:
        Accuracy of each row.
    """
    clock = Clock()
    with clock.step('sample data'):
        command('sample-data', data)
    with clock.step('pretraining'):
        command(
            'fit',
            f'--config={config}',
            f'--seed_everything={seed}',
            f'--trainer.default_root_dir={output}',
            f'--data.init_args.paths={data}',
        )
    checkpoint = latest_checkpoint(output)
    with clock.step('evaluation'):
        found = measure(checkpoint, data, seed)
    with clock.step('pictures'):
        ground, files = draw_ground(data, output / 'ground.png')
        command(
            'map',
            checkpoint,
            *(f'--{key}={path}' for key, path in files.items()),
            f'--output={output / "maps"}',
            '--products=[attention,pca]',
            '--window=128',
            '--stride=4',
            f'--figure={output / "maps.png"}',
        )
    table = Table('features', *COLUMNS, title='5-NN accuracy of land cover on unseen ROIs, %')
    for name, values in found.items():
        table.add_row(name, *(f'{100 * value:.1f}' for value in values.values()))
    Console().print(table)
    print('The data are generated: no result on them is science.')
    print('Pictures:', ground, output / 'maps.png', sep='\n  ')
    print(f'Log: tensorboard --logdir {output}')
    times = ', '.join(f'{name} {seconds:.0f}' for name, seconds in clock.seconds.items())
    print(f'Seconds: {times}; {sum(clock.seconds.values()):.0f} in all, and the imports.')
    return found


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', type=Path, default=CONFIG)
    parser.add_argument('--data', type=Path, default=Path('data/sample'))
    parser.add_argument('--output', type=Path, default=Path('output/demo'))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    run(args.config, args.data, args.output, args.seed)


if __name__ == '__main__':
    main()
