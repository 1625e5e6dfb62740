"""DINOv2 with three sensors: random draws of its settings, and a step of each fusion."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from geofm.models.fusion import FUSIONS
from geofm.sensors import BandError
from geofm.tasks import DINOv2
from tests.tasks.test_dinov2 import SMALL, small_task

CHANNELS = {'s1': slice(0, 2), 's2': slice(2, 15), 'dem': slice(15, 16)}


def three(fusion: str = 'joint', **kwargs: Any) -> DINOv2:
    args = {**SMALL['model_args'], 'sensors': ['s1', 's2', 'dem']}
    return small_task(
        model=f'geofm_vit_tiny_patch16_{fusion}',
        in_channels=16,
        photometry=False,
        **{'model_args': args, **kwargs},
    )


def batch(images: int = 4, **more: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    dates = torch.randint(17_000, 18_000, (images, 3))
    return {'image': torch.randn(images, 16, 48, 48), 'dates': dates, **more}


def test_with_two_sensors_draws_are_those_of_always() -> None:
    """Formulas of earlier code for two sensors, from the same random numbers."""
    task = small_task(sensor_dropout=0.4, one_sensor_masks=0.7, mask_probability=1.0)
    crops = task.multi_crop({'image': torch.randn(4, 15, 48, 48)})
    for seed in range(20):
        torch.manual_seed(seed)
        found = task._drop_sensors(500)
        torch.manual_seed(seed)
        hidden, which = torch.rand(500) < 0.4, torch.rand(500) < 0.5
        expected = ~torch.stack([hidden & which, hidden & ~which], dim=1)
        assert found is not None
        assert torch.equal(found, expected)
        torch.manual_seed(seed)
        masked = task._student_masks(crops)
        torch.manual_seed(seed)
        shape = crops.masks.shape
        one, which = torch.rand(shape) < 0.7, torch.rand(shape) < 0.5
        shown = torch.stack([one & which, one & ~which], dim=1)
        assert torch.equal(masked, crops.masks[:, None] & ~shown)


def test_sensor_dropout_leaves_out_every_subset_equally_often() -> None:
    present = three(sensor_dropout=0.6)._drop_sensors(30_000)
    assert present is not None
    share = {
        pattern: (present == torch.tensor(pattern)).all(dim=1).float().mean().item()
        for pattern in itertools.product([True, False], repeat=3)
    }
    assert share.pop((False, False, False)) == 0
    assert share.pop((True, True, True)) == pytest.approx(0.4, abs=0.01)
    assert list(share.values()) == pytest.approx([0.1] * 6, abs=0.01)


def test_masks_of_one_sensor_are_shown_in_all_others() -> None:
    task = three(one_sensor_masks=0.6, mask_probability=1.0)
    found, masks, data = [], [], batch()
    for seed in range(150):
        torch.manual_seed(seed)
        crops = task.multi_crop(data)
        found.append(task._student_masks(crops))
        masks.append(crops.masks)
    hidden, every = torch.cat(found), torch.cat(masks)
    assert torch.equal(hidden.any(dim=1), every)
    count = hidden.sum(dim=1)[every]
    assert set(count.tolist()) == {1, 3}
    assert (count == 1).float().mean().item() == pytest.approx(0.6, abs=0.03)
    only = hidden.transpose(1, 2)[every][count == 1].float().mean(dim=0)
    torch.testing.assert_close(only, torch.full((3,), 1 / 3), atol=0.03, rtol=0)


@pytest.mark.parametrize('fusion', FUSIONS)
def test_global_sensors_may_be_several(fusion: str) -> None:
    task = three(fusion, global_sensors=[['s1', 'dem'], 's2'], drop_path_rate=0.0).train()
    torch.manual_seed(1)
    crops = task.multi_crop(batch())
    student, teacher = task.student_forward(crops), task.teacher_forward(crops)
    crops.globals[:, CHANNELS['s2']] += 5
    torch.testing.assert_close(task.student_forward(crops).features, student.features)
    assert not torch.allclose(task.teacher_forward(crops).features, teacher.features)
    crops.globals[:, CHANNELS['s2']] -= 5
    crops.globals[:, CHANNELS['dem']] += 5
    torch.testing.assert_close(
        task.teacher_forward(crops).features, teacher.features, atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(task.student_forward(crops).features, student.features)


def test_sensors_that_the_data_lack_are_missing_in_every_crop() -> None:
    task = three(drop_path_rate=0.0, one_sensor_masks=0.5, gram_weight=1.0).train()
    present = torch.tensor([[True, True, False], [True] * 3, [False, True, True], [True] * 3])
    data = batch(present=present)

    def outputs(data: dict[str, Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        crops = task.multi_crop(data)
        student, teacher = task.student_forward(crops), task.teacher_forward(crops)
        return [student.cls, student.patches, teacher.cls, task.gram_forward(crops)]

    before = outputs(data)
    wild = data['image'].clone()
    wild[0, CHANNELS['dem']] += 5
    wild[2, CHANNELS['s1']] += 5
    for old, new in zip(before, outputs({**data, 'image': wild}), strict=True):
        torch.testing.assert_close(old, new)
    wild[1, CHANNELS['dem']] += 5
    assert not torch.allclose(outputs({**data, 'image': wild})[0], before[0])
    assert not torch.allclose(outputs({**data, 'present': ~present})[0], before[0])


@pytest.mark.parametrize('fusion', FUSIONS)
def test_a_step_reaches_every_encoder(fusion: str) -> None:
    switches = {} if fusion == 'early' else {'one_sensor_masks': 0.5}
    task = three(fusion, sensor_dropout=0.5, **switches).train()
    torch.manual_seed(2)
    losses, _ = task.losses(batch(images=6), temperature=0.05)
    total = task.total(losses)
    assert total.isfinite()
    total.backward()
    for name, parameter in task.student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if 'patch_embed' in name or 'sensor_embed' in name:
                assert parameter.grad.any(), name


def test_a_number_of_channels_that_does_not_tell_the_bands_is_refused() -> None:
    args = {**SMALL['model_args'], 'sensors': ['s1', 's2', 'dem']}
    with pytest.raises(BandError, match=r"the sensors \['s1', 's2', 'dem'\] have 16"):
        small_task(model_args=args, in_channels=14)


def test_wrong_switches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_sensors: \['s9'\]"):
        three(global_sensors=[['s1', 's9'], 's2'])
    with pytest.raises(ValueError, match='global_sensors must have two entries'):
        three(global_sensors=['s1', 's2', 'dem'])
    with pytest.raises(ValueError, match='masks a patch in all sensors'):
        three('early', one_sensor_masks=0.5)
