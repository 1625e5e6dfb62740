"""Kill commands at random moments, and check the files they leave and the next run.

    python experiments/kill.py --kills 100 --work output/kill --temporary /dev/shm

After a command is killed (SIGKILL), every file under its final name must be complete. When the
command is run again, the files must equal those of an undisturbed run, without extra or missing
files. Half of the runs have their temporary folder on the file system of the output, and half below
``--temporary``, which should be on another file system. Half are killed at a random moment, and
half soon after they start to write a file. Writes a table to ``experiments/results``.

All commands are forked from one process that has imported the libraries, without ``exec``: starting
Python 200 times would take most of the time.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import rasterio
import torch
import yaml
from safetensors.torch import load_file
from torchgeo.tasks import SemanticSegmentation

import geofm.commands.benchmark
import geofm.commands.catalogue
import geofm.commands.data
import geofm.commands.export
import geofm.commands.maps
import geofm.commands.page
import geofm.commands.predict
import geofm.commands.stats
import geofm.datamodules
import geofm.maps.view.page
import geofm.tasks  # noqa: F401 - imported before the processes are forked
from geofm.atomic import atomic_file
from geofm.cli import main as geofm_main
from geofm.datasets import write_sample_data, write_sample_scenes
from geofm.sample import DEFAULT_ROIS

RESULTS = Path(__file__).parent / 'results'
CONFIGS = Path(__file__).parents[1] / 'configs'

#: Training, validation and test ROIs of the sample data.
_ROIS = (DEFAULT_ROIS[0], DEFAULT_ROIS[8], DEFAULT_ROIS[11])

#: Output folder of a command, below the folder of a run.
_OUT = 'out'

_SIZE, _WINDOW = 128, 64


@dataclass
class Case:
    """Command and the results of its kills.

    Attributes:
        name: Name in the table.
        arguments: What to give to geofm; ``OUT`` is the folder to write into.
        in_place: Whether the command also writes into a copy of the data, ``DATA``.
        resumes: Checkpoint to resume when it is run again, if it exists.
        seconds: Time that an undisturbed run takes.
        kills: Number of kills.
        writing: Of these, while something was being written.
        half: Files under a final name that were not whole.
        left: Files left over after the next run, or missing.
        differ: Files that were not those of an undisturbed run.
    """

    name: str
    arguments: list[str]
    in_place: bool = False
    resumes: str | None = None
    seconds: float = 0.0
    kills: int = 0
    writing: int = 0
    half: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)


# -- processes ----------------------------------------------------------------------------------


def fork(function: Callable[[], object], temporary: Path) -> int:
    """Call a function in another process without output; return its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        log = os.open(temporary / 'kill-errors.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 2)
        os.environ['TMPDIR'] = str(temporary)
        os.environ['SOURCE_DATE_EPOCH'] = '0'
        function()
        status = 0
    except SystemExit as end:
        status = 1 if end.code else 0
        sys.stderr.write(str(end))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ask(function: Callable[[], Any], temporary: Path) -> Any:
    """Return the result of a function from another process, so that this one starts no threads."""
    answer = temporary / 'kill-answer.pkl'

    def call() -> None:
        answer.write_bytes(pickle.dumps(function()))

    process = fork(call, temporary)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError((temporary / 'kill-errors.txt').read_text())
    return pickle.loads(answer.read_bytes())


def perform(arguments: list[str]) -> None:
    """Run a command in this process, with smaller sample data than the command writes."""
    if arguments[0] == 'sample-data':
        write_sample_data(arguments[1], _ROIS, 1, 1, _WINDOW)
    else:
        geofm_main(arguments)


def run(arguments: list[str], temporary: Path) -> None:
    """Run a command to its end."""
    process = fork(lambda: perform(arguments), temporary)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f'{arguments}: {(temporary / "kill-errors.txt").read_text()}')


def kill_amid(
    arguments: list[str], folder: Path, after: float, writing: bool, temporary: Path
) -> bool:
    """Run a command and kill it; return whether it was still running."""
    process = fork(lambda: perform(arguments), temporary)
    time.sleep(after)
    while writing and not is_writing(folder):
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.004)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def is_writing(folder: Path) -> bool:
    """Return whether there is a temporary file or folder."""
    for _, folders, names in os.walk(folder):
        if any('.part' in name for name in (*folders, *names)):
            return True
    return False


# -- files --------------------------------------------------------------------------------------


