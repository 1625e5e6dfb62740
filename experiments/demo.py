"""The whole line on generated data: write it, pretrain, evaluate, draw. `make demo` runs this.

Each step is a command that a user would type; it is printed before it runs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import latest_checkpoint

from geofm.datasets import SampleLandCover
from geofm.evaluation import Score


def geofm(*args: str | Path) -> None:
    """Run a command of geofm, and show it."""
    words = [str(arg) for arg in args]
    print(f'\n$ geofm {shlex.join(words)}', flush=True)
    subprocess.run([sys.executable, '-m', 'geofm', *words], check=True)


def read_scores(path: Path) -> list[Score]:
    """Accuracies that a benchmark wrote."""
    scores = [Score(**score) for score in json.loads(path.read_text())['scores']]
    return [score for score in scores if score.metric == 'overall accuracy']


def draw_ground(data: Path, output: Path) -> Path:
    """Picture of a test window: true colour, S1 composite and land cover."""
    dataset = SampleLandCover(data, split='test', window=256, min_purity=0.0, dates='clear')
    figure: Figure = dataset.plot(dataset[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120, bbox_inches='tight')
    return output


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='configs/pretrain/quickstart.yaml')
    parser.add_argument('--data', type=Path, default=Path('data/sample'))
    parser.add_argument('--output', type=Path, default=Path('output/demo'))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()

    geofm('sample-data', args.data)
    geofm(
        'fit',
        f'--config={args.config}',
        f'--seed_everything={args.seed}',
        f'--trainer.default_root_dir={args.output}',
        f'--data.init_args.paths={args.data}',
    )
    checkpoint = latest_checkpoint(args.output)
    scores = args.output / 'benchmark'
    geofm(
        'benchmark',
        f'--checkpoint={checkpoint}',
        '--data=SampleLandCoverDataModule',
        f'--data.paths={args.data}',
        '--probes=[knn]',
        f'--seed={args.seed}',
        f'--cache={args.output / "features"}',
        f'--output={scores}',
    )
    pair = SampleLandCover(args.data, split='test', window=256, min_purity=0.0, dates='clear')
    row = pair.pairs.index.iloc[int(pair.index.iloc[0]['pair'])]
    geofm(
        'attention',
        f'--checkpoint={checkpoint}',
        f'--s1={row["s1"]}',
        f'--s2={row["s2"]}',
        f'--output={args.output}/attention',
        '--window=128',
    )
    pictures = [draw_ground(args.data, args.output / 'ground.png')]
    pictures += [scores / 'scores.png', *sorted((args.output / 'attention').glob('*.png'))]

    print(f'\nDone in {(time.monotonic() - start) / 60:.1f} minutes.')
    table = Table('features', title='k-NN accuracy on ROIs never seen, %')
    found = read_scores(scores / 'scores.json')
    probes = list(dict.fromkeys(score.probe for score in found))
    for probe in probes:
        table.add_column(probe, justify='right')
    for row in dict.fromkeys(score.row for score in found):
        table.add_row(row, *(score.text() for score in found if score.row == row))
    Console().print(table)
    print('The data are generated: no result on them is science.')
    print('Pictures:', *(f'  {picture}' for picture in pictures), sep='\n')
    print(f'Log: tensorboard --logdir {args.output}')


if __name__ == '__main__':
    main()
