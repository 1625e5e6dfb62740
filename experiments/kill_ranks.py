"""Kill a run of two ranks at random moments, resume it, and compare its weights.

    python experiments/kill_ranks.py --kills 20
    python experiments/kill_ranks.py --slurm --kills 20

A run of two ranks with gloo is disturbed: SIGTERM, SIGUSR1 or SIGKILL to a random rank, or a full
disk, each at a random moment. It must end by itself within 60 s, with a nonzero exit code,
and leave only complete checkpoints. The same command is then run again, with ``--resume auto``. A
finished run must have the weights of an undisturbed run. Writes ``experiments/results``.

The launcher is torchrun's. Its processes are forked from one that has imported the libraries.
With ``--slurm``, the run is a job of ``geofm submit`` on two nodes of a SLURM cluster that the
script starts, and also loses a node. The job must requeue itself, at most three times after
failures; then it is submitted again.

The run's folder is a small file system in memory, so that it can be full: mounting it takes root.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kill import CONFIGS, RESULTS, ask, broken, fork, is_same
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from geofm.atomic import atomic_file
from geofm.callbacks import RUN_FILE
from geofm.cli import main as geofm_main
from geofm.datasets import write_sample_data
from geofm.sample import DEFAULT_ROIS

# The cluster of the tests.
sys.path.append(str(Path(__file__).parents[1]))
from tests import cluster

RANKS = 2
KINDS = ('SIGTERM', 'SIGUSR1', 'SIGKILL', 'disk full')

#: How often a failed job is requeued.
REQUEUES = 3

CONFIG = CONFIGS / 'pretrain' / 'quickstart_dinov2.yaml'

#: Seconds within which a run must end.
_LIMIT = 60

#: Seconds after which SLURM gives up a node that does not answer.
_NODE_TIMEOUT = 15

#: Size of the file system in MiB, and of what makes it full.
_DISK = 256


@dataclass
class Kill:
    """A disturbed run.

    Attributes:
        kind: How.
        rank: Whose process got the signal, or whose node was lost; -1 for the disk.
        after: Seconds after the ranks began, having imported the libraries.
        code: Exit code of the launcher or job; None if the job has been requeued.
        seconds: Time until it had ended.
        resumes_at: Step of the checkpoint from which the next one resumes.
        broken: Files that are not whole.
    """

    kind: str
    rank: int
    after: float
    code: int | None
    seconds: float
    resumes_at: int
    broken: list[str]


@dataclass
class Result:
    """Disturbed runs with one launcher.

    Attributes:
        command: Command that measures them.
        seed: Seed of the random moments.
        seconds: Time that an undisturbed run takes.
        runs: Number of finished runs.
        differ: Of these, with other weights than an undisturbed run.
        kills: The kills.
    """

    command: str
    seed: int
    seconds: float
    runs: int
    differ: int
    kills: list[Kill]


def options(data: Path, folder: Path, epochs: int) -> list[str]:
    """Return the options of a run that takes seconds, with a checkpoint every third step."""
    model, loader = '--model.init_args.', '--data.init_args.'
    checkpoints = {
        'class_path': 'lightning.pytorch.callbacks.ModelCheckpoint',
        'init_args': {'save_last': True, 'every_n_train_steps': 3, 'enable_version_counter': False},
    }
    return [
        f'--trainer.default_root_dir={folder}',
        f'--trainer.max_epochs={epochs}',
        '--trainer.logger=false',
        '--trainer.limit_val_batches=0',
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

    launcher = 'torchrun'
    kinds: tuple[str, ...] = KINDS

    def __init__(self, work: Path, epochs: int, seed: int) -> None:
        self.work, self.epochs, self.random = work, epochs, random.Random(seed)
        self.data, self.pids = work / 'data', work / 'pids'
        rois = (DEFAULT_ROIS[0], DEFAULT_ROIS[8], DEFAULT_ROIS[11])
        ask(lambda: write_sample_data(self.data, rois, 4, 4, 128), work)

    def start(self, folder: Path) -> int:
        """Start a run and wait until all its ranks have started; return the launcher process."""
        shutil.rmtree(self.pids, ignore_errors=True)
        self.pids.mkdir()
        command = ['fit', f'--config={CONFIG}', *options(self.data, folder, self.epochs)]
        command += [f'--trainer.devices={RANKS}', '--trainer.accelerator=cpu', '--resume=auto']
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
        if kind == 'disk full':
            number = -1
            fill(folder)
        else:
            # If it has just ended, the launcher says how.
            with suppress(ProcessLookupError):
                os.kill(pids[number], signal.Signals[kind])
        code, seconds = wait(launcher)
        filler(folder).unlink(missing_ok=True)
        if code == 0:
            return None
        return self.examine(folder, kind, number, after, code, seconds)

    def examine(
        self, folder: Path, kind: str, number: int, after: float, code: int | None, seconds: float
    ) -> Kill:
        """Examine the files of a run that has ended."""
        resumes_at = ask(lambda: newest(folder), self.work)
        found = ask(lambda: broken(folder, set()), self.work)
        return Kill(kind, number, after, code, seconds, resumes_at, found)


class Jobs(Trial):
    """The same with ``geofm submit`` on two nodes."""

    launcher = 'geofm submit'
    kinds = (*KINDS, 'node lost')

    def __init__(self, work: Path, epochs: int, seed: int, nodes: list[cluster.Node]) -> None:
        super().__init__(work, epochs, seed)
        self.nodes = nodes
        self.job, self.requeued = '', 0

    def start_job(self, folder: Path) -> list[int]:
        """Submit the run, or start its requeued job again, and wait until it trains.

        Before that, the ranks import the libraries for most of the time.

        Returns:
            The process of each rank.
        """
        begun = time.time_ns()
        if self.job:
            cluster.start_again(self.job, self.requeued)
        else:
            self.job, self.requeued = ask(lambda: self.submit(folder), self.work), 0
        end = time.monotonic() + 10 * _LIMIT
        file = folder / RUN_FILE
        while not file.exists() or file.stat().st_mtime_ns < begun:
            if time.monotonic() > end:
                raise TimeoutError(cluster.ask('scontrol', 'show', 'job', self.job))
            time.sleep(0.05)
        ranks = processes(self.job)
        return [ranks[i] for i in range(RANKS)]

    def submit(self, folder: Path) -> str:
        """Submit the run; return the number of the job."""
        command = ['submit', str(CONFIG), *options(self.data, folder, self.epochs)]
        command += ['--gpus=0', f'--nodes={RANKS}', f'--requeues={REQUEUES}']
        # Each start of a worker would import the libraries once more.
        command += ['--data.init_args.num_workers=0']
        with redirect_stdout(StringIO()) as said:
            geofm_main(command)
        found = re.search(r'^job (\d+): ', said.getvalue(), re.MULTILINE)
        assert found is not None
        return found[1]

    def undisturbed(self, folder: Path) -> float:
        """Run to the end; return the seconds since the start of training."""
        self.start_job(folder)
        begun = time.monotonic()
        cluster.wait_for(self.job, 'COMPLETED', seconds=10 * _LIMIT)
        self.job = ''
        return time.monotonic() - begun

    def disturb(self, kind: str, folder: Path, most: float) -> Kill | None:
        """Start the run or its job again and disturb it; return None if it had finished before."""
        number, after = self.random.randrange(RANKS), self.random.uniform(0, most)
        pids = self.start_job(folder)
        time.sleep(after)
        if kind == 'disk full':
            number = -1
            fill(folder)
        elif kind == 'node lost':
            self.nodes[number].lose_power()
        else:
            # If it has just ended, the job says how.
            with suppress(ProcessLookupError):
                os.kill(pids[number], signal.Signals[kind])
        begun = time.monotonic()
        said = self.wait_for_end()
        seconds = time.monotonic() - begun
        filler(folder).unlink(missing_ok=True)
        if kind == 'node lost':
            self.nodes[number].start()
            cluster.wait_for_nodes(RANKS)
        self.requeued, code = cluster.restarts(said), None
        if 'JobState=PENDING' not in said:
            found = re.search(r'ExitCode=(\d+):', said)
            assert found is not None
            self.job, code = '', int(found[1])
            if code == 0:
                return None
        return self.examine(folder, kind, number, after, code, seconds)

    def wait_for_end(self) -> str:
        """Wait until the job is finished, has failed or waits to be started again."""
        end, failed = time.monotonic() + 10 * _LIMIT, 0
        while time.monotonic() < end:
            said = cluster.ask('scontrol', 'show', 'job', self.job)
            again = 'JobState=PENDING' in said and cluster.restarts(said) > self.requeued
            # A job that requeues itself has failed for a moment.
            failed += 'JobState=FAILED' in said
            if again or failed > 40 or 'JobState=COMPLETED' in said:
                return said
            time.sleep(0.05)
        raise TimeoutError(said)


def processes(job: str) -> dict[int, int]:
    """Return the process of each rank of a job, on all nodes, by its rank."""
    found = {}
    for folder in Path('/proc').glob('[0-9]*'):
        # Processes end at any time.
        with suppress(OSError):
            if b'geofm\0fit\0' not in (folder / 'cmdline').read_bytes():
                continue
            lines = (folder / 'environ').read_text(errors='replace').split('\0')
            variables = dict(line.split('=', 1) for line in lines if '=' in line)
            if variables.get('SLURM_JOB_ID') == job and 'SLURM_PROCID' in variables:
                found[int(variables['SLURM_PROCID'])] = int(folder.name)
    return found


def filler(folder: Path) -> Path:
    """Return the file that fills the file system of a run."""
    return folder.parent / 'filler'


def fill(folder: Path) -> None:
    """Fill the file system of a run."""
    with filler(folder).open('wb', buffering=0) as file, suppress(OSError):
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


def section(launcher: str, result: Result) -> list[str]:
    """Return the results with one launcher as lines of Markdown."""
    kills = result.kills
    ended = f'ended within {_LIMIT} s, exit code not 0'
    if launcher == Jobs.launcher:
        ended = f'requeued within {_LIMIT} s, or {ended}'
    lines = [
        f'## {launcher}',
        '',
        f'{len(kills)} kills at random moments (seed {result.seed}) of runs of {RANKS} ranks. '
        f'An undisturbed run takes {result.seconds:.0f} s. Measured by `{result.command}`.',
        '',
        f'| | kills | {ended} | seconds until the end, median | most | half-written files |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    kinds = list(dict.fromkeys(kill.kind for kill in kills))
    for kind in (*kinds, 'all'):
        of = [kill for kill in kills if kind in (kill.kind, 'all')]
        seconds = [kill.seconds for kill in of]
        well = sum(k.code != 0 and k.seconds <= _LIMIT for k in of)
        half = sum(len(k.broken) for k in of)
        times = f'{median(seconds):.1f} | {max(seconds):.1f}'
        lines.append(f'| {kind} | {len(of)} | {well} | {times} | {half} |')
    if launcher == Jobs.launcher:
        requeued = sum(kill.code is None for kill in kills)
        again = f'; after the others it had been requeued {REQUEUES} times, and was submitted again'
        said = f'The job was requeued after {requeued} of {len(kills)} kills'
        lines += ['', said + again * (requeued < len(kills)) + '.']
    return [*lines, '', f'Finished runs: {result.runs}, with different weights: {result.differ}.']


def write(launcher: str, result: Result) -> None:
    """Write the results, beside those with the other launcher, and print them."""
    path = RESULTS / 'kill_ranks.json'
    results: dict[str, Any] = json.loads(path.read_text())
    results[launcher] = asdict(result)
    lines = ['# A run of two ranks that is killed']
    for name, values in results.items():
        kills = [Kill(**kill) for kill in values['kills']]
        lines += ['', *section(name, Result(**{**values, 'kills': kills}))]
    text = '\n'.join(lines) + '\n'
    with atomic_file(path) as part:
        part.write_text(json.dumps(results, indent=1) + '\n')
    with atomic_file(path.with_suffix('.md')) as part:
        part.write_text(text)
    print(text)


def kill_runs(trial: Trial, root: Path, count: int, result: Result) -> None:
    """Disturb runs a number of times, and compare those that finish with an undisturbed one.

    The results are written after each finished run.
    """
    result.seconds = trial.undisturbed(root / 'reference')
    reference = ask(lambda: state(root / 'reference'), trial.work)
    kills = result.kills
    while len(kills) < count or result.runs == 0:
        folder, done = root / f'run{result.runs}', False
        folder.mkdir()
        while not done and len(kills) < count:
            kind = trial.kinds[len(kills) % len(trial.kinds)]
            kill = trial.disturb(kind, folder, result.seconds)
            done = kill is None
            if kill is not None:
                kills.append(kill)
                print(kill, flush=True)
        if not done:
            trial.undisturbed(folder)
        same = is_same(ask(partial(state, folder), trial.work), reference)
        result.runs, result.differ = result.runs + 1, result.differ + (not same)
        print(f'run {result.runs} is at its end: the same weights: {same}', flush=True)
        shutil.rmtree(folder)
        if kills:
            write(trial.launcher, result)


def main() -> None:
    """Kill runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--slurm', action='store_true', help='jobs of geofm submit')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--work', type=Path, default=Path('output/kill_ranks'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work.absolute()
    work.mkdir(parents=True)
    command = 'python experiments/kill_ranks.py' + ' --slurm' * args.slurm
    result = Result(command, args.seed, 0.0, 0, 0, [])
    with ExitStack() as stack:
        # Mounted before the nodes start, which would not see it otherwise.
        root = stack.enter_context(disk(work / 'disk'))
        if args.slurm:
            daemons = Path(stack.enter_context(tempfile.TemporaryDirectory(dir='/dev/shm')))
            started = cluster.cluster(daemons, RANKS, _NODE_TIMEOUT)
            nodes = stack.enter_context(started)
            trial: Trial = Jobs(work, args.epochs, args.seed, nodes)
        else:
            trial = Trial(work, args.epochs, args.seed)
        kill_runs(trial, root, args.kills, result)
    shutil.rmtree(work)


if __name__ == '__main__':
    main()
