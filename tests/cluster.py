"""A SLURM cluster with this machine as its only node, and its own daemons."""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port

#: Required daemons, by Debian package.
DAEMONS = {'munged': 'munge', 'slurmctld': 'slurm-wlm', 'slurmd': 'slurm-wlm'}

_PATH = os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/sbin'])

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
DefMemPerCPU=16
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1024
PartitionName=test Nodes=ALL Default=YES
"""


def missing() -> list[str]:
    """Return the daemons that are not installed."""
    return [name for name in DAEMONS if shutil.which(name, path=_PATH) is None]


def ask(*command: str) -> str:
    """Run a command of SLURM and return its output."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def wait_for(job: str, state: str, seconds: float = 60) -> str:
    """Wait until a job has a state.

    Args:
        job: Its number.
        state: E.g. 'COMPLETED', or with a reason 'PENDING Reason=BeginTime'.
        seconds: How long to wait.

    Returns:
        What SLURM says of the job.

    Raises:
        TimeoutError: If it takes longer.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        said = ask('scontrol', 'show', 'job', job)
        if f'JobState={state}' in said:
            return said
        time.sleep(0.3)
    raise TimeoutError(said)


def start_again(job: str) -> None:
    """Start a requeued job without the delay of two minutes."""
    wait_for(job, 'PENDING Reason=BeginTime')
    ask('scontrol', 'update', f'JobId={job}', 'StartTime=now')


def restarts(said: str) -> int:
    """Return how many times a job has been restarted, from its description by SLURM."""
    found = re.search(r'Restarts=(\d+)', said)
    assert found is not None
    return int(found[1])


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start the daemons, and stop them at the end.

    Args:
        folder: Where they keep their files; its name must be short, for a socket is in it.
    """
    for name in ('state', 'spool'):
        (folder / name).mkdir()
    key = folder / 'munge.key'
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    configuration = folder / 'slurm.conf'
    configuration.write_text(
        _CONFIGURATION.format(
            host=socket.gethostname().partition('.')[0],
            user=getpass.getuser(),
            folder=folder,
            ports=[find_free_network_port(), find_free_network_port()],
        )
    )
    os.environ['SLURM_CONF'] = str(configuration)
    munge = [f'--{name}-file={folder}/munge.{name}' for name in ('key', 'pid', 'log', 'seed')]
    commands = [
        ['munged', '--foreground', '--force', f'--socket={folder}/munge.socket', *munge],
        ['slurmctld', '-D', '-i'],
        ['slurmd', '-D'],
    ]
    daemons = []
    try:
        for command in commands:
            path = shutil.which(command[0], path=_PATH)
            assert path is not None
            with (folder / f'{command[0]}.out').open('w') as out:
                daemons.append(
                    subprocess.Popen([path, *command[1:]], stdout=out, stderr=subprocess.STDOUT)
                )
            while command[0] == 'munged' and not (folder / 'munge.socket').exists():
                time.sleep(0.1)
        end = time.monotonic() + 30
        while (
            'idle'
            not in subprocess.run(
                ['sinfo', '--noheader', '--format=%T'], capture_output=True, text=True, check=False
            ).stdout
        ):
            if time.monotonic() > end:
                raise TimeoutError((folder / 'slurmctld.out').read_text())
            time.sleep(0.3)
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        del os.environ['SLURM_CONF']
