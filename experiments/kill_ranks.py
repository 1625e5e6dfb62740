"""Kill a run of two ranks at random moments, resume it, and compare its weights.

    python experiments/kill_ranks.py --kills 20

A run of two ranks with gloo is disturbed: SIGTERM, SIGUSR1 or SIGKILL to a random rank, or a full
disk, each at a random moment. It must end by itself within 60 s, with a nonzero exit code,
and leave only complete checkpoints. The same command is then run again, with ``--resume auto``. A
finished run must have the weights of an undisturbed run. Writes ``experiments/results``.

The launcher is torchrun's. Its processes are forked from one that has imported the libraries.
The run's folder is a small file system in memory, so that it can be full: mounting it takes root.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from kill import CONFIGS, RESULTS, ask, broken, fork, is_same
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from geofm.atomic import atomic_file
from geofm.cli import main as geofm_main
from geofm.datasets import write_sample_data
from geofm.sample import DEFAULT_ROIS

RANKS = 2
KINDS = ('SIGTERM', 'SIGUSR1', 'SIGKILL', 'disk full')

#: Seconds within which a run must end.
_LIMIT = 60

#: Size of the file system in MiB, and of what makes it full.
_DISK = 256


@dataclass
class Kill:
    """A disturbed run.

    Attributes:
        kind: How.
        rank: Whose process got the signal; -1 for the disk.
        after: Seconds after the ranks began.
        code: Exit code of the launcher.
        seconds: Time until it had ended.
        resumes_at: Step of the checkpoint from which the next one resumes.
        broken: Files that are not whole.
    """

    kind: str
    rank: int
    after: float
    code: int
    seconds: float
    resumes_at: int
    broken: list[str]


def arguments(data: Path, folder: Path, epochs: int) -> list[str]:
    """Return the arguments of a run that takes seconds, with a checkpoint every third step."""
    model, loader = '--model.init_args.', '--data.init_args.'
    checkpoints = {
        'class_path': 'lightning.pytorch.callbacks.ModelCheckpoint',
        'init_args': {'save_last': True, 'every_n_train_steps': 3, 'enable_version_counter': False},
    }
    return [
        'fit',
        f'--config={CONFIGS}/pretrain/quickstart_dinov2.yaml',
        f'--trainer.default_root_dir={folder}',
        f'--trainer.max_epochs={epochs}',
        f'--trainer.devices={RANKS}',
        '--trainer.logger=false',
        '--trainer.limit_val_batches=0',
        '--trainer.accelerator=cpu',
        '--trainer.enable_progress_bar=false',
        f'--trainer.callbacks=[{json.dumps(checkpoints)}]',
        f'{model}model=geofm_vit_nano_patch16_linear',
        f'{model}model_args.depth=1',
        f'{model}prototypes=64',
        f'{model}head_hidden_dim=32',
        f'{model}head_bottleneck_dim=16',
        f'{model}n_local=2',
        f'{model}warmup_epochs=1',
        f'{model}warmup_teacher_temperature_epochs=1',
        f'{loader}paths={data}',
        f'{loader}batch_size=2',
        f'{loader}num_workers=1',
        f'{loader}patch_size=96',
        '--resume=auto',
    ]


def rank(command: list[str], pids: Path) -> None:
    """Run one rank."""
    (pids / os.environ['RANK']).write_text(str(os.getpid()))
    geofm_main(command)


def launch(command: list[str], pids: Path) -> None:
    """Run a command on all ranks, as torchrun does."""
    config = LaunchConfig(
        *(1, 1, RANKS),
        run_id=uuid.uuid4().hex,
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',
        max_restarts=0,
        start_method='fork',
    )
    elastic_launch(config, rank)(command, pids)


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """Mount a separate file system."""
    folder.mkdir(parents=True)
    size = f'size={_DISK}m'
    subprocess.run(['mount', '-t', 'tmpfs', '-o', size, 'tmpfs', folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(['umount', '--lazy', folder], check=True)


class Trial:
    """Runs that are disturbed one after the other until there are enough kills."""

    def __init__(self, work: Path, epochs: int, seed: int) -> None:
        self.work, self.epochs, self.random = work, epochs, random.Random(seed)
        self.data, self.pids = work / 'data', work / 'pids'
        rois = (DEFAULT_ROIS[0], DEFAULT_ROIS[8], DEFAULT_ROIS[11])
        ask(lambda: write_sample_data(self.data, rois, 4, 4, 128), work)

    def start(self, folder: Path) -> int:
        """Start a run and wait until all its ranks have started; return the launcher process."""
        shutil.rmtree(self.pids, ignore_errors=True)
        self.pids.mkdir()
        command = arguments(self.data, folder, self.epochs)
        launcher = fork(lambda: launch(command, self.pids), self.work)
        while sum(path.stat().st_size > 0 for path in self.pids.iterdir()) < RANKS:
            if os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise RuntimeError((self.work / 'kill-errors.txt').read_text())
            time.sleep(0.01)
        return launcher

    def undisturbed(self, folder: Path) -> float:
        """Run to the end; return the seconds since the start of the ranks."""
        launcher = self.start(folder)
        begun = time.monotonic()
        if os.waitpid(launcher, 0)[1]:
            raise RuntimeError((self.work / 'kill-errors.txt').read_text())
        return time.monotonic() - begun

    def disturb(self, kind: str, folder: Path, most: float) -> Kill | None:
        """Start or resume a run and disturb it; return None if it had finished before."""
        number, after = self.random.randrange(RANKS), self.random.uniform(0, most)
        launcher = self.start(folder)
        pids = [int((self.pids / str(i)).read_text()) for i in range(RANKS)]
        time.sleep(after)
        filler = folder / 'filler'
        if kind == 'disk full':
            number = -1
            fill(filler)
        else:
            # If it has just ended, the launcher says how.
            with suppress(ProcessLookupError):
                os.kill(pids[number], signal.Signals[kind])
        code, seconds = wait(launcher)
        filler.unlink(missing_ok=True)
        if code == 0:
            return None
        found = ask(lambda: broken(folder, set()), self.work)
        return Kill(
            kind, number, after, code, seconds, ask(lambda: newest(folder), self.work), found
        )


def fill(path: Path) -> None:
    """Fill the file system that a file is on."""
    with path.open('wb', buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**20))


def wait(process: int) -> tuple[int, float]:
    """Wait for a process to end; return its exit code and the seconds it took."""
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        seconds = time.monotonic() - begun
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if seconds > 10 * _LIMIT:
            raise TimeoutError(f'the run has not ended after {seconds:.0f} s')
        time.sleep(0.05)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the last checkpoint."""
    return torch.load(folder / 'checkpoints' / 'last.ckpt', weights_only=True)['state_dict']


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint of a run, or 0."""
    paths = [p for p in folder.rglob('*.ckpt') if not p.name.startswith('.')]
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
    return 0 if newest is None else int(torch.load(newest, weights_only=True)['global_step'])


def table(kills: list[Kill], runs: int, differ: int, settings: str) -> str:
    """Return the results as Markdown."""
    lines = [
        '# A run of two ranks that is killed',
        '',
        settings,
        '',
        f'| | kills | ended within {_LIMIT} s, exit code not 0 | seconds until the end, median '
        '| most | half-written files |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    for kind in (*KINDS, 'all'):
        of = [kill for kill in kills if kind in (kill.kind, 'all')]
        seconds = [kill.seconds for kill in of]
        ended = sum(k.code != 0 and k.seconds <= _LIMIT for k in of)
        half = sum(len(k.broken) for k in of)
        times = f'{median(seconds):.1f} | {max(seconds):.1f}'
        lines.append(f'| {kind} | {len(of)} | {ended} | {times} | {half} |')
    lines += ['', f'Finished runs: {runs}, with different weights: {differ}.']
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Kill runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--work', type=Path, default=Path('output/kill_ranks'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work.absolute()
    work.mkdir(parents=True)
    trial = Trial(work, args.epochs, args.seed)
    most = trial.undisturbed(work / 'reference')
    reference = ask(lambda: state(work / 'reference'), work)
    kills: list[Kill] = []
    runs = differ = 0
    while len(kills) < args.kills or runs == 0:
        with disk(work / f'run{runs}') as folder:
            done = False
            while not done and len(kills) < args.kills:
                kill = trial.disturb(KINDS[len(kills) % len(KINDS)], folder, most)
                done = kill is None
                if kill is not None:
                    kills.append(kill)
                    print(kill, flush=True)
            if not done:
                trial.undisturbed(folder)
            same = is_same(ask(lambda: state(folder), work), reference)
            runs, differ = runs + 1, differ + (not same)
            print(f'run {runs} is at its end: the same weights: {same}', flush=True)
    settings = (
        f'{len(kills)} kills at random moments (seed {args.seed}) of runs of {RANKS} ranks. '
        f'An undisturbed run takes {most:.0f} s. Measured by '
        '`python experiments/kill_ranks.py`.'
    )
    text = table(kills, runs, differ, settings)
    with atomic_file(RESULTS / 'kill_ranks.md') as part:
        part.write_text(text)
    with atomic_file(RESULTS / 'kill_ranks.json') as part:
        part.write_text(json.dumps([asdict(kill) for kill in kills], indent=1) + '\n')
    print(text)
    shutil.rmtree(work)


if __name__ == '__main__':
    main()
