"""Ranks that are left alone end."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

from geofm.commands.launcher import end_with_launcher
from geofm.messages import describe


def rank(end: Connection) -> None:
    os.environ['LOCAL_RANK'] = '1'
    end_with_launcher(grace=0)
    end.send(os.getpid())
    time.sleep(600)


def launcher(end: Connection) -> None:
    multiprocessing.get_context('fork').Process(target=rank, args=(end,)).start()
    end.close()
    time.sleep(600)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_rank_ends_after_its_launcher_was_killed() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context('fork').Process(target=launcher, args=(theirs,))
    process.start()
    theirs.close()
    ours.recv()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert ours.poll(30)
    with pytest.raises(EOFError):
        ours.recv()


@pytest.mark.parametrize(
    ('said', 'message'),
    [
        (
            'gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:6036. This is',
            'another rank has ended. Its own message says why',
        ),
        (
            'gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation',
            'another rank did not answer within 4 s: its node is lost or it hangs',
        ),
        (
            'Timed out after 5 seconds waiting for clients. 1/2 clients joined.',
            'another rank did not answer within 5 s',
        ),
        (
            '[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3',
            'another rank did not answer: its node',
        ),
    ],
)
def test_a_lost_rank_is_told_from_a_fault_of_this_one(said: str, message: str) -> None:
    assert describe(RuntimeError(f'[/build/{said}')).startswith(message)
