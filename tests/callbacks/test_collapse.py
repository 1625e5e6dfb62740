import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from torch import Tensor

from geofm.callbacks import CollapseWatch
from geofm.callbacks.collapse import effective_rank, feature_std
from geofm.losses import SinkhornKnopp
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import small_task, small_trainer


@given(st.integers(1, 8))
def test_effective_rank_of_equal_directions_is_their_number(rank: int) -> None:
    corners = torch.cat([torch.eye(8)[:rank], -torch.eye(8)[:rank]])
    assert effective_rank(corners).item() == pytest.approx(rank, rel=1e-4)


def test_effective_rank_is_that_of_the_formula() -> None:
    features = torch.randn(20, 6) * torch.tensor([10.0, 5, 2, 1, 0.5, 0.1])
    centred = features.numpy() - features.numpy().mean(axis=0)
    p = np.sqrt(np.linalg.eigvalsh(centred.T @ centred))
    p /= p.sum()
    assert effective_rank(features).item() == pytest.approx(
        np.exp(-(p * np.log(p)).sum()), rel=1e-3
    )


def test_features_all_alike_have_no_spread_and_no_rank() -> None:
    features = torch.ones(10, 4) * 3
    assert feature_std(features).item() == pytest.approx(0, abs=1e-6)
    assert effective_rank(features) == 0
    assert feature_std(torch.randn(500, 64)).item() == pytest.approx(1, abs=0.02)


class NoCentering(SinkhornKnopp):
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        return (logits / 0.01).softmax(-1)


def run(tmp_path: Path, broken: bool) -> CollapseWatch:
    seed_everything(0)
    watch = CollapseWatch(patience=5, after_step=10)
    task = small_task(lr=2e-2, warmup_epochs=0, freeze_last_layer_epochs=0, momentum=(0.9, 1.0))
    if broken:
        # Sharp targets and nothing to centre them.
        task.dino_center, task.ibot_center = NoCentering(1), NoCentering(1)
    # A broken run is found soon.
    epochs = 6 if broken else 10
    trainer = small_trainer(tmp_path, max_epochs=epochs, callbacks=[watch], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule(batch_size=8, length=32))
    assert {f'collapse/{name}' for name in watch.limits} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics['collapse/target_entropy'] <= 1 + 1e-6
    return watch


def test_it_warns_of_a_run_without_centering(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match='may be collapsing: mean_target_entropy'):
        watch = run(tmp_path, broken=True)
    assert watch.streaks['mean_target_entropy'] >= watch.patience


def test_it_is_silent_about_a_healthy_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*may be collapsing')
        watch = run(tmp_path, broken=False)
    assert max(watch.streaks.values()) < watch.patience
