"""Flood maps of unseen events from S1, S2 and both: backbones beside a pixel baseline.

OMBRIA's places are split by events. For each seed a small backbone is pretrained on the training
events without labels (`flood_backbone.py`), and adapted to flood masks by several methods. Settings
such as the learning rate of a linear head are chosen on the validation events.

    python experiments/floods.py --data ombria.zip [--seeds 0 1 2] [--work output/floods]

writes `experiments/results/floods.json`, `floods.md`, `floods_brief.md` and
`docs/images/floods.png`, and fills the tables of docs. Results in the work folder are not computed
again.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables
from benchmarks.rounds import RESULTS, write_results, write_text
from flood_backbone import BATCH, EPOCHS, SHAPE, pretrain, training_minutes
from flood_data import BOTH, SENSOR_SETS, Floods, Pixels, Split, prepare
from flood_heads import linear_probe, u_net
from flood_pixels import pixel_baseline
from floods_report import brief, cell, draw, report

from geofm.atomic import atomic_file

PICTURE = Path(__file__).parents[1] / 'docs' / 'images' / 'floods.png'

#: Splits that are mapped and scored.
SPLITS: tuple[Split, ...] = ('val', 'test')


@dataclass(frozen=True)
class Task:
    """Input of a method.

    Attributes:
        floods: The places.
        checkpoint: Checkpoint of the backbone.
        sensors: Keys of the sensors.
        seed: Seed of everything, pretraining too.
        output: Folder of what it writes.
    """

    floods: Floods
    checkpoint: Path
    sensors: Sequence[str]
    seed: int
    output: Path


type Maps = dict[Split, Pixels]


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Attributes:
        run: From a task to maps of :data:`SPLITS`, classes (N, H, W).
        settings: Its settings.
        pretrained: Whether it needs the pretrained backbone, or its architecture.
    """

    run: Callable[[Task, dict[str, Any]], Maps]
    settings: dict[str, Any]
    pretrained: bool = True


def _pixels(task: Task, settings: dict[str, Any]) -> Maps:
    return pixel_baseline(task.floods, task.sensors, task.seed, SPLITS)


def _probe(task: Task, settings: dict[str, Any]) -> Maps:
    return linear_probe(task.floods, task.checkpoint, task.sensors, task.seed, SPLITS, **settings)


def _u_net(task: Task, settings: dict[str, Any]) -> Maps:
    return u_net(task.floods, task.sensors, task.seed, SPLITS, task.output, **settings)


#: Methods by what the table calls them.
METHODS = {
    'pixel baseline': Method(_pixels, {}, pretrained=False),
    'patch words, linear': Method(_probe, {'features': 'patch words', 'steps': 2000}),
    'random weights, linear': Method(_probe, {'features': 'random', 'steps': 2000}),
    'frozen, linear': Method(_probe, {'features': 'pretrained', 'steps': 2000}),
    # As long as pretraining.
    'U-Net, supervised': Method(_u_net, {'epochs': 2}, pretrained=False),
}


@dataclass(frozen=True)
class Result:
    """Output of a method.

    Attributes:
        maps: Its maps.
        minutes: CPU minutes that it took.
    """

    maps: Maps
    minutes: float


def result_of(name: str, task: Task, only_done: bool = False) -> Result | None:
    """Run a method unless its result is in the work folder.

    Args:
        name: Name of the method.
        task: What it is asked for.
        only_done: Whether to run nothing.

    Returns:
        The result; None if it is not there and nothing is to be run.
    """
    method = METHODS[name]
    path = task.output / 'maps.npz'
    asked = json.dumps(
        {
            **method.settings,
            'checkpoint': _identity(task.checkpoint) if method.pretrained else None,
        },
        sort_keys=True,
    )
    if path.exists():
        with np.load(path) as stored:
            if str(stored['settings']) == asked:
                return Result({s: stored[s] for s in SPLITS}, float(stored['minutes']))
    if only_done:
        return None
    task.output.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    maps = method.run(task, method.settings)
    minutes = (time.process_time() - start) / 60
    arrays: dict[str, Any] = {split: maps[split] for split in SPLITS}
    with atomic_file(path) as part, part.open('wb') as file:
        np.savez_compressed(file, settings=asked, minutes=minutes, **arrays)
    return Result(maps, minutes)


def _identity(checkpoint: Path) -> str:
    """Return what identifies the content of a checkpoint file."""
    return f'{checkpoint.stat().st_mtime_ns} {checkpoint.stat().st_size}'


def results(
    floods: Floods, checkpoints: Mapping[int, Path], options: argparse.Namespace
) -> dict[tuple[str, str], list[Result]]:
    """Return the available results by method and set of sensors, one per seed."""
    found: dict[tuple[str, str], list[Result]] = {}
    for name in options.methods:
        # Both sensors last: what is known of each is used again.
        for seed in options.seeds:
            for title, sensors in SENSOR_SETS.items():
                folder = options.work / 'methods' / name / '+'.join(sensors) / f'seed_{seed}'
                task = Task(floods, checkpoints[seed], sensors, seed, folder)
                result = result_of(name, task, options.only_done)
                if result is None:
                    print(f'{name}, {title}, seed {seed}: not run: left out')
                else:
                    found.setdefault((name, title), []).append(result)
    return found


def main() -> None:
    """Run the missing methods and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('--data', type=Path, required=True, help='ombria.zip')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--only-done', action='store_true', help='run no method: what has been run')
    parser.add_argument('--work', type=Path, default=Path('output/floods'))
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('--picture', type=Path, default=PICTURE)
    options = parser.parse_args()
    floods = prepare(options.data, options.work)
    checkpoints = {
        seed: pretrain(floods, options.work / 'pretraining' / f'seed_{seed}', seed)
        for seed in options.seeds
    }
    found = results(floods, checkpoints, options)
    cells = [
        cell(floods, name, title, [r.maps for r in each], [r.minutes for r in each])
        for (name, title), each in found.items()
    ]
    text = report(cells, floods)
    print(text)
    if options.methods != list(METHODS):
        return  # Incomplete tables do not go into the docs.
    both = {name: each[0].maps['test'] for (name, title), each in found.items() if title == BOTH}
    draw(floods, both, options.picture)
    about = {
        'seeds': options.seeds,
        'pretraining': {
            'shape': SHAPE,
            'epochs': EPOCHS,
            'batch': BATCH,
            'minutes': [round(training_minutes(path), 1) for path in checkpoints.values()],
        },
        'settings': {name: method.settings for name, method in METHODS.items()},
        'cells': [entry.entry() for entry in cells],
    }
    write_results(options.results, 'floods', about, text)
    write_text(options.results / 'floods_brief.md', brief(cells, floods))
    tables.main()


if __name__ == '__main__':
    main()
