"""`geofm submit` with a real SLURM cluster."""

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from geofm.cli import main
from geofm.datasets import write_sample_data
from geofm.messages import CommandError
from tests.cluster import (
    Node,
    ask,
    cluster,
    missing,
    one_node_only,
    restarts,
    start_again,
    wait_for,
    wait_for_nodes,
    wait_for_requeue,
)

ROOT = Path(__file__).resolve().parents[1]

needs_slurm = pytest.mark.skipif(
    bool(missing()), reason=f'needs SLURM: {", ".join(missing())} not installed'
)

#: A small model and data, for many steps per second.
SMALL = [
    '--model.init_args.model=geofm_vit_nano_patch16_linear',
    '--model.init_args.model_args.depth=1',
    '--model.init_args.global_size=32',
    '--model.init_args.local_size=16',
    '--model.init_args.n_local=1',
    '--model.init_args.prototypes=16',
    '--model.init_args.head_hidden_dim=16',
    '--model.init_args.head_bottleneck_dim=8',
    '--data.init_args.patch_size=32',
    '--data.init_args.batch_size=1',
]

#: Stand-in for Python that prints its arguments and runs the commands of a test.
STAND_IN = """\
#!/usr/bin/env bash
start=${SLURM_RESTART_COUNT:-0}
echo "start $start rank $SLURM_PROCID of $SLURM_NTASKS: $*"
"""


@pytest.fixture(scope='module')
def slurm() -> Iterator[list[Node]]:
    """The nodes of the cluster; none if this machine is the only one."""
    # In memory: SLURM drains a node whose disk is full, and then starts no job there.
    folder = tempfile.TemporaryDirectory(dir='/dev/shm')
    with folder as path, cluster(Path(path), nodes=1 if one_node_only() else 2) as nodes:
        yield nodes


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('data') / 'sample'
    write_sample_data(path, patches_per_roi=1, time_steps=2, size=64)
    return path


class Submit:
    """Submits the quickstart with a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / 'python'

    def __call__(self, program: str, *options: str) -> str:
        self.program.write_text(STAND_IN + program)
        self.program.chmod(0o755)
        config = f'{ROOT}/configs/pretrain/quickstart.yaml'
        root = f'--trainer.default_root_dir={self.folder}/run'
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
            patch.setattr(sys, 'executable', str(self.program))
            main(['submit', config, '--gpus=0', root, *options])
        found = re.search(r'^job (\d+): (.*)\n', said.getvalue(), re.MULTILINE)
        assert found is not None
        assert Path(found[2]).is_file()
        return found[1]

    def log(self, job: str) -> str:
        return (self.folder / 'run' / 'slurm' / f'{job}.log').read_text()


@pytest.fixture(scope='module')
def at_the_limit(slurm: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Submit, str]:
    """A job whose time limit is reached during the other tests.

    As in training, a rank ends after all have saved: SLURM kills the others when one ends.
    """
    folder = tmp_path_factory.mktemp('limit')
    submit = Submit(folder)
    job = submit(
        f"""\
((start > 0)) && exit 0
end() {{
    echo saved
    touch {folder}/$SLURM_PROCID.saved
    until [[ -e {folder}/0.saved && -e {folder}/1.saved ]]; do sleep 0.1; done
    exit 138
}}
trap end USR1
while true; do sleep 0.5; done
""",
        *('--tasks-per-node=2', '--time=1', '--grace=20', '--requeues=0'),
    )
    return submit, job


@pytest.fixture
def submit(at_the_limit: object, tmp_path: Path) -> Submit:
    return Submit(tmp_path)


def dry_run(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Return the lines of the script."""
    main(['submit', f'{ROOT}/configs/pretrain/quickstart.yaml', *options, '--dry-run'])
    return capsys.readouterr().out.splitlines()


def test_the_script_has_the_requested_resources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = dry_run(
        capsys,
        *('--nodes', '2', '--gpus', '4', '--cpus-per-task', '8', '--time', '24:00:00'),
        *('--sbatch', 'constraint=a100', 'exclusive', 'signal=B:USR1@60'),
        *('--trainer.default_root_dir', f'{tmp_path}/a run', '--trainer.max_epochs', '5'),
    )
    options = [line.removeprefix('#SBATCH --') for line in lines if line.startswith('#SBATCH')]
    assert {'nodes=2', 'ntasks-per-node=4', 'gpus-per-node=4', 'exclusive'} <= {*options}
    assert {'cpus-per-task=8', 'time=24:00:00', 'constraint=a100'} <= {*options}
    assert f"output='{tmp_path}/a run/slurm/%j.log'" in options
    assert [option for option in options if option.startswith('signal')] == ['signal=B:USR1@60']
    command = [line.strip(' \\') for line in lines[lines.index('') :] if line.startswith('    --')]
    assert command == [
        f'--config {ROOT}/configs/pretrain/quickstart.yaml',
        f"--trainer.default_root_dir '{tmp_path}/a run'",
        '--trainer.max_epochs 5',
        '--resume auto',
        '--trainer.accelerator gpu',
        '--trainer.num_nodes 2',
        '--trainer.devices 4 &',
    ]
    assert not [*tmp_path.iterdir()]


