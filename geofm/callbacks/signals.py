"""Ending a run together when any of its ranks is asked to."""

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist
from lightly.utils.dist import world_size
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from geofm.callbacks.identity import RunIdentity, remove_requeues
from geofm.checkpoint_io import local_path
from geofm.losses.ranks import reduced
from geofm.tasks.pretraining import PretrainingTask

#: Signals that end a run; Windows has no SIGUSR1.
_SIGNALS = ('SIGTERM', 'SIGUSR1')


class StoppedBySignal(SIGTERMException):
    """A run has ended because a rank got a signal; its exit code is 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        """Initialize a new StoppedBySignal instance.

        Args:
            signum: Number of the signal.
        """
        super().__init__(128 + signum)
        self.signum = signum


class StopOnSignal(Callback):
    """After SIGTERM or SIGUSR1 to any rank, all save a checkpoint together and end.

    A signal only sets a flag. At the end of the optimiser step the ranks agree on it; with a
    :class:`geofm.tasks.PretrainingTask` that takes no collective of its own. The checkpoint is
    Lightning's ``hpc_ckpt_<n>.ckpt`` in ``default_root_dir``. Queueing the job again is up to its
    script, as that of ``geofm submit`` does: Lightning's ``auto_requeue`` is turned off.

    Lightning's own handlers wait for the other ranks wherever they are, and so can wait forever
    (`Lightning #20806 <https://github.com/Lightning-AI/pytorch-lightning/issues/20806>`_).
    """

    def __init__(self) -> None:
        """Initialize a new StopOnSignal instance."""
        self.received = 0
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from queueing a SLURM job again: it is about to set its handlers."""
        self.received = 0
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers before loaders start their workers.

        SLURM signals every process of a job, and workers inherit the handlers.
        """
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it restores in the end."""
        self._listen()
        self._step = trainer.global_step
        # Each step, Lightning broadcasts whether rank 0 got SIGTERM, and waits for the answer.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = max(self.received, signum)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Hand the flag to the task, which reduces its own with it."""
        if isinstance(pl_module, PretrainingTask):
            pl_module.stop_signal = self.received

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """End the run if any rank got a signal, once an optimiser step is done.

        Raises:
            StoppedBySignal: If so, on all ranks.
        """
        if isinstance(pl_module, PretrainingTask):
            agreed = pl_module.agreed_signal
        else:
            agreed = self._agree(pl_module.device)
        done, self._step = trainer.global_step > self._step, trainer.global_step
        if not agreed or not done:
            return
        self._save(trainer)
        raise StoppedBySignal(agreed)

    def _agree(self, device: torch.device) -> int:
        """The signal of any rank."""
        if world_size() == 1:
            return self.received
        return int(reduced(torch.tensor(self.received, device=device), dist.ReduceOp.MAX))

    def _save(self, trainer: Trainer) -> None:
        """Save a checkpoint, and remove those of earlier requeues of this run."""
        root = trainer.default_root_dir
        # Other ranks might see the file of rank 0 already.
        path = trainer.strategy.broadcast(trainer._checkpoint_connector.hpc_save_path(root))
        trainer.save_checkpoint(path)
        rank_zero_info(f'stopped by a signal at step {trainer.global_step}: saved {path}')
        folder = local_path(root)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunIdentity) and folder and trainer.is_global_zero:
                remove_requeues(folder, callback.run)


def _nothing() -> None:
    """In place of a broadcast."""
