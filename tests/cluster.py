"""A SLURM cluster on this machine, with its own daemons.

Root can give it several nodes: namespaces of Linux with a host name, an address and processes of
their own, connected by a bridge. Otherwise, this machine is the only node.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port

#: Required daemons, by Debian package.
DAEMONS = {'munged': 'munge', 'slurmctld': 'slurm-wlm', 'slurmd': 'slurm-wlm'}

_PATH = os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/sbin'])

#: Two clusters on this machine differ in the numbers of their jobs, because ranks listen on a port
#: of that number + 15000. For the time of cred_expire, a requeued job waits.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=3600
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
DefMemPerCPU=16
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
FirstJobId={first}
MinJobAge=86400
ReturnToService=2
KillWait=2
SlurmdTimeout={timeout}
MpiDefault=none
{nodes}
PartitionName=test Nodes=ALL Default=YES
"""

#: What a node does before its slurmd: it waits for its end of a cable, and takes its address.
_START = """\
mount --bind {hosts} /etc/hosts && hostname {name} && echo && read
ip link set lo up && ip address add {address}/24 dev eth0 && ip link set eth0 up
exec slurmd -D -N {name} &>> {log}
"""


def missing() -> list[str]:
    """Return the daemons that are not installed."""
    return [name for name in DAEMONS if shutil.which(name, path=_PATH) is None]


def one_node_only() -> str | None:
    """Return why there cannot be several nodes here, or None."""
    if os.geteuid():
        return 'only root can give nodes addresses of their own'
    for program in ('ip', 'unshare', 'mount', 'hostname'):
        if shutil.which(program, path=_PATH) is None:
            return f'{program} is not installed'
    bridge = _bridge()
    made = _run('ip', 'link', 'add', bridge, 'type', 'bridge', check=False)
    apart = _run('unshare', *_APART, 'true', check=False)
    _run('ip', 'link', 'delete', bridge, check=False)
    return (made.stderr + apart.stderr).strip() or None


def ask(*command: str) -> str:
    """Run a command of SLURM and return its output."""
    return _run(*command).stdout


