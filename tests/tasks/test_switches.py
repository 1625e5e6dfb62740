"""Settings in addition to DINOv2, each against its description."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from lightning.pytorch import Callback
from torch import Tensor

from geofm.losses import GramLoss, resize_tokens
from geofm.models import CheckpointError
from geofm.models.packed import _compiled
from geofm.tasks import DINOv2
from geofm.transforms import Crops
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import batch, small_task, small_trainer


def crops_of(task: DINOv2) -> Crops:
    torch.manual_seed(1)
    crops: Crops = task.multi_crop(batch())
    return crops


def test_sensor_dropout_hides_one_sensor_at_a_time() -> None:
    task = small_task(sensor_dropout=0.5)
    present = task._drop_sensors(4000)
    assert present is not None
    assert present.any(dim=1).all()
    share = (~present).float().mean(dim=0)
    torch.testing.assert_close(share, torch.tensor([0.25, 0.25]), atol=0.03, rtol=0)
    assert small_task()._drop_sensors(4) is None


def test_a_sensor_that_is_hidden_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """If S1 is always dropped, its values have no effect on the student."""
    task = small_task(sensor_dropout=1.0, drop_path_rate=0.0).train()
    crops = crops_of(task)
    hide_s1 = torch.tensor([[False, True]])
    monkeypatch.setattr(task, '_drop_sensors', lambda crops: hide_s1.expand(crops, -1))
    before = task.student_forward(crops)
    crops.globals[:, :2] += 5
    crops.locals[:, :2] += 5
    after = task.student_forward(crops)
    torch.testing.assert_close(after.cls, before.cls)
    torch.testing.assert_close(after.patches, before.patches)
    crops.globals[:, 2:] += 5
    assert not torch.allclose(task.student_forward(crops).cls, before.cls)


def test_masks_of_one_sensor_are_shown_in_the_other() -> None:
    task = small_task(one_sensor_masks=0.6, mask_probability=1.0, global_size=32)
    hidden, masks = [], []
    for seed in range(300):
        torch.manual_seed(seed)
        crops = task.multi_crop(batch())
        hidden.append(task._student_masks(crops))
        masks.append(crops.masks)
    of_sensor, every = torch.cat(hidden), torch.cat(masks)
    # Hidden somewhere where DINOv2's mask is, and nowhere else.
    assert torch.equal(of_sensor.any(dim=1), every)
    both = of_sensor.all(dim=1)[every].float().mean()
    only = [of_sensor[:, i][every].float().mean() - both for i in range(2)]
    torch.testing.assert_close(
        torch.stack([both, *only]), torch.tensor([0.4, 0.3, 0.3]), atol=0.03, rtol=0
    )
    assert small_task()._student_masks(crops) is crops.masks


def test_global_crops_of_one_sensor_each() -> None:
    task = small_task(global_sensors=['s1', 's2'], drop_path_rate=0.0).train()
    crops = crops_of(task)
    teacher, student = task.teacher_forward(crops), task.student_forward(crops)
    assert student.cls.shape[0] == 2 * 4 + 2 * 4
    crops.globals[:, 2:] += 5
    torch.testing.assert_close(task.student_forward(crops).features, student.features)
    assert not torch.allclose(task.teacher_forward(crops).features, teacher.features)
    crops = crops_of(task)
    crops.globals[:, :2] += 5
    torch.testing.assert_close(task.teacher_forward(crops).features, teacher.features)
    assert not torch.allclose(task.student_forward(crops).features, student.features)


@pytest.mark.parametrize(
    'kwargs',
    [{'sensor_dropout': 0.5}, {'one_sensor_masks': 0.5}, {'global_sensors': ['s2', 's2']}],
)
def test_what_needs_two_sensors_says_so(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='two sensors'):
        small_task(**kwargs, model='geofm_vit_tiny_patch16_s2', in_channels=13)
    with pytest.raises(ValueError, match='s3'):
        small_task(global_sensors=['s1', 's3'])


def test_early_fusion_hides_a_patch_in_both_sensors() -> None:
    with pytest.raises(ValueError, match='one_sensor_masks needs one ViT per sensor'):
        small_task(one_sensor_masks=0.5, model='geofm_vit_tiny_patch16_early')


def test_gram_loss_is_that_of_the_formula() -> None:
    student, anchor = torch.randn(2, 5, 8), torch.randn(2, 5, 3)
    total = 0.0
    for b in range(2):
        for i in range(5):
            for j in range(5):
                similar = [
                    torch.dot(x[b, i], x[b, j]) / (x[b, i].norm() * x[b, j].norm())
                    for x in (student, anchor)
                ]
                total += float((similar[0] - similar[1]) ** 2)
    assert GramLoss()(student, anchor).item() == pytest.approx(total / 50, rel=1e-5)
    # Turning all features alike changes nothing.
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    assert GramLoss()(student, 3 * student @ turn).item() == pytest.approx(0, abs=1e-10)


def test_tokens_are_resized_on_their_grid() -> None:
    row = torch.arange(4.0).repeat_interleave(4)
    tokens = torch.stack([row, row.view(4, 4).T.flatten()], dim=-1)[None]
    resized = resize_tokens(tokens, (4, 4), (2, 2))
    assert resized.shape == (1, 4, 2)
    # Row, then column, of each of the four: by symmetry 1.5 is in the middle.
    first, second = resized[0, 0], resized[0, 3]
    torch.testing.assert_close(first + second, torch.tensor([3.0, 3.0]))
    assert first[0] < 1 < 2 < second[0]
    assert torch.equal(resize_tokens(tokens, (4, 4), (4, 4)), tokens)


def test_gram_anchoring_sees_larger_crops_of_the_same_ground(tmp_path: Path) -> None:
    task = small_task(gram_weight=2.0, gram_size=64, gram_refresh_steps=3, drop_path_rate=0.0)
    crops = crops_of(task)
    assert crops.anchors is not None
    assert crops.anchors.shape == (8, 15, 64, 64)
    student = task.student_forward(crops)
    assert student.tokens is not None
    assert student.tokens.shape == task.gram_forward(crops).shape == (8, 16, 32)
    hidden = student.tokens.flatten(0, 1)[crops.masked]
    torch.testing.assert_close(task.student['dino_head'](hidden), student.patches)

    refreshed: list[bool] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            assert task.gram_backbone is not None
            same = zip(task.gram_backbone.parameters(), task.model.parameters(), strict=True)
            refreshed.append(all(torch.equal(a, b) for a, b in same))

    trainer = small_trainer(tmp_path, max_epochs=2, callbacks=[Watch()], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert refreshed[2]
    assert refreshed[5]
    assert not refreshed[3]
    assert trainer.callback_metrics['train_gram'] > 0


def test_a_second_phase_goes_on_with_student_teacher_and_heads(tmp_path: Path) -> None:
    first = small_task()
    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(first, datamodule=RandomPairsDataModule())
    checkpoint = tmp_path / 'first.ckpt'
    trainer.save_checkpoint(checkpoint)

    second = small_task(continue_from=str(checkpoint), global_size=48, gram_weight=2.0)
    state = second.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(state[key], value), key
    assert second.gram_backbone is not None
    for gram, teacher in zip(
        second.gram_backbone.parameters(), first.model.parameters(), strict=True
    ):
        assert torch.equal(gram, teacher)
    with pytest.raises(CheckpointError, match='another shape'):
        small_task(continue_from=str(checkpoint), prototypes=32)
    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(second, datamodule=RandomPairsDataModule(size=64))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Trace forward and backward with the eager backend, as a compiler may be missing."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: compile_(f, backend='aot_eager', **kw))
    torch._dynamo.reset()
    _compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters['stats']
    _compiled.cache_clear()


def test_compiled_and_checkpointed_blocks_give_the_same_losses(traced: Counter[str]) -> None:
    def losses(**kwargs: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        task = small_task(**kwargs).train()
        torch.manual_seed(2)
        found, _ = task.losses(batch(), temperature=0.05)
        task.total(found).backward()
        gradients = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
        assert gradients
        return {**found, **gradients}

    plain = losses()
    switches: list[dict[str, Any]] = [
        {'grad_checkpointing': k} for k in (True, 'attention', 'matmul')
    ]
    for switch in (*switches, {'compile_blocks': True}):
        for name, value in losses(**switch).items():
            torch.testing.assert_close(value, plain[name])
    assert traced['unique_graphs']


def test_other_crops_masks_and_missing_sensors_compile_nothing_again(
    traced: Counter[str],
) -> None:
    task = small_task(
        model='geofm_vit_tiny_patch16_joint', compile_blocks=True, sensor_dropout=0.5
    ).train()

    def graphs(images: int) -> int:
        found, _ = task.losses(batch(images), temperature=0.05)
        task.total(found).backward()
        return int(traced['unique_graphs'])

    first = graphs(4)
    # Queries, projection, MLP and head: of the teacher, and of the student.
    assert first <= 12
    assert [graphs(images) for images in (2, 5)] == [first] * 2


def test_losses_are_computed_in_full_precision_under_autocast() -> None:
    task = small_task(centering='sinkhorn_knopp').train()
    with torch.autocast('cpu', torch.bfloat16):
        losses, watched = task.losses(batch(), temperature=0.05)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert watched['target_entropy'].dtype == torch.float32
    task.total(losses).backward()
