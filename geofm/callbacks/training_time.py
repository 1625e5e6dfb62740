"""Training time of a run without validation and other overhead."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class TrainingTime(Callback):
    """Callback that logs the minutes of training so far as ``time/training_minutes``.

    It is logged after each epoch. Validation does not count, nor does the work of later callbacks
    in the list at the end of an epoch, so that runs with different diagnostics can be compared. A
    resumed run continues from the stored time.
    """

    def __init__(self) -> None:
        """Initialize a new TrainingTime instance."""
        self.seconds = 0.0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if not trainer.sanity_checking:
            self.seconds += time.monotonic() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock."""
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and log the time."""
        self.seconds += time.monotonic() - self._since
        pl_module.log('time/training_minutes', self.seconds / 60)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of training so far."""
        return {'seconds': self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the stored time."""
        self.seconds = state_dict['seconds']
