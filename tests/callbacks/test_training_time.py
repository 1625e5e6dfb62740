import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

from geofm.callbacks import TrainingTime
from tests.tasks.test_dinov2 import small_trainer


class Slow(Callback):
    """Task that sleeps in validation, after each epoch, and in a step."""

    def on_validation_batch_start(self, *args: Any) -> None:
        time.sleep(0.5)

    def on_train_epoch_end(self, *args: Any) -> None:
        time.sleep(0.5)

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.1)


def test_only_training_counts(tmp_path: Path) -> None:
    clock = TrainingTime()
    trainer = small_trainer(
        tmp_path,
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=2,
        callbacks=[clock, Slow()],
    )
    trainer.fit(BoringModel())
    # Six steps of 0.1 s; the rest slept for 4 s, with the sanity check.
    assert 0.6 <= clock.seconds < 2.0
    minutes = trainer.callback_metrics['time/training_minutes'].item()
    assert minutes == pytest.approx(clock.seconds / 60)
    again = TrainingTime()
    again.load_state_dict(clock.state_dict())
    assert again.seconds == clock.seconds