def wait_for(job: str, state: str, requeued: int = 0, seconds: float = 180) -> str:
    """Wait until a job has a state.

    Args:
        job: Its number.
        state: A regular expression, such as 'COMPLETED' or 'RUNNING|COMPLETED'.
        requeued: How many times it must have been requeued, at least.
        seconds: How long to wait.

    Returns:
        What SLURM says of the job.

    Raises:
        TimeoutError: If it takes longer. Says the states of the job and of the nodes.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        said = ask('scontrol', 'show', 'job', job)
        if re.search(f'JobState=({state}) ', said) and restarts(said) >= requeued:
            return said
        time.sleep(0.3)
    raise TimeoutError(
        f'not {state} after {seconds:.0f} s: {said}{ask("scontrol", "show", "node")}'
    )


def wait_for_requeue(job: str, times: int = 1) -> str:
    """Wait until a job has been requeued a number of times; return what SLURM says of it."""
    return wait_for(job, 'PENDING', times)


def start_again(job: str, times: int = 1) -> None:
    """Start a job that has been requeued a number of times; by itself it would not start soon."""
    wait_for_requeue(job, times)
    # A node refuses a job that starts in the second in which it ended there.
    ask('scontrol', 'update', f'JobId={job}', 'StartTime=now+2')


def restarts(said: str) -> int:
    """Return how many times a job has been restarted, from its description by SLURM."""
    found = re.search(r'Restarts=(\d+)', said)
    assert found is not None
    return int(found[1])


class Node:
    """A node with a host name, an address and processes of its own.

    Args:
        number: Its number, from 1 on.
        bridge: Name of the bridge.
        address: Its address.
        folder: Folder of the cluster.
    """

    def __init__(self, number: int, bridge: str, address: str, folder: Path) -> None:
        self.name, self.address = f'n{number}', address
        self._bridge, self._cable, self._folder = bridge, f'{bridge}n{number}', folder

    def start(self) -> None:
        """Switch the node on."""
        start = _START.format(
            name=self.name,
            address=self.address,
            hosts=self._folder / 'hosts',
            log=self._folder / f'{self.name}.out',
        )
        command = ['unshare', *_APART, 'bash', '-c', start]
        environment = os.environ | {'PATH': _PATH}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.readline()
        # The cable of a node that lost its power may still be there.
        _run('ip', 'link', 'delete', self._cable, check=False)
        peer = ['peer', 'name', 'eth0', 'netns', str(self._process.pid)]
        _run('ip', 'link', 'add', self._cable, 'type', 'veth', *peer)
        _run('ip', 'link', 'set', self._cable, 'master', self._bridge, 'up')
        self._process.stdin.close()

    def lose_power(self) -> None:
        """End all processes of the node at once."""
        self._process.kill()
        self._process.wait()


#: Options of unshare for a node. Its first process takes the others with it.
_APART = ['--net', '--uts', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc']


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 1, timeout: int = 300) -> Iterator[list[Node]]:
    """Start the daemons, and stop them at the end.

    Args:
        folder: Where they keep their files; its name must be short, for a socket is in it.
        nodes: Number of nodes. More than one need :func:`one_node_only` to be None.
        timeout: Seconds after which a node that does not answer is down.

    Yields:
        The nodes, if there are several.
    """
    with contextlib.ExitStack() as stack:
        host = socket.gethostname().partition('.')[0]
        address, machines = '127.0.0.1', list[Node]()
        if nodes > 1:
            address, machines = stack.enter_context(_network(folder, nodes))
        addresses = {node.name: node.address for node in machines} or {host: address}
        _configure(folder, host, address, addresses, timeout)
        stack.enter_context(_environment('SLURM_CONF', str(folder / 'slurm.conf')))
        files = [f'--{name}-file={folder}/munge.{name}' for name in ('key', 'pid', 'log', 'seed')]
        munge = ['--foreground', '--force', f'--socket={folder}/munge.socket', *files]
        stack.enter_context(_daemon(folder, 'munged', munge))
        while not (folder / 'munge.socket').exists():
            time.sleep(0.1)
        stack.enter_context(_daemon(folder, 'slurmctld', ['-D', '-i']))
        for node in machines:
            stack.callback(node.lose_power)
            node.start()
        if not machines:
            stack.enter_context(_daemon(folder, 'slurmd', ['-D']))
        wait_for_nodes(nodes)
        yield machines


def wait_for_nodes(nodes: int) -> None:
    """Wait until a number of nodes are idle.

    Raises:
        TimeoutError: If it takes longer than 120 s. Says what the daemons have printed.
    """
    end = time.monotonic() + 120
    query = ['sinfo', '--noheader', '--Node', '--format=%T', '--states=idle']
    while _run(*query, check=False).stdout.split() != ['idle'] * nodes:
        if time.monotonic() > end:
            folder = Path(os.environ['SLURM_CONF']).parent
            raise TimeoutError('\n'.join(path.read_text() for path in folder.glob('*.out')))
        time.sleep(0.2)


@contextlib.contextmanager
def _network(folder: Path, nodes: int) -> Iterator[tuple[str, list[Node]]]:
    """Make a bridge; yield the address of this machine on it, and nodes that are still off."""
    bridge = _bridge()
    # From the range for tests of networks (RFC 2544).
    net = f'198.{18 + secrets.randbelow(2)}.{secrets.randbelow(256)}'
    machines = [Node(i, bridge, f'{net}.{i}', folder) for i in range(1, nodes + 1)]
    lines = ['127.0.0.1 localhost', *(f'{node.address} {node.name}' for node in machines)]
    (folder / 'hosts').write_text('\n'.join(lines) + '\n')
    _run('ip', 'link', 'add', bridge, 'type', 'bridge')
    try:
        _run('ip', 'address', 'add', f'{net}.254/24', 'dev', bridge)
        _run('ip', 'link', 'set', bridge, 'up')
        yield f'{net}.254', machines
    finally:
        _run('ip', 'link', 'delete', bridge)


def _configure(folder: Path, host: str, address: str, nodes: dict[str, str], timeout: int) -> None:
    """Write the key of munge and the configuration, with the address of each node by its name."""
    (folder / 'state').mkdir()
    key = folder / 'munge.key'
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    lines = [f'NodeName={name} NodeAddr={at} CPUs=4 RealMemory=1024' for name, at in nodes.items()]
    for name in nodes:
        (folder / f'spool-{name}').mkdir()
    text = _CONFIGURATION.format(
        host=host,
        address=address,
        user=getpass.getuser(),
        folder=folder,
        ports=[find_free_network_port(), find_free_network_port()],
        timeout=timeout,
        first=1 + secrets.randbelow(9000),
        nodes='\n'.join(lines),
    )
    (folder / 'slurm.conf').write_text(text)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _daemon(folder: Path, name: str, options: Sequence[str]) -> Iterator[None]:
    """Run a daemon, with its output in a file."""
    path = shutil.which(name, path=_PATH)
    assert path is not None
    with (folder / f'{name}.out').open('w') as out:
        daemon = subprocess.Popen([path, *options], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait()


def _bridge() -> str:
    """Return the name of the bridge of this process; at most 15 characters, also with a suffix."""
    return f'geofm{os.getpid()}'


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output."""
    environment = os.environ | {'PATH': _PATH}
    return subprocess.run(command, check=check, capture_output=True, text=True, env=environment)
