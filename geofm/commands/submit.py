"""The command that trains under SLURM."""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from geofm.atomic import write_atomically
from geofm.checkpoint_io import local_path
from geofm.commands.fit import FitSettings
from geofm.commands.job_script import Job
from geofm.commands.resume import require_same_settings
from geofm.messages import UsageError
from geofm.printing import say

#: Folder of the job script and logs, inside the folder of the run.
_FOLDER = 'slurm'

#: Options of ``geofm fit`` that the job sets, and the options of ``geofm submit`` to use instead.
_OURS = {
    '--trainer.accelerator': '--gpus',
    '--trainer.num_nodes': '--nodes',
    '--trainer.devices': '--gpus or --tasks-per-node',
}


def submit(
    configs: list[Path],
    nodes: int = 1,
    gpus: int = 1,
    tasks_per_node: int | None = None,
    cpus_per_task: int | None = None,
    time: str | None = None,
    mem: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    sbatch: list[str] | None = None,
    seeds: list[int] | None = None,
    sweep: list[str] | None = None,
    requeues: int = 3,
    grace: int = 300,
    dry_run: bool = False,
    fit: list[str] | None = None,
) -> None:
    """Train under SLURM: write a job script to the folder of the run, and submit it.

    Options of `geofm fit`, such as --trainer.max_epochs 5, are passed on.

    Args:
        configs: Configuration files, as for `geofm fit --config`.
        nodes: Number of nodes.
        gpus: Number of GPUs per node, with one rank per GPU. 0: train on CPUs.
        tasks_per_node: Number of ranks per node when training on CPUs; 1 by default.
        cpus_per_task: Number of CPUs per rank, including its data loader workers.
        time: Time limit in the format of `sbatch`, e.g. 24:00:00; by default that of the partition.
        mem: Memory per node, e.g. 64G.
        partition: SLURM partition; by default that of the cluster.
        account: Account that the job is charged to.
        qos: Quality of service (QOS) of the job.
        sbatch: Further options of `sbatch`, as KEY=VALUE, or KEY for options without a value.
        seeds: Seeds of a job array with one run per seed. Each run has a folder of its own.
        sweep: Options of `geofm fit` with several values each, as KEY=VALUE,VALUE, for a job array
            with one run per combination.
        requeues: Maximum number of times that a failed job is requeued.
        grace: Seconds before the time limit at which the ranks save a checkpoint and end.
        dry_run: Print the job script and do not submit it.
        fit: Options of `geofm fit` as a list. Usually they are given directly, as above.
    """
    if min(nodes - 1, gpus, requeues, grace) < 0:
        raise UsageError('--nodes must be 1 or more, and --gpus, --requeues and --grace 0 or more')
    if gpus and tasks_per_node not in (None, gpus):
        raise UsageError(f'--tasks-per-node {tasks_per_node}: there is one rank per GPU')
    ranks = gpus or tasks_per_node or 1
    arguments = _arguments(configs, fit or [], ['gpu' if gpus else 'cpu', str(nodes), str(ranks)])
    root, runs = _check(arguments, _combinations(seeds or [], sweep or []))
    resources = {
        'job-name': f'geofm-{root.absolute().name}',
        'nodes': nodes,
        'ntasks-per-node': ranks,
        'gpus-per-node': gpus or None,
        'cpus-per-task': cpus_per_task,
        'time': time,
        'mem': mem,
        'partition': partition,
        'account': account,
        'qos': qos,
    }
    job = Job(
        arguments=arguments,
        runs=list(runs.values()),
        options=_options(resources, sbatch or []),
        folder=root.absolute() / _FOLDER,
        requeues=requeues,
        grace=grace,
    )
    script = job.script(shlex.join(['geofm', *sys.argv[1:]]))
    if dry_run:
        print(script, end='')
        return
    number = _submit(job.folder / 'job.sbatch', script)
    say(f'job {number}: {job.folder / "job.sbatch"}')
    for i, name in enumerate(runs):
        say(f'job {number}_{i}: {root / name}')
    say(f'log: {job.folder / number}{"_*" if runs else ""}.log')


