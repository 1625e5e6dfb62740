"""Ranks end if their launcher or another rank has ended."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from geofm.callbacks import StopOnSignal
from geofm.commands.launcher import end_with_launcher
from geofm.messages import describe
from tests.pairs import RandomPairsDataModule
from tests.ranks import as_rank
from tests.tasks.test_dinov2 import small_task, small_trainer


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


class Lose(Callback):
    """Signal the second rank in its third step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: object
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), self.number)


def train(number: int, rank: int, path: Path, port: int) -> None:
    torch.set_num_threads(1)
    as_rank(rank, 2, port)
    trainer = small_trainer(
        path,
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=4)),
        limit_val_batches=0,
        enable_checkpointing=False,
        callbacks=[StopOnSignal(), Lose(number)],
    )
    try:
        trainer.fit(small_task(), datamodule=RandomPairsDataModule(2))
    except RuntimeError as error:
        (path / str(rank)).write_text(describe(error))
        raise


LOST = {
    signal.SIGKILL: 'another rank has ended: see its own error message, unless it was killed.',
    # Like a lost node: the rank does not respond.
    signal.SIGSTOP: 'another rank did not respond within 4 s: it hangs, or its node is down.',
}


def lose(number: int, folder: Path) -> int | None:
    """Train with two ranks, lose the second, and return the exit code of the first."""
    context = multiprocessing.get_context('fork')
    arguments = (folder, find_free_network_port())
    ranks = [context.Process(target=train, args=(number, i, *arguments)) for i in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(timeout=180)
    ranks[1].kill()
    return ranks[0].exitcode


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_lost_rank_ends_the_other(tmp_path: Path, forkserver: ForkServerContext) -> None:
    # Forked from a new process: after other tests, a forked one may fail in the backward pass.
    with ProcessPoolExecutor(1, mp_context=forkserver) as pool:
        for number, message in LOST.items():
            folder = tmp_path / number.name
            folder.mkdir()
            assert pool.submit(lose, number, folder).result() == 1
            assert (folder / '0').read_text().startswith(message)


@pytest.mark.parametrize(
    ('said', 'message'),
    [
        (
            'Timed out after 5 seconds waiting for clients. 1/2 clients joined.',
            'another rank did not respond within 5 s',
        ),
        (
            '[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3',
            'another rank did not respond: it hangs',
        ),
    ],
)
def test_messages_about_a_lost_rank_are_explained(said: str, message: str) -> None:
    assert describe(RuntimeError(said)).startswith(message)
