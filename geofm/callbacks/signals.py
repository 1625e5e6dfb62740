"""Stop all ranks of a run together when one of them gets a signal."""

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
from geofm.losses import reduced
from geofm.tasks import PretrainingTask

#: Signals that end a run; Windows has no SIGUSR1.
_SIGNALS = ('SIGTERM', 'SIGUSR1')


class StoppedBySignal(SIGTERMException):
    """Raised when a signal has ended a run. The exit code is 128 plus the signal's number."""

    def __init__(self, signum: int) -> None:
        """Initialize a new StoppedBySignal instance.

        Args:
            signum: Number of the signal.
        """
        super().__init__(128 + signum)
        self.signum = signum


class StopOnSignal(Callback):
    """Callback that saves a checkpoint and ends the run after SIGTERM or SIGUSR1 to any rank.

    A signal only sets a flag. The ranks exchange the flag at the end of the optimiser step. A
    :class:`geofm.tasks.PretrainingTask` needs no extra collective for this. The checkpoint is
    Lightning's ``hpc_ckpt_<n>.ckpt`` in ``default_root_dir``. Lightning's ``auto_requeue`` is
    turned off: the job script must requeue the job, as the script of ``geofm submit`` does.

    Lightning's own handlers synchronise the ranks wherever each of them is, and can wait forever
    (`Lightning #20806 <https://github.com/Lightning-AI/pytorch-lightning/issues/20806>`_).
    """

    def __init__(self) -> None:
        """Initialize a new StopOnSignal instance."""
        self.received = 0
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn off Lightning's requeueing before it sets its signal handlers."""
        self.received = 0
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers before loaders start their workers.

        SLURM signals every process of a job, and workers inherit the handlers.
        """
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers again. Lightning restores the original ones at the end."""
        self._listen()
        self._step = trainer.global_step
        # In each step, Lightning broadcasts whether rank 0 got SIGTERM, and waits for the result.
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
        """Give the flag to the task, which reduces it over the ranks with its own values."""
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
        """End the run after an optimiser step if any rank got a signal.

        Raises:
            StoppedBySignal: On all ranks, if any rank got a signal.
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
        """Return the largest signal number that a rank got, 0 if none."""
        if world_size() == 1:
            return self.received
        return int(reduced(torch.tensor(self.received, device=device), dist.ReduceOp.MAX))

    def _save(self, trainer: Trainer) -> None:
        """Save a checkpoint, and remove earlier requeue checkpoints of this run."""
        root = trainer.default_root_dir
        # The name counts the existing files, so only rank 0 may choose it.
        path = trainer.strategy.broadcast(trainer._checkpoint_connector.hpc_save_path(root))
        trainer.save_checkpoint(path)
        rank_zero_info(f'stopped by a signal at step {trainer.global_step}: saved {path}')
        folder = local_path(root)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunIdentity) and folder and trainer.is_global_zero:
                remove_requeues(folder, callback.run)


def _nothing() -> None:
    """Replacement of a broadcast that is not needed."""