def listing(folder: Path) -> set[str]:
    """Return all files below a folder, including hidden ones."""
    return {str(p.relative_to(folder)) for p in folder.rglob('*') if not p.is_dir()}


def content(path: Path) -> Any:
    """Read a file and return its content, without parts that differ between runs.

    Raises:
        Exception: If it is not.
    """
    match path.suffix:
        case '.tif':
            with rasterio.open(path) as src:
                return src.read(), src.tags(), str(src.profile)
        case '.parquet':
            table = pq.read_table(path)
            return table.to_pandas(), table.schema.metadata
        case '.ckpt' | '.pth':
            # Lightning's own states contain times.
            return torch.load(path, weights_only=True)['state_dict']
        case '.safetensors':
            return load_file(path)
        case '.json':
            return json.loads(path.read_text())
        case '.yaml':
            # A resumed run states where it resumed.
            return {**yaml.safe_load(path.read_text()), 'ckpt_path': None}
        case '.png':
            return matplotlib.image.imread(path)
        case '.pdf':
            data = path.read_bytes()
            if not data.rstrip().endswith(b'%%EOF'):
                raise ValueError('no end of a PDF')
            return data
        case _:
            return path.read_bytes()


def is_same(a: Any, b: Any) -> bool:
    """Return whether two contents are equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == 'f')
    if isinstance(a, pd.DataFrame):
        return all(
            is_same(x, y) if isinstance(x, np.ndarray) else x == y or (x != x and y != y)
            for name in a
            for x, y in zip(a[name], b[name], strict=True)
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


def broken(folder: Path, names: set[str]) -> list[str]:
    """Return incomplete files under final names; temporary and work files have other names."""
    found = []
    for name in sorted(listing(folder)):
        hidden = any(part.startswith('.') for part in Path(name).parts)
        if hidden and name not in names:
            continue
        try:
            content(folder / name)
        except Exception as error:
            found.append(f'{name}: {error}'[:200])
    return found


def partly_there(folder: Path, reference: Path, whole: tuple[str, ...]) -> list[str]:
    """Return folders that must appear at once, but lack some files."""
    there = (name for name in whole if (folder / name).exists())
    return [name for name in there if listing(folder / name) != listing(reference / name)]


def differing(folder: Path, reference: Path) -> list[str]:
    """Return the files whose content differs from the reference."""
    names = sorted(listing(folder) & listing(reference))
    return [n for n in names if not is_same(content(folder / n), content(reference / n))]


# -- the trial ----------------------------------------------------------------------------------


def cases(data: Path, checkpoint: Path, maps: Path, task: Path, table: Path) -> list[Case]:
    """Return the commands."""
    s1, s2 = (
        str(next((data / 'ROIs1868' / '36').rglob(f'{s}_*_ImgNo_0_*_patch_0.tif')))
        for s in ('s1', 's2')
    )
    scene = ['--s1', s1, '--s2', s2, '--window', str(_WINDOW), '--output', 'OUT/maps']
    model = [str(checkpoint)]
    fit = fit_arguments(data, 'OUT/run')
    window = ['--window', str(_WINDOW), '--output', 'OUT/maps']
    return [
        Case('index', ['index', 'DATA', '--pairs-json', 'OUT/pairs.json'], in_place=True),
        Case('split --copy', ['split', str(data), 'OUT/split', '--copy']),
        Case('sample-data', ['sample-data', 'OUT/sample']),
        Case('stats', ['stats', str(data), '--output', 'OUT/statistics.yaml']),
        Case('fit', fit, resumes='run/checkpoints/last.ckpt'),
        Case('export', ['export', str(checkpoint), 'OUT/weights.safetensors']),
        Case('export --to torchgeo', ['export', str(checkpoint), 'OUT/w.ckpt', '--to', 'torchgeo']),
        Case('map', ['map', str(checkpoint), *scene, '--figure', 'OUT/maps/figure']),
        Case('attention', ['attention', *model, *scene]),
        Case('embed', ['embed', *model, *scene]),
        Case('pca', ['pca', *model, *scene]),
        Case('predict', ['predict', str(task), *scene, '--overlap', '0.8']),
        Case('predict --table', ['predict', str(task), '--table', str(table), *window]),
        Case('page', ['page', str(maps), '--s2', s2, '--output', 'OUT/page']),
        Case('figure', ['figure', str(maps), '--s2', s2, '--output', 'OUT/figure']),
        Case(
            'benchmark',
            [
                'benchmark',
                *model,
                '--data=SampleLandCoverDataModule',
                f'--data.paths={data}',
                '--data.min_purity=0.3',
                '--probes=[knn]',
                '--k=[5]',
                '--cache=OUT/features',
                '--output=OUT/scores',
            ],
        ),
    ]


def fit_arguments(data: Path, output: str) -> list[str]:
    """Return the arguments of a pretraining run that takes seconds."""
    model, loader = '--model.init_args.', '--data.init_args.'
    config = CONFIGS / 'pretrain' / 'quickstart_dinov2.yaml'
    checkpoints = {
        'class_path': 'lightning.pytorch.callbacks.ModelCheckpoint',
        'init_args': {
            'save_last': True,
            'save_top_k': -1,
            'every_n_train_steps': 1,
            'enable_version_counter': False,
        },
    }
    return [
        'fit',
        f'--config={config}',
        f'--trainer.default_root_dir={output}',
        '--trainer.max_epochs=2',
        '--trainer.logger=false',
        '--trainer.limit_val_batches=0',
        '--trainer.accelerator=cpu',
        f'--trainer.callbacks=[{json.dumps(checkpoints)}]',
        f'{model}model=geofm_vit_nano_patch16_linear',
        f'{model}prototypes=64',
        f'{model}head_hidden_dim=32',
        f'{model}head_bottleneck_dim=16',
        f'{model}n_local=2',
        f'{model}warmup_epochs=1',
        f'{model}warmup_teacher_temperature_epochs=1',
        f'{loader}paths={data}',
        f'{loader}batch_size=2',
        f'{loader}patch_size=96',
    ]


def write_task(path: Path) -> None:
    """Write a segmentation task with random weights, as a Lightning Trainer writes it."""
    torch.manual_seed(0)
    task = SemanticSegmentation(
        'segformer', 'geofm_vit_nano_patch16_linear', in_channels=15, num_classes=4
    )
    torch.save({'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}, path)


#: Folders that appear at once.
_AT_ONCE = ('split', 'sample', 'page')


class Trial:
    """Runs of all cases."""

    def __init__(self, work: Path, temporary: Path, seed: int) -> None:
        self.work, self.temporary = work, temporary
        for folder in (work, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        self.random = random.Random(seed)
        self.data = work / 'data'
        self.tried = 0

    def prepare(self) -> list[Case]:
        """Write data, train a backbone, map a scene."""
        ask(lambda: write_sample_data(self.data, _ROIS, 2, 2, _SIZE), self.temporary)
        run(fit_arguments(self.data, str(self.work / 'backbone')), self.temporary)
        checkpoint = self.work / 'backbone' / 'checkpoints' / 'last.ckpt'
        task, table = self.work / 'task.ckpt', self.work / 'scenes.parquet'
        ask(lambda: write_task(task), self.temporary)
        scenes, layout = self.work / 'scenes', CONFIGS / 'layouts' / 'scenes.yaml'
        ask(lambda: write_sample_scenes(scenes, 'scene', _ROIS[:2], 2, 96), self.temporary)
        run(['index', str(scenes), '--layout', str(layout), '--output', str(table)], self.temporary)
        found = cases(self.data, checkpoint, self.work / 'maps', task, table)
        of_map = next(case for case in found if case.name == 'map')
        run([a.replace('OUT', str(self.work)) for a in of_map.arguments], self.temporary)
        return found

    def fresh(self) -> tuple[Path, Path]:
        """Return an empty folder to run in, with a copy of the data if needed."""
        folder = self.work / 'run'
        shutil.rmtree(folder, ignore_errors=True)
        (folder / _OUT).mkdir(parents=True)
        return folder, folder / 'data'

    def arguments(self, case: Case, folder: Path) -> list[str]:
        """Return the arguments of a case in a folder; the second run resumes if it can."""
        out, data = str(folder / _OUT), str(folder / 'data')
        arguments = [a.replace('OUT', out).replace('DATA', data) for a in case.arguments]
        if case.resumes is not None and (folder / _OUT / case.resumes).exists():
            arguments.append(f'--ckpt_path={folder / _OUT / case.resumes}')
        return arguments

    def start(self, case: Case) -> Path:
        """Return a folder in which nothing has run."""
        folder, data = self.fresh()
        if case.in_place:
            shutil.copytree(self.work.parent / 'data', data)
        return folder

    def reference(self, case: Case) -> Path:
        """Run a case undisturbed and keep its output."""
        folder = self.start(case)
        start = time.monotonic()
        run(self.arguments(case, folder), self.temporary)
        case.seconds = time.monotonic() - start
        reference = self.work / 'references' / case.name.replace(' ', '_')
        shutil.rmtree(reference, ignore_errors=True)
        shutil.copytree(folder, reference)
        return reference

    def kill_all(self, todo: list[tuple[Case, int]]) -> None:
        """Kill each case the given number of times, in turns, and record the results."""
        references = {case.name: self.reference(case) for case, _ in todo}
        for number in range(max(share for _, share in todo)):
            for case, share in todo:
                if number < share:
                    before = len(case.half), len(case.left), len(case.differ)
                    self.kill(case, references[case.name])
                    said = case.half[before[0] :], case.left[before[1] :], case.differ[before[2] :]
                    print(f'{case.name}, {case.seconds:.1f} s:', *said, flush=True)
            with atomic_file(self.work / 'found.pkl') as part:
                part.write_bytes(pickle.dumps([case for case, _ in todo]))

    def kill(self, case: Case, reference: Path) -> None:
        """Kill a case once, check its files, run it again and compare."""
        self.tried += 1
        temporary = self.temporary if self.tried % 2 else self.work / 'temporary'
        temporary.mkdir(exist_ok=True)
        writing = self.tried % 4 < 2
        while True:
            folder = self.start(case)
            after = self.random.uniform(0, case.seconds * (0.9 if writing else 1.0))
            if kill_amid(self.arguments(case, folder), folder, after, writing, temporary):
                break
        case.kills += 1
        case.writing += is_writing(folder)
        names = ask(lambda: listing(reference), temporary)
        case.half += ask(lambda: broken(folder, names), temporary)
        case.half += partly_there(folder / _OUT, reference / _OUT, _AT_ONCE)
        again = self.arguments(case, folder)
        run(again, temporary)
        case.left += sorted(listing(folder) ^ listing(reference))
        case.differ += ask(lambda: differing(folder, reference), temporary)


def table(found: list[Case], settings: str) -> str:
    """Return the results as Markdown."""
    lines = [
        '# Commands that are killed',
        '',
        settings,
        '',
        '| command | kills | while writing | half-written files | left over or missing after the '
        'rerun | results that differ |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    rows = [(c.name, c.kills, c.writing, len(c.half), len(c.left), len(c.differ)) for c in found]
    rows.append(('all', *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    lines += [f'| {" | ".join(str(cell) for cell in row)} |' for row in rows]
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Kill commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--work', type=Path, default=Path('output/kill'))
    parser.add_argument('--temporary', type=Path, default=Path('/dev/shm/geofm-kill'))
    parser.add_argument('--jobs', type=int, default=2, help='processes that try commands')
    parser.add_argument('--commands', nargs='*', help='names of commands; all by default')
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work = args.work.absolute()
    found = Trial(args.work, args.temporary.absolute(), args.seed).prepare()
    if args.commands:
        found = [case for case in found if case.name in args.commands]
    jobs = []
    for job in range(args.jobs):
        shares = [len(range(i, args.kills, len(found))) for i in range(len(found))]
        todo = [*zip(found, shares, strict=True)][job :: args.jobs]
        process = os.fork()
        if not process:
            trial = Trial(args.work / str(job), args.temporary.absolute() / str(job), args.seed)
            try:
                trial.kill_all(todo)
            finally:
                os._exit(0)
        jobs.append(process)
    for process in jobs:
        os.waitpid(process, 0)
    files = [args.work / str(job) / 'found.pkl' for job in range(args.jobs)]
    by_name = {case.name: case for file in files for case in pickle.loads(file.read_bytes())}
    found = [by_name[case.name] for case in found]
    settings = (
        f'{sum(case.kills for case in found)} kills (seed {args.seed}): half at a random moment, '
        'half soon after the command has started to write a file; half of all with the temporary '
        'folder on another file system than the output. Made by `python experiments/kill.py`.'
    )
    if not args.commands:
        with atomic_file(RESULTS / 'kill.md') as part:
            part.write_text(table(found, settings))
    print(table(found, settings))
    shutil.rmtree(args.temporary)
    shutil.rmtree(args.work)


if __name__ == '__main__':
    main()
