import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from segmentation_models_pytorch.encoders import encoders
from torch import Tensor
from torchgeo.datasets import DependencyNotFoundError

from geofm.models import export_torchgeo, load_backbone, register_encoder
from geofm.tasks import Mask2Former
from tests.tasks.test_dinov2 import SMALL, small_task, small_trainer

ENCODER = 'mask2former_small'


@pytest.fixture(autouse=True, scope='module')
def _encoder() -> Iterator[None]:
    pytest.importorskip('transformers', reason='needs the extra geofm[mask2former]')
    register_encoder(ENCODER, SMALL['model'], **SMALL['model_args'])
    yield
    del encoders[ENCODER]


def small_mask2former(**kwargs: Any) -> Mask2Former:
    sizes = ('hidden_dim', 'feature_size', 'mask_feature_size', 'encoder_feedforward_dim')
    model_args = {
        **dict.fromkeys((*sizes, 'dim_feedforward'), 32),
        'num_attention_heads': 4,
        'encoder_layers': 1,
        'decoder_layers': 2,
        'train_num_points': 256,
    }
    small: dict[str, Any] = {'backbone': ENCODER, 'num_classes': 3, 'num_queries': 6}
    return Mask2Former(**{**small, 'model_args': model_args, **kwargs})


def halves(images: int = 2, size: int = 64) -> dict[str, Tensor]:
    """Images whose left part is of class 1, brighter, and the rest of class 0."""
    mask = torch.zeros(images, size, size, dtype=torch.long)
    for i in range(images):
        mask[i, :, : size // 4 * (1 + i % 3)] = 1
    return {'image': 0.1 * torch.randn(images, 15, size, size) + mask[:, None], 'mask': mask}


def test_a_pixel_is_what_its_queries_say() -> None:
    """Semantic inference, written out with loops."""
    task = small_mask2former().eval()
    x = torch.randn(1, 15, 64, 64)
    output = task.model(x)
    classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
    assert classes.shape == (6, 4)
    assert masks.shape == (6, 16, 16)
    scores = torch.zeros(1, 3, 16, 16)
    for query in range(6):
        share = classes[query].exp() / classes[query].exp().sum()
        for one in range(3):
            scores[0, one] += share[one] / (1 + (-masks[query]).exp())
    scores = torch.nn.functional.interpolate(scores, scale_factor=4, mode='bilinear')
    probabilities = task(x).exp()
    torch.testing.assert_close(probabilities, scores / scores.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(1, 64, 64))


def test_it_learns(tmp_path: Path) -> None:
    task = small_mask2former(lr=2e-3)
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer: Any = task.configure_optimizers()
    batch = halves()
    losses = []
    for step in range(28):
        loss = task.training_step(batch, step)
        optimizer['optimizer'].zero_grad()
        loss.backward()
        optimizer['optimizer'].step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    right = task.eval()(batch['image']).argmax(dim=1) == batch['mask']
    assert right.float().mean() > 0.9


def test_ignored_pixels_count_for_nothing() -> None:
    task = small_mask2former(ignore_index=255)
    logged: dict[str, Any] = {}
    task.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    batch = halves()
    batch['mask'][1] = 255
    task.training_step(batch, 0).backward()
    # An image all of whose pixels are ignored, and a batch of such.
    batch['mask'][:] = 255
    assert task.training_step(batch, 1).isfinite()
    assert [c.tolist() for c in (task._classes(m) for m in batch['mask'])] == [[], []]
    assert set(logged) == {'train_loss'}


@pytest.mark.parametrize('label', [-1, 3, 255])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    task = small_mask2former()
    batch = halves()
    batch['mask'][0, 0, 0] = label
    with pytest.raises(ValueError, match=rf'a mask has labels \[{label}\]'):
        task.training_step(batch, 0)


@pytest.mark.parametrize('channels', [15, 13, 2])
@pytest.mark.parametrize('exported', [False, True])
def test_it_takes_a_pretrained_backbone(exported: bool, channels: int, tmp_path: Path) -> None:
    pretrained = small_task()
    for parameter in pretrained.model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path / 'last.ckpt'
    content = {'hyper_parameters': dict(pretrained.hparams), 'state_dict': pretrained.state_dict()}
    torch.save(content, path)
    weights = export_torchgeo(path, tmp_path / 'exported.ckpt') if exported else path
    task = small_mask2former(weights=str(weights), in_channels=channels, freeze_backbone=True)
    encoder = task.model.model.pixel_level_module.encoder.encoder
    loaded, expected = encoder.model.state_dict(), load_backbone(path).state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert all(p.requires_grad for _, p in encoder.pyramid.named_parameters())
    assert task(torch.randn(1, channels, 32, 64)).shape == (1, 3, 32, 64)


def test_the_encoder_keeps_its_own_initialisation() -> None:
    """transformers initialises what it builds; the encoder knows better."""
    encoder = small_mask2former().model.model.pixel_level_module.encoder.encoder
    for vit in encoder.model.encoders.values():
        for block in vit.blocks:
            # init_values of the small model.
            assert (block.ls1.gamma == 1).all()
    # PyTorch's own for convolutions: uniform within 1 / sqrt(fan in).
    weight = encoder.pyramid.levels[0].output[2].weight
    bound = (256 * 9) ** -0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    batch = halves()

    class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {key: value[index] for key, value in batch.items()}

    loader = torch.utils.data.DataLoader(Data(), batch_size=2)
    task = small_mask2former()
    trainer = small_trainer(tmp_path, max_steps=1)
    trainer.fit(task, loader, loader)
    metrics = trainer.callback_metrics
    assert {'train_loss', 'val_loss', 'val_OverallAccuracy', 'train_AverageJaccardIndex'} <= set(
        metrics
    )
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    again = Mask2Former.load_from_checkpoint(tmp_path / 'last.ckpt', weights_only=True)
    assert torch.equal(again.eval()(batch['image']), task.eval()(batch['image']))
    trainer.test(again, loader, verbose=False)
    (predicted,) = trainer.predict(again, loader) or []
    probabilities: Any = predicted
    torch.testing.assert_close(probabilities['probabilities'], task(batch['image']).exp())


def test_another_encoder_of_smp_serves_too() -> None:
    task = small_mask2former(backbone='resnet18', in_channels=13)
    assert task(torch.randn(1, 13, 64, 64)).shape == (1, 3, 64, 64)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, 'geofm.models.auto_backbone', raising=False)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(DependencyNotFoundError, match=r'geofm\[mask2former\]'):
        small_mask2former()
