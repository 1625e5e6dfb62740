"""Masked word prediction: input, targets, losses and checkpoints."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torchgeo.tasks.utils import extract_backbone

from geofm.losses.word_targets import WordTargets
from geofm.models import load_backbone
from geofm.sensors import sensor_channels
from geofm.tasks import DINOv2, MaskedWords
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, Record, batch, small_trainer

ARGS = {k: v for k, v in SMALL.items() if not k.startswith(('proto', 'head', 'warmup', 'drop'))}
WORDS = {
    'words': 16,
    'target_dim': 4,
    'fit_images': 8,
    'global_scale': (0.5, 1.0),
    'predicted': 0.5,
}


def task(**kwargs: Any) -> MaskedWords:
    torch.manual_seed(0)
    return MaskedWords(**{**ARGS, **WORDS, **kwargs})


def learn_words(method: MaskedWords, images: dict[str, Tensor]) -> None:
    for sensor, channels in sensor_channels(method.model.bands).items():
        target = cast(WordTargets, method.targets[sensor])
        target.fit([{'image': images['image'][:, channels]}], 8)


@pytest.mark.parametrize('fusion', ['linear', 'xattn', 'early', 'joint'])
def test_a_run_and_what_starts_from_it(tmp_path: Path, fusion: str) -> None:
    seed_everything(0)
    record = Record()
    name = f'geofm_vit_tiny_patch16_{fusion}'
    method = task(model=name, sensor_dropout=0.5, warmup_epochs=0.5)
    trainer = small_trainer(tmp_path, max_epochs=2, callbacks=[record])
    trainer.fit(method, datamodule=RandomPairsDataModule())
    assert torch.isfinite(torch.tensor(record.losses)).all()
    assert all(bool(target.fitted) for target in method.targets.values())

    path = tmp_path / 'last.ckpt'
    trainer.save_checkpoint(path)
    found, weights = extract_backbone(str(path))
    assert (found, set(weights)) == (name, {*method.model.state_dict(), 'architecture'})
    backbone = load_backbone(path)
    after = DINOv2(**{**SMALL, 'model': name}, weights=str(path))
    for key, value in method.model.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key
        assert torch.equal(after.model.state_dict()[key], value), key


def test_a_resumed_run_has_the_words_of_the_first(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f'{trainer.current_epoch}.ckpt')

    whole, rest = Record(), Record()
    for record, path in ((whole, None), (rest, tmp_path / '0.ckpt')):
        seed_everything(0)
        trainer = small_trainer(
            tmp_path, max_epochs=2, callbacks=[record, Save()], limit_val_batches=0
        )
        trainer.fit(task(), datamodule=RandomPairsDataModule(), ckpt_path=path, weights_only=True)
    assert rest.losses == whole.losses[-len(rest.losses) :]


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('from_mean', [False, True])
def test_the_losses_are_cosines_of_the_words_of_the_crop(shared: bool, from_mean: bool) -> None:
    """Losses are 0 if predictions equal the targets, and 2 if they are the opposite."""
    method = task(
        photometry=False,
        global_scale=(1.0, 1.0),
        shared_targets=shared,
        predict_from_mean=from_mean,
    )
    images = batch(8)
    channels = sensor_channels(method.model.bands)
    learn_words(method, images)
    seen: dict[str, Any] = {}
    method.multi_crop.register_forward_hook(lambda module, args, crops: seen.update(crops=crops))

    def truth(patches: bool, wanted: Tensor | None = None) -> Tensor:
        crops = seen['crops']
        found = [
            cast(WordTargets, target)(crops.anchors[:, channels[sensor]], None, 8)
            for sensor, target in method.targets.items()
        ]
        if wanted is not None:
            rows = torch.arange(len(wanted))[:, None]
            return torch.stack([f.patches[rows, wanted] for f in found], dim=2).flatten(2)
        return torch.stack([f.image for f in found], dim=1).flatten(1)

    for sign, loss in ((1.0, 0.0), (-1.0, 2.0)):

        def decode(module: Any, args: Any, out: Tensor, sign: float = sign) -> Tensor:
            return sign * truth(True, args[3])

        def pool(module: Any, args: Any, out: Tensor, sign: float = sign) -> Tensor:
            images = truth(False)
            both = images.view(2, 8, -1).mean(dim=0).repeat(2, 1)
            of_crops = both if shared else images
            # CLS of the global crops, CLS of the two local crops, then the mean of patches.
            rows = [of_crops, both] + ([of_crops] if from_mean else [])
            assert len(args[0]) == sum(len(part) for part in rows)
            return sign * torch.cat(rows)

        hooks = [
            method.heads['decoder'].register_forward_hook(decode),
            method.heads['of_image'].register_forward_hook(pool),
        ]
        losses, _ = MaskedWords.compute_losses(method, images, None)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(losses['patch'], torch.tensor(loss), atol=1e-5, rtol=0)
        torch.testing.assert_close(losses['cls'], torch.tensor(loss), atol=1e-5, rtol=0)


def test_what_is_not_visible_is_not_seen() -> None:
    """No gradient reaches the pixels of patches that are predicted."""
    method = task(photometry=False, n_local=0, global_scale=(1.0, 1.0))
    assert (method._visible, method._predicted) == (4, 8)
    images = batch(4)
    learn_words(method, images)
    asked: dict[str, Tensor] = {}

    def look(module: Any, args: Any) -> None:
        asked.update(visible=args[2], wanted=args[3])

    method.heads['decoder'].register_forward_pre_hook(look)
    seen: list[Tensor] = []
    method.multi_crop.register_forward_hook(
        lambda module, args, crops: seen.append(crops.globals.requires_grad_())
    )
    losses, _ = method.compute_losses(images, None)
    method.total(losses).backward()
    gradient = seen[0].grad
    assert gradient is not None
    by_patch = gradient.abs().sum(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).sum(dim=(3, 4)).flatten(1)
    touched = by_patch > 0
    for row, visible, wanted in zip(touched, asked['visible'], asked['wanted'], strict=True):
        assert set(row.nonzero().flatten().tolist()) == set(visible.tolist())
        assert not set(visible.tolist()) & set(wanted.tolist())


def test_a_sensor_that_the_data_lack_is_not_asked_for() -> None:
    """The pixels of a missing sensor do not change the losses."""
    method = task(photometry=False).eval()
    images = batch(4)
    channels = sensor_channels(method.model.bands)
    learn_words(method, images)
    images['present'] = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    found = []
    for fill in (0.0, 7.0):
        changed = {**images, 'image': images['image'].clone()}
        for column, bands in enumerate(channels.values()):
            missing = ~images['present'][:, column]
            for band in bands:
                changed['image'][missing, band] = fill
        torch.manual_seed(3)
        found.append(method.compute_losses(changed, None)[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'visible': 0.0}, 'visible=0 and predicted=0.5'),
        ({'visible': 0.75}, 'sum to at most 1'),
        ({'global_size': 8}, r'crops of 1 patch\(es\) leave none to predict'),
    ],
)
def test_fractions_without_sense(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**kwargs)
