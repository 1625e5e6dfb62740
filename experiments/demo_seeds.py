"""The demo with three seeds, and the table of the README from their scores.

    python experiments/demo_seeds.py [--seeds 0 1 2]

writes `experiments/results/demo.json` and `demo.md`, and fills the tables of README and docs.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import demo
import tables

RESULTS = Path(__file__).parent / 'results' / 'demo.json'


def run(seeds: list[int], data: Path, output: Path) -> dict[str, list[float]]:
    """Accuracy by row, one figure a seed; what has been run is not run again."""
    accuracies: dict[str, list[float]] = {}
    for seed in seeds:
        scores = output / f'seed_{seed}' / 'scores.json'
        if not scores.exists():
            scores.parent.mkdir(parents=True, exist_ok=True)
            found = demo.run(demo.CONFIG, data, scores.parent, seed)
            scores.write_text(json.dumps(found, indent=2) + '\n')
        for row, value in json.loads(scores.read_text()).items():
            accuracies.setdefault(row, []).append(value)
    return accuracies


def table(accuracies: dict[str, list[float]]) -> str:
    """Markdown table: mean over the seeds, and each one."""
    lines = ['| features | 5-NN accuracy, % |', '|---|---:|']
    for row, values in accuracies.items():
        each = ', '.join(f'{100 * value:.1f}' for value in values)
        lines.append(f'| {row} | **{100 * mean(values):.1f}** ({each}) |')
    return '\n'.join(lines)


def main() -> None:
    """Run, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--data', type=Path, default=Path('data/sample'))
    parser.add_argument('--output', type=Path, default=Path('output/demo_seeds'))
    args = parser.parse_args()
    accuracies = run(args.seeds, args.data, args.output)
    RESULTS.write_text(json.dumps({'seeds': args.seeds, 'accuracy': accuracies}, indent=2) + '\n')
    caption = (
        f'5-NN accuracy of land cover on ROIs never seen, mean over {len(args.seeds)} seeds '
        '(each of them), made by `python experiments/demo_seeds.py`. The settings were chosen with '
        'these ROIs in sight: see docs/pretraining.md.'
    )
    text = f'{table(accuracies)}\n\n{caption}\n'
    RESULTS.with_suffix('.md').write_text(text)
    tables.main()
    print(text)


if __name__ == '__main__':
    main()
