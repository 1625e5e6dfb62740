import math

import numpy as np
import pytest

from geofm.tasks.schedules import cosine_schedule, dinov2_schedules

STEPS, PER_EPOCH = 200, 10


@pytest.fixture
def table():  # type: ignore[no-untyped-def]
    return dinov2_schedules(
        STEPS,
        PER_EPOCH,
        lr=1e-3,
        min_lr=1e-6,
        warmup_epochs=2,
        freeze_last_layer_epochs=1,
        weight_decay=(0.04, 0.4),
        momentum=(0.992, 1.0),
        teacher_temperature=(0.04, 0.07),
        warmup_teacher_temperature_epochs=6,
    )


def test_every_value_of_a_run(table) -> None:  # type: ignore[no-untyped-def]
    for step in range(STEPS):
        values = table.at(step)
        if step < 20:
            lr = 1e-3 * step / 19
        else:
            lr = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 20) / 180)) / 2
        half_cosine = (1 + math.cos(math.pi * step / STEPS)) / 2
        temperature = 0.04 + 0.03 * step / 59 if step < 60 else 0.07
        assert values == {
            'lr': pytest.approx(lr),
            'last_layer_lr': pytest.approx(lr if step >= 10 else 0),
            'weight_decay': pytest.approx(0.4 + (0.04 - 0.4) * half_cosine),
            'momentum': pytest.approx(1 + (0.992 - 1) * half_cosine),
            'teacher_temperature': pytest.approx(temperature),
        }


def test_beyond_the_end_the_final_values_stay(table) -> None:  # type: ignore[no-untyped-def]
    assert len(table) == STEPS
    final = {
        'lr': 1e-6,
        'last_layer_lr': 1e-6,
        'weight_decay': 0.4,
        'momentum': 1.0,
        'teacher_temperature': 0.07,
    }
    assert table.at(STEPS) == table.at(STEPS + 5) == final


def test_default_run_of_dinov2_value_for_value() -> None:
    """100 epochs of 1,250 steps, of 1,024 images each, against the formulas in closed form."""
    steps, epoch = 125_000, 1250
    table = dinov2_schedules(
        steps,
        epoch,
        lr=4e-3,
        min_lr=1e-6,
        warmup_epochs=10,
        freeze_last_layer_epochs=1,
        weight_decay=(0.04, 0.4),
        momentum=(0.992, 1.0),
        teacher_temperature=(0.04, 0.07),
        warmup_teacher_temperature_epochs=30,
    )
    t = np.arange(steps)
    # cos(x) = 1 - 2 sin(x / 2)^2: the cosine falls from 1 at its first step, and would be 0 at
    # the step after its last. The warm-up has both ends: 0 first, and the peak twice.
    fallen = np.sin(np.pi / 2 * np.clip((t - 12_500) / 112_500, 0, 1)) ** 2
    lr = np.where(t < 12_500, 4e-3 * t / 12_499, 4e-3 - (4e-3 - 1e-6) * fallen)
    np.testing.assert_allclose(table.lr, lr, rtol=1e-9, atol=1e-15)
    assert table.lr[0] == 0
    assert table.lr[12_499] == table.lr[12_500] == 4e-3
    assert table.lr[-1] > 1e-6
    np.testing.assert_array_equal(table.last_layer_lr[:1250], 0)
    np.testing.assert_array_equal(table.last_layer_lr[1250:], table.lr[1250:])
    risen = np.sin(np.pi / 2 * t / steps) ** 2
    np.testing.assert_allclose(table.weight_decay, 0.04 + 0.36 * risen, rtol=1e-12)
    np.testing.assert_allclose(table.momentum, 0.992 + 0.008 * risen, rtol=1e-12)
    assert table.momentum[-1] < 1
    temperature = np.minimum(0.04 + 0.03 * t / 37_499, 0.07)
    np.testing.assert_allclose(table.teacher_temperature, temperature, rtol=1e-12)
    assert table.teacher_temperature[37_498] < 0.07 == table.teacher_temperature[37_499]


def test_warm_up_longer_than_the_run_is_cut_and_said() -> None:
    with pytest.warns(UserWarning, match='warmup_epochs=10 are 100 steps, but the run has only 30'):
        table = dinov2_schedules(
            30,
            10,
            lr=1.0,
            min_lr=0.0,
            warmup_epochs=10,
            freeze_last_layer_epochs=0,
            weight_decay=(0.1, 0.1),
            momentum=(0.9, 1.0),
            teacher_temperature=(0.04, 0.04),
            warmup_teacher_temperature_epochs=0,
        )
    assert len(table) == 30
    assert table.lr[-1] == 1


def test_cosine_without_warm_up_starts_at_its_base() -> None:
    schedule = cosine_schedule(2.0, 1.0, 4)
    np.testing.assert_allclose(
        schedule, [2, 1.5 + math.sqrt(0.5) / 2, 1.5, 1.5 - math.sqrt(0.5) / 2]
    )
