"""A signal to one rank ends all of them, with a checkpoint."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torchgeo.tasks import SimCLR

from geofm.callbacks import RunIdentity, StopOnSignal
from tests.pairs import RandomPairsDataModule
from tests.ranks import as_rank
from tests.tasks.test_dinov2 import small_task, small_trainer


class Send(Callback):
    """Send a signal to one rank, in the middle of its third step."""

    def __init__(self, number: int, rank: int) -> None:
        self.number, self.rank = number, rank

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: object
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def dinov2() -> LightningModule:
    return small_task()


def simclr() -> LightningModule:
    return SimCLR('resnet10t', in_channels=15, version=1, layers=2, memory_bank_size=0, size=32)


def work(
    make: Callable[[], LightningModule], number: int, rank: int, path: Path, port: int
) -> None:
    torch.set_num_threads(1)
    as_rank(rank, 2, port)
    seed_everything(0)
    trainer = small_trainer(
        path,
        max_epochs=9,
        devices=2,
        strategy='ddp',
        limit_val_batches=0,
        enable_checkpointing=False,
        callbacks=[RunIdentity(), StopOnSignal(), Send(number, rank=1)],
    )
    trainer.fit(make(), datamodule=RandomPairsDataModule(2))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize(
    ('make', 'number', 'step'),
    # DINOv2 has agreed before the backward pass: the signal counts in the step after.
    [(dinov2, signal.SIGTERM, 4), (dinov2, signal.SIGUSR1, 4), (simclr, signal.SIGTERM, 3)],
)
def test_a_signal_to_one_rank_ends_all(
    tmp_path: Path, make: Callable[[], LightningModule], number: int, step: int
) -> None:
    (tmp_path / 'hpc_ckpt_1.ckpt').write_bytes(b'of whoever')
    context = multiprocessing.get_context('fork')
    port = find_free_network_port()
    ranks = [
        context.Process(target=work, args=(make, number, rank, tmp_path, port)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [128 + number] * 2
    saved = torch.load(tmp_path / 'hpc_ckpt_2.ckpt', weights_only=True)
    assert saved['global_step'] == step
    assert (tmp_path / 'hpc_ckpt_1.ckpt').exists()
