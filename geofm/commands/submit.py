"""The command that trains under SLURM."""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from geofm.atomic import atomic_file
from geofm.checkpoint_io import local_path
from geofm.commands.fit import FitSettings
from geofm.commands.job_script import Job
from geofm.commands.resume import require_same_settings
from geofm.printing import say

#: Folder of a job's script and logs, in that of the run.
_FOLDER = 'slurm'

#: Options of ``geofm fit`` that are for the job to set.
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
    """Train under SLURM: write a job script into the folder of the run, and submit it.

    Options of `geofm fit`, such as --trainer.max_epochs 5, are passed on to it.

    Args:
        configs: Files of configuration, as of `geofm fit --config`.
        nodes: Number of nodes.
        gpus: GPUs of each node, one a rank; 0 trains on CPUs.
        tasks_per_node: Ranks on each node without GPUs; 1 by default.
        cpus_per_task: CPUs of each rank: its own one, and those of the workers that read.
        time: Time limit, as `sbatch` takes it, e.g. 24:00:00; by default that of the partition.
        mem: Memory of each node, e.g. 64G.
        partition: Partition to run in.
        account: Account to charge.
        qos: Quality of service.
        sbatch: Further options of `sbatch`, as KEY=VALUE, or KEY if there is no value.
        seeds: Seeds of an array of runs, each in a folder of its own.
        sweep: Values of options of `geofm fit`, as KEY=VALUE,VALUE: a run for each combination.
        requeues: How often a job that fails is queued again.
        grace: Seconds before the time limit at which the ranks are told to save and end.
        dry_run: Whether to print the script and submit nothing.
        fit: Options of `geofm fit`; they may stand among the others.
    """
    if min(nodes - 1, gpus, requeues, grace) < 0:
        raise ValueError('--nodes must be 1 or more, and --gpus, --requeues and --grace 0 or more')
    if gpus and tasks_per_node not in (None, gpus):
        raise ValueError(f'--tasks-per-node {tasks_per_node}: there is one rank for each GPU')
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
    """Arguments of ``geofm fit``, on an accelerator, a number of nodes, and devices of each."""
    for option in (argument.partition('=')[0] for argument in fit):
        if option in _OURS:
            raise ValueError(f'{option}: give {_OURS[option]} instead')
    parts = [('--config', str(config)) for config in configs]
    return [*itertools.chain(*parts, fit, ('--resume', 'auto'), *zip(_OURS, devices, strict=True))]


def _options(resources: Mapping[str, object], sbatch: Iterable[str]) -> dict[str, str | None]:
    """Options of ``sbatch``: those of the command, and over them those given as KEY=VALUE."""
    options: dict[str, str | None] = {k: str(v) for k, v in resources.items() if v is not None}
    for entry in sbatch:
        key, equals, value = entry.removeprefix('--').partition('=')
        options[key] = value if equals else None
    return options


def _combinations(seeds: Sequence[int], sweep: Iterable[str]) -> dict[str, list[str]]:
    """Arguments of each run of an array, by the name of its folder."""
    axes: list[list[tuple[str, str]]] = []
    for entry in sweep:
        key, equals, values = entry.removeprefix('--').partition('=')
        if not equals:
            raise ValueError(f'--sweep {entry}: give KEY=VALUE,VALUE')
        # Commas within brackets are those of a list.
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
            raise ValueError(f'two runs of the array would be in one folder, {name}')
        runs[name] = [part for key, value in chosen for part in (f'--{key}', value)]
    return runs


def _check(
    arguments: Sequence[str], runs: dict[str, list[str]]
) -> tuple[Path, dict[str, list[str]]]:
    """Read the configuration of each run, as its job will.

    Returns:
        Folder of the run or array, and the arguments of each run of the array, by its folder.
    """
    given = FitSettings(['fit', *arguments])
    folder = given.config.fit.trainer.default_root_dir
    root = local_path(folder or '.')
    if not folder or root is None:
        raise ValueError(
            f'the job needs a folder for the run and its logs, not {folder}: give '
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
    """Write the script and submit it; the number of the job."""
    try:
        # Two jobs must not write into one folder.
        for line in _slurm('squeue', '--me', '--noheader', '--format=%i %o').splitlines():
            number, _, command = line.partition(' ')
            if command.strip() == str(path):
                raise ValueError(
                    f'job {number} of this folder is still in the queue: wait, `scancel {number}`, '
                    'or give another --trainer.default_root_dir'
                )
        with atomic_file(path) as part:
            part.write_text(script)
        # Behind the number, the name of the cluster if there are several.
        return _slurm('sbatch', '--parsable', str(path)).strip().partition(';')[0]
    except FileNotFoundError as error:
        raise ValueError(
            f'{error.filename} is not there: submit on a machine of the cluster. --dry-run prints '
            'the job script'
        ) from error


def _slurm(*command: str) -> str:
    """Output of one of SLURM's commands."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f'{command[0]}: {done.stderr.strip()}')
    return done.stdout
