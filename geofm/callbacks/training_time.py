"""How long a run has trained, whatever else it did."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class TrainingTime(Callback):
    """Log the minutes of training since the start, as ``time/training_minutes`` of each epoch.

    The time of validation does not count, nor that of what other callbacks do after an epoch, if
    they come later in the list: so that runs can be compared that are watched differently.
    A run that is resumed counts on.
    """

    def __init__(self) -> None:
        """Initialize a new TrainingTime instance."""
        self.seconds = 0.0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it."""
        if not trainer.sanity_checking:
            self.seconds += time.monotonic() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again."""
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it, and log."""
        self.seconds += time.monotonic() - self._since
        pl_module.log('time/training_minutes', self.seconds / 60)

    def state_dict(self) -> dict[str, Any]:
        """Seconds so far."""
        return {'seconds': self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self.seconds = state_dict['seconds']
