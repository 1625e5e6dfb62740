"""A whole run against DINOv2's updates in NumPy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from numpy.typing import NDArray
from torch import Tensor

from geofm.tasks import DINOv2
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import small_task, small_trainer
from tests.tasks.test_parameters import dinov2_rules

Array = NDArray[np.float64]
#: Batches an epoch, and epochs.
EPOCH, EPOCHS = 4, 5
STEPS = EPOCH * EPOCHS
CLIP = 4.0
RECIPE: dict[str, Any] = {
    'lr': 0.05,
    'min_lr': 1e-4,
    'warmup_epochs': 2,
    'freeze_last_layer_epochs': 1,
    'weight_decay': (0.04, 0.4),
    'momentum': (0.8, 1.0),
    'teacher_temperature': (0.04, 0.07),
    'warmup_teacher_temperature_epochs': 3,
    'layer_decay': 0.8,
    'patch_embed_lr_mult': 0.2,
    'betas': (0.85, 0.97),
    'clip_grad': CLIP,
    'separate_ibot_head': True,
}
FUSION_NORM = 'backbone.fusion.mlp.1'


def schedule(first: float, last: float, step: int, warmup: int = 0, start: float = 0.0) -> float:
    """DINOv2's schedule: linear warm-up with both ends, then half a cosine."""
    if step < warmup:
        return start + (first - start) * step / (warmup - 1)
    angle = np.pi * (step - warmup) / (STEPS - warmup)
    return float(last + (first - last) * (1 + np.cos(angle)) / 2)


def values(step: int, batch: int = 4) -> dict[str, float]:
    """Compute the values of all schedules."""
    lr = schedule(0.05 * np.sqrt(batch / 1024), 1e-4, step, 2 * EPOCH)
    return {
        'lr': lr,
        'last_layer_lr': 0.0 if step < EPOCH else lr,
        'weight_decay': schedule(0.04, 0.4, step),
        'momentum': schedule(0.8, 1.0, step),
        'teacher_temperature': 0.04 + 0.03 * min(step / (3 * EPOCH - 1), 1),
    }


def rules(name: str) -> tuple[float, float, bool]:
    """DINOv2's treatment; fusion lies above the last block, dates beside the positions."""
    if '.fusion.' in name:
        still = name.endswith('.bias') or name.startswith(FUSION_NORM)
        return 1.0, 0.0 if still else 1.0, False
    if 'day_of_year' in name:
        return 0.8**3, 1.0, False
    return dinov2_rules(name, 2, 0.8, 0.2)


def copies(parameters: Any) -> dict[str, Array]:
    return {name: value.detach().double().numpy().copy() for name, value in parameters}


class Run(Callback):
    """Weights, gradients and settings of each step."""

    def __init__(self) -> None:
        self.students: list[dict[str, Array]] = []
        self.teachers: list[dict[str, Array]] = []
        self.gradients: list[dict[str, Array]] = []
        self.clipped: list[dict[str, Array]] = []
        self.settings: list[dict[str, tuple[float, float]]] = []
        self.logged: list[dict[str, float]] = []
        self.temperatures: list[tuple[float, float]] = []
        self._used: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.task: DINOv2 = pl_module
        self.take()
        trainer.optimizers[0].register_step_post_hook(lambda *args: self.stepped(args[0]))
        for centering in (self.task.dino_center, self.task.ibot_center):
            centering.register_forward_pre_hook(lambda module, args: self._used.append(args[1]))

    def take(self) -> None:
        self.students.append(copies(self.task.student.named_parameters()))
        teacher = [(f'backbone.{k}', v) for k, v in self.task.model.named_parameters()]
        self.teachers.append(copies([*teacher, *self.task.teacher_heads.named_parameters()]))

    def learning(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.task.student.named_parameters() if v.requires_grad}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.gradients.append(copies((k, v.grad) for k, v in self.learning().items()))

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        self.clipped.append(copies((k, v.grad) for k, v in self.learning().items()))
        self.settings.append(
            {
                name: (group['lr'], group['weight_decay'])
                for group in optimizer.param_groups
                for name in group['names']
            }
        )

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.take()
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.temperatures.append((self._used[-2], self._used[-1]))