def _arguments(configs: Iterable[Path], fit: Sequence[str], devices: Iterable[str]) -> list[str]:
    """Return the arguments of ``geofm fit`` with accelerator, number of nodes and of devices."""
    for option in (argument.partition('=')[0] for argument in fit):
        if option in _OURS:
            raise UsageError(f'{option}: give {_OURS[option]} instead')
    parts = [('--config', str(config)) for config in configs]
    return [*itertools.chain(*parts, fit, ('--resume', 'auto'), *zip(_OURS, devices, strict=True))]


def _options(resources: Mapping[str, object], sbatch: Iterable[str]) -> dict[str, str | None]:
    """Return the options of ``sbatch``. Entries KEY=VALUE override those of the command."""
    options: dict[str, str | None] = {k: str(v) for k, v in resources.items() if v is not None}
    for entry in sbatch:
        key, equals, value = entry.removeprefix('--').partition('=')
        options[key] = value if equals else None
    return options


def _combinations(seeds: Sequence[int], sweep: Iterable[str]) -> dict[str, list[str]]:
    """Return the arguments of each run of an array, by the name of its folder."""
    axes: list[list[tuple[str, str]]] = []
    for entry in sweep:
        key, equals, values = entry.removeprefix('--').partition('=')
        if not equals:
            raise UsageError(f'--sweep {entry}: give KEY=VALUE,VALUE')
        # Do not split at commas in brackets.
        axes.append([(key, value) for value in re.split(r',(?![^\[{]*[\]}])', values)])
    if seeds:
        axes.append([('seed_everything', str(seed)) for seed in seeds])
    if not axes:
        return {}
    runs = {}
    for chosen in itertools.product(*axes):
        parts = [f'{key.rpartition(".")[2]}={value}' for key, value in chosen]
        name = re.sub(r'[^\w.,=+-]+', '_', ','.join(parts)).replace('seed_everything', 'seed')
        if name in runs:
            raise UsageError(f'two runs of the array would share the folder {name}')
        runs[name] = [part for key, value in chosen for part in (f'--{key}', value)]
    return runs


def _check(
    arguments: Sequence[str], runs: dict[str, list[str]]
) -> tuple[Path, dict[str, list[str]]]:
    """Check the configuration of each run, as its job will read it.

    Returns:
        Folder of the run or array, and the arguments of each run of the array by its folder.
    """
    given = FitSettings(['fit', *arguments])
    folder = given.config.fit.trainer.default_root_dir
    root = local_path(folder or '.')
    if not folder or root is None:
        raise ValueError(
            f'the job needs a local folder for the run and its logs, not {folder}: give '
            '--trainer.default_root_dir FOLDER'
        )
    if not runs:
        require_same_settings(root, given.settings())
    placed = {}
    for name, run in runs.items():
        placed[name] = [*run, '--trainer.default_root_dir', str(Path(folder) / name)]
        this = FitSettings(['fit', *arguments, *placed[name]])
        require_same_settings(root / name, this.settings())
    return Path(folder), placed


def _submit(path: Path, script: str) -> str:
    """Write and submit the script, and return the job ID."""
    try:
        # Two jobs must not write to the same folder.
        for line in _slurm('squeue', '--me', '--noheader', '--format=%i %o').splitlines():
            number, _, command = line.partition(' ')
            if command.strip() == str(path):
                raise ValueError(
                    f'job {number} of this folder is still in the queue: wait, `scancel {number}`, '
                    'or give another --trainer.default_root_dir'
                )
        write_atomically(path, script)
        # The job ID may be followed by the name of the cluster.
        return _slurm('sbatch', '--parsable', str(path)).strip().partition(';')[0]
    except FileNotFoundError as error:
        raise ValueError(
            f'{error.filename} is not installed: submit from a machine of the cluster, or print '
            'the job script with --dry-run'
        ) from error


def _slurm(*command: str) -> str:
    """Run a command of SLURM and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f'{command[0]}: {done.stderr.strip()}')
    return done.stdout