def test_invalid_submissions_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {'run': 'a' * 12, 'settings': {'class_path': 'geofm.tasks.DINOv2', 'init_args': {}}}
    for folder in ('run', 'array/lr=0.1'):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'geofm_run.json').write_text(json.dumps(other))
    monkeypatch.setenv('PATH', str(tmp_path))
    root = f'--trainer.default_root_dir={tmp_path}'
    for options, message in {
        ('--trainer.devices=2',): 'give --gpus or --tasks-per-node instead',
        ('--gpus=2', '--tasks-per-node=3'): 'one rank per GPU',
        ('--nodes=0',): '--nodes must be 1 or more',
        ('--trainer.default_root_dir=null',): 'the job needs a local folder',
        ('--model.init_args.typo=3',): "no option 'typo'",
        ('--sweep', 'model.init_args.lr'): 'give KEY=VALUE,VALUE',
        ('--sweep', 'model.init_args.lr=0.1,x'): 'model.init_args.lr',
        ('--sweep', 'model.init_args.lr=0.1,0.1'): 'share the folder lr=0.1',
        (f'{root}/run',): f'is the folder of run {"a" * 12}',
        (f'{root}/array', '--sweep', 'model.init_args.lr=0.1'): 'is the folder of run',
        (f'{root}/new',): 'squeue is not installed: submit from a machine of the cluster',
    }.items():
        with pytest.raises(CommandError):
            main(['submit', f'{ROOT}/configs/pretrain/quickstart.yaml', *options])
        assert message in capsys.readouterr().err


@needs_slurm
def test_a_finished_run_is_not_requeued(submit: Submit) -> None:
    job = submit('exit 0', '--tasks-per-node', '2', '--trainer.max_epochs', '5')
    assert restarts(wait_for(job, 'COMPLETED')) == 0
    log = submit.log(job)
    for rank in range(2):
        assert f'start 0 rank {rank} of 2: -m geofm fit --config {ROOT}/configs' in log
    assert '--trainer.max_epochs 5 --resume auto --trainer.accelerator cpu' in log
    assert log.count('--trainer.num_nodes 1 --trainer.devices 2\n') == 2


@needs_slurm
def test_after_a_killed_rank_the_job_is_requeued_a_limited_number_of_times(submit: Submit) -> None:
    """The other rank waits forever and ignores SIGTERM."""
    job = submit(
        "trap '' TERM\n((SLURM_PROCID == 1)) && kill -KILL $$\nwhile true; do sleep 1; done",
        *('--tasks-per-node', '2', '--requeues', '1'),
    )
    start_again(job)
    said = wait_for(job, 'FAILED')
    assert restarts(said) == 1
    assert 'ExitCode=137:0' in said
    assert f'exit code 137: job {job} is requeued (1 of 1)' in submit.log(job)
    assert f'exit code 137: job {job} has failed 2 times and ends' in submit.log(job)


@needs_slurm
def test_a_cancelled_job_can_be_submitted_again(submit: Submit) -> None:
    job = submit('sleep 100')
    wait_for(job, 'RUNNING')
    with pytest.raises(CommandError, match=f'job {job} of this folder is still in the queue'):
        submit('sleep 100')
    ask('scancel', job)
    assert restarts(wait_for(job, 'CANCELLED')) == 0
    while ask('squeue', '--noheader', f'--jobs={job}'):
        pass
    assert restarts(wait_for(submit('exit 0'), 'COMPLETED')) == 0


@needs_slurm
def test_a_job_array_has_one_run_per_seed_and_value(submit: Submit) -> None:
    job = submit(
        'exit $((start == 0 && SLURM_ARRAY_TASK_ID == 1))',
        *('--seeds', '0', '7', '--sweep', 'model.init_args.lr=0.001,0.004'),
    )
    start_again(f'{job}_1')
    root = submit.folder / 'run'
    for i, (lr, seed) in enumerate([('0.001', 0), ('0.001', 7), ('0.004', 0), ('0.004', 7)]):
        said = wait_for(f'{job}_{i}', 'COMPLETED')
        assert restarts(said) == (i == 1)
        log = submit.log(f'{job}_{i}')
        assert f'--model.init_args.lr {lr} --seed_everything {seed}' in log
        assert f'--trainer.default_root_dir {root}/lr={lr},seed={seed}\n' in log


@needs_slurm
def test_a_failure_that_cannot_be_written_down_is_requeued_too(submit: Submit) -> None:
    """As on a full disk. Its file is a folder here, because root could write to any file."""
    job = submit(
        f'mkdir -p {submit.folder}/run/slurm/$SLURM_JOB_ID.failures; exit 3', '--requeues', '1'
    )
    start_again(job)
    assert restarts(wait_for(job, 'FAILED')) == 1
    assert f'exit code 3: job {job} is requeued (1 of 1)' in submit.log(job)
    assert f'exit code 3: job {job} has failed 2 times and ends' in submit.log(job)