@pytest.fixture(scope='module')
def run(module_path: Path) -> Run:
    torch.manual_seed(0)
    watched = Run()
    trainer = small_trainer(
        module_path,
        max_epochs=EPOCHS,
        callbacks=[watched],
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    trainer.fit(small_task(**RECIPE), datamodule=RandomPairsDataModule())
    assert len(watched.settings) == STEPS
    return watched


def test_settings_of_every_step_are_the_schedules(run: Run) -> None:
    for step, (settings, logged) in enumerate(zip(run.settings, run.logged, strict=True)):
        expected = values(step)
        for name, (lr, weight_decay) in settings.items():
            lr_mult, wd_mult, last = rules(name)
            of_group = expected['last_layer_lr' if last else 'lr']
            assert lr == pytest.approx(of_group * lr_mult, rel=1e-6, abs=1e-12), (step, name)
            assert weight_decay == pytest.approx(expected['weight_decay'] * wd_mult), (step, name)
        for name, value in expected.items():
            assert logged[f'schedule/{name}'] == pytest.approx(value, rel=1e-5, abs=1e-9)
        for used in run.temperatures[step]:
            assert used == pytest.approx(expected['teacher_temperature'])


def by_network(gradients: dict[str, Array]) -> dict[str, list[str]]:
    networks: dict[str, list[str]] = {}
    for name in gradients:
        networks.setdefault(name.split('.')[0], []).append(name)
    assert networks.keys() == {'backbone', 'dino_head', 'ibot_head'}
    return networks


def test_gradients_are_clipped_by_the_norm_of_each_network(run: Run) -> None:
    was_clipped = set()
    for before, after in zip(run.gradients, run.clipped, strict=True):
        for network, names in by_network(before).items():
            norm = np.sqrt(sum((before[name] ** 2).sum() for name in names))
            factor = min(1.0, CLIP / (norm + 1e-6))
            was_clipped.add((network, bool(factor < 1)))
            for name in names:
                np.testing.assert_allclose(after[name], before[name] * factor, rtol=1e-4, atol=1e-9)
    # The run tells one norm for all from one a network.
    assert {clipped for _, clipped in was_clipped} == {True, False}


def test_student_moves_as_adamw_says(run: Run) -> None:
    """Loshchilov and Hutter, 2019, Algorithm 2, with bias correction, from the clipped gradient."""
    first, second = RECIPE['betas']
    mean = {name: np.zeros_like(value) for name, value in run.clipped[0].items()}
    square = {name: np.zeros_like(value) for name, value in run.clipped[0].items()}
    for step, gradient in enumerate(run.clipped):
        expected, t = values(step), step + 1
        for name, g in gradient.items():
            mean[name] = first * mean[name] + (1 - first) * g
            square[name] = second * square[name] + (1 - second) * g**2
            lr_mult, wd_mult, last = rules(name)
            lr = expected['last_layer_lr' if last else 'lr'] * lr_mult
            weight = run.students[step][name] * (1 - lr * expected['weight_decay'] * wd_mult)
            root = np.sqrt(square[name] / (1 - second**t)) + 1e-8
            weight = weight - lr * mean[name] / (1 - first**t) / root
            np.testing.assert_allclose(run.students[step + 1][name], weight, rtol=1e-5, atol=2e-6)


def test_teacher_follows_by_the_momentum_of_the_step(run: Run) -> None:
    """Backbone and heads of the teacher move towards the student after the step."""
    assert run.teachers[0].keys() == run.students[0].keys()
    for name, value in run.teachers[0].items():
        np.testing.assert_array_equal(value, run.students[0][name])
    for step in range(STEPS):
        momentum = values(step)['momentum']
        for name, value in run.teachers[step].items():
            expected = momentum * value + (1 - momentum) * run.students[step + 1][name]
            np.testing.assert_allclose(run.teachers[step + 1][name], expected, atol=1e-6)
    buffers = [
        [(name, value) for name, value in network.named_buffers()]
        for network in (run.task.model, run.task.student['backbone'])
    ]
    for (name, ours), (theirs_name, theirs) in zip(*buffers, strict=True):
        assert name == theirs_name
        assert torch.equal(ours, theirs)


def _fit(tmp_path: Path, length: int, accumulate: int, watch: Callable[[Any], None]) -> None:
    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            watch(pl_module)

    trainer = small_trainer(
        tmp_path,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=[Watch()],
        limit_val_batches=0,
    )
    data = RandomPairsDataModule(length=length)
    trainer.fit(small_task(freeze_last_layer_epochs=1, warmup_epochs=0, lr=0.05), datamodule=data)


@pytest.mark.parametrize(
    ('length', 'accumulate', 'steps'),
    # A last window of fewer batches is a step of the epoch, too.
    [(16, 1, 4), (16, 2, 2), (20, 2, 3)],
)
def test_epochs_and_batch_of_a_run_that_accumulates(
    tmp_path: Path, length: int, accumulate: int, steps: int
) -> None:
    """The learning rate is scaled by all images of a step; an epoch is its optimiser steps."""
    tables: list[Any] = []
    _fit(tmp_path, length, accumulate, lambda task: tables.append(task.schedules))
    (table,) = tables
    assert len(table) == 2 * steps
    assert table.lr[0] == pytest.approx(0.05 * np.sqrt(4 * accumulate / 1024))
    assert np.flatnonzero(table.last_layer_lr == 0).tolist() == list(range(steps))
