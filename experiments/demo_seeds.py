"""The demo with three seeds, and the table of the README from their scores.

    python experiments/demo_seeds.py [--seeds 0 1 2]

writes `experiments/results/demo.json` and `demo.md`, and fills the tables of README and docs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import tables
from demo import read_scores

RESULTS = Path(__file__).parent / 'results' / 'demo.json'

Accuracies = dict[str, dict[str, list[float]]]


def run(seeds: list[int], output: Path) -> Accuracies:
    """Accuracy by features and probe, one figure a seed; what has been run is not run again."""
    accuracies: Accuracies = {}
    for seed in seeds:
        folder = output / f'seed_{seed}'
        scores = folder / 'benchmark' / 'scores.json'
        if not scores.exists():
            demo = [sys.executable, str(Path(__file__).with_name('demo.py'))]
            subprocess.run([*demo, f'--seed={seed}', f'--output={folder}'], check=True)
        for score in read_scores(scores):
            probes = accuracies.setdefault(score.row, {})
            probes.setdefault(score.probe, []).append(score.value)
    return accuracies


def table(accuracies: Accuracies) -> str:
    """Markdown table: mean over the seeds, and each one."""
    probes = list(next(iter(accuracies.values())))
    lines = ['| features | ' + ' | '.join(probes) + ' |', '|---|' + '---:|' * len(probes)]
    for name, scores in accuracies.items():
        cells = []
        for probe in probes:
            each = ', '.join(f'{100 * value:.1f}' for value in scores[probe])
            cells.append(f'**{100 * mean(scores[probe]):.1f} %** ({each})')
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> None:
    """Run, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--output', type=Path, default=Path('output/demo_seeds'))
    args = parser.parse_args()
    accuracies = run(args.seeds, args.output)
    RESULTS.write_text(json.dumps({'seeds': args.seeds, 'accuracy': accuracies}, indent=2) + '\n')
    caption = (
        f'k-NN accuracy of land cover on ROIs never seen, mean over {len(args.seeds)} seeds '
        '(each of them), made by `python experiments/demo_seeds.py`. The settings were chosen with '
        'these ROIs in sight: see docs/pretraining.md.'
    )
    text = f'{table(accuracies)}\n\n{caption}\n'
    RESULTS.with_suffix('.md').write_text(text)
    tables.main()
    print(text)


if __name__ == '__main__':
    main()