class StopAfter(Callback):
    """Saves a checkpoint after a number of steps and ends the run."""

    def __init__(self, steps: int, path: str) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class Training:
    """A run with the real Python, of two ranks."""

    def __init__(self, root: Path, sample: Path) -> None:
        self.root, self.job = root, ''
        self.settings = [
            f'{ROOT}/configs/pretrain/quickstart_dinov2.yaml',
            *(f'--trainer.default_root_dir={root}', f'--data.init_args.paths={sample}'),
            *('--trainer.max_epochs=10000', '--trainer.logger=false'),
            *('--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.every_n_train_steps=2'),
            *('--trainer.check_val_every_n_epoch=1', '--trainer.limit_val_batches=1', *SMALL),
        ]

    def submit(self, nodes: int) -> None:
        """Submit the run to one or two nodes, with workers: SLURM also signals these."""
        tasks = ('--nodes', str(nodes), '--tasks-per-node', str(2 // nodes))
        with redirect_stdout(StringIO()) as said:
            main(
                [
                    *('submit', *self.settings, '--gpus', '0', *tasks, '--requeues', '1'),
                    '--data.init_args.num_workers=1',
                ]
            )
        found = re.search(r'^job (\d+): ', said.getvalue(), re.MULTILINE)
        assert found is not None
        self.job = found[1]

    def log(self) -> str:
        return (self.root / 'slurm' / f'{self.job}.log').read_text()

    def wait_for_checkpoint(self, after: int) -> int:
        """Wait for a checkpoint with more steps, and return its steps."""
        end = time.monotonic() + 600
        while time.monotonic() < end:
            paths = (self.root / 'checkpoints').glob('[!.]*.ckpt')
            steps = [load(path)['global_step'] for path in paths]
            if max(steps, default=0) > after:
                return int(max(steps))
            time.sleep(0.3)
        raise TimeoutError(self.log())


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def lose_node(node: Node, job: str) -> int:
    """Switch off a node of a job, wait for SLURM and switch it on; return the requeues."""
    node.lose_power()
    # SLURM would notice it after five minutes.
    ask('scontrol', 'update', f'nodename={node.name}', 'state=down', 'reason=no power')
    requeues = restarts(wait_for_requeue(job))
    node.start()
    wait_for_nodes(2)
    return requeues


def kill_rank(job: str) -> int:
    """Kill a rank of a job on this machine and wait for SLURM; return the requeues."""
    processes = (line.split() for line in ask('scontrol', 'listpids', job).splitlines())
    os.kill(next(int(p[0]) for p in processes if p[-1] == '1'), signal.SIGKILL)
    return restarts(wait_for_requeue(job))


@needs_slurm
def test_training_resumes_after_a_lost_node_and_stops_for_slurm(
    at_the_limit: object, slurm: list[Node], sample: Path, tmp_path: Path
) -> None:
    """The weights are those of two ranks on one node that nothing has disturbed.

    Where the cluster has one node only, it loses a rank.
    """
    run = Training(tmp_path / 'run', sample)
    run.submit(nodes=len(slurm) or 1)
    first = run.wait_for_checkpoint(0)
    requeues = lose_node(slurm[1], run.job) if slurm else kill_rank(run.job)
    start_again(run.job, requeues)
    run.wait_for_checkpoint(first + 2)
    # SLURM does this before the time limit.
    ask('scancel', '--batch', '--signal=USR1', run.job)
    wait_for_requeue(run.job, requeues + 1)
    ask('scancel', run.job)
    assert ('DUE TO NODE FAILURE' if slurm else 'is requeued (1 of 1)\n') in run.log()
    assert f'time limit: job {run.job} is requeued' in run.log()
    assert f'resumes from {run.root}/checkpoints/' in run.log()
    (path,) = run.root.glob('hpc_ckpt_*.ckpt')
    saved = load(path)
    undisturbed = Training(tmp_path / 'one', sample)
    stop = {'steps': saved['global_step'], 'path': f'{tmp_path}/undisturbed.ckpt'}
    callback = json.dumps({'class_path': f'{__name__}.StopAfter', 'init_args': stop})
    main(
        [
            *('fit', '--config', *undisturbed.settings, '--trainer.accelerator=cpu'),
            *('--trainer.devices=2', '--trainer.strategy=ddp_fork'),
            f'--trainer.callbacks+={callback}',
        ]
    )
    expected = load(tmp_path / 'undisturbed.ckpt')
    torch.testing.assert_close(saved['state_dict'], expected['state_dict'], rtol=0, atol=0)


@needs_slurm
def test_at_the_time_limit_the_ranks_are_told_to_end_and_the_job_is_queued_again(
    at_the_limit: tuple[Submit, str],
) -> None:
    """SLURM checks time limits every 30 s, and signals 20 to 50 s after the start."""
    submit, job = at_the_limit
    start_again(job)
    assert restarts(wait_for(job, 'COMPLETED')) == 1
    log = submit.log(job)
    assert log.count('saved\n') == 2
    assert f'time limit: job {job} is requeued' in log
    assert 'start 1 rank 0 of 2' in log
