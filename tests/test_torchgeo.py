"""Backbones in TorchGeo's tasks, by name and with the weights of a checkpoint."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchgeo.tasks import Classification, SemanticSegmentation

from geofm.commands.adoption import adopt_model
from geofm.models import CheckpointError, create_backbone, export_torchgeo, load_backbone
from geofm.tasks import DINOv2
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import small_trainer


@pytest.fixture(scope='module', params=['linear', 'xattn', 'early'])
def checkpoint(request: Any, module_path: Path) -> Iterator[tuple[str, Path]]:
    """A checkpoint of `fit` with random weights that differ from any initialisation."""
    name = f'geofm_vit_nano_patch16_{request.param}'
    small: dict[str, Any] = {'prototypes': 16, 'head_hidden_dim': 8, 'head_bottleneck_dim': 8}
    task = DINOv2(name, global_size=32, local_size=16, n_local=1, **small)
    for parameter in task.model.parameters():
        nn.init.normal_(parameter, std=0.05)
    folder = module_path / request.param
    trainer = small_trainer(folder, max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(task, datamodule=RandomPairsDataModule(batch_size=2, length=2))
    trainer.save_checkpoint(folder / 'last.ckpt', weights_only=True)
    yield name, folder / 'last.ckpt'
    shutil.rmtree(folder)


def assert_loaded(model: nn.Module, path: Path) -> None:
    """Check that the model has all tensors of the backbone of the checkpoint."""
    weights = model.state_dict()
    pretrained = load_backbone(path).state_dict()
    assert set(weights) - set(pretrained) <= {'head.weight', 'head.bias'}
    for key, value in pretrained.items():
        assert torch.equal(weights[key], value), key


def test_classification_takes_the_checkpoint_itself(checkpoint: tuple[str, Path]) -> None:
    name, path = checkpoint
    task = Classification(model=name, weights=str(path), in_channels=15, num_classes=8)
    assert_loaded(task.model, path)
    logits = task(torch.randn(2, 15, 64, 64))
    assert logits.shape == (2, 8)
    logits.sum().backward()
    frozen = Classification(
        model=name, weights=str(path), in_channels=15, num_classes=8, freeze_backbone=True
    )
    trainable = [n for n, p in frozen.model.named_parameters() if p.requires_grad]
    assert trainable == ['head.weight', 'head.bias']


def test_classification_of_one_sensor_takes_it_too(checkpoint: tuple[str, Path]) -> None:
    name, path = checkpoint
    for channels in (2, 13):
        task = Classification(model=name, weights=str(path), in_channels=channels, num_classes=8)
        assert_loaded(task.model, path)
        assert task(torch.randn(1, channels, 32, 32)).shape == (1, 8)


def test_both_tasks_accept_the_export(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    name, path = checkpoint
    exported = export_torchgeo(path, tmp_path / 'new' / 'weights.ckpt')
    assert [p.name for p in exported.parent.iterdir()] == ['weights.ckpt']
    # Each weight has two names, but is stored once.
    tensors = load_backbone(path).state_dict().values()
    numbers = sum(tensor.numel() for tensor in tensors)
    assert exported.stat().st_size < 1.2 * 4 * numbers
    segmentation = SemanticSegmentation(
        model='dpt', backbone=f'tu-{name}', weights=str(exported), in_channels=15, num_classes=8
    )
    assert_loaded(segmentation.model.encoder.model, path)
    assert segmentation(torch.randn(1, 15, 64, 64)).shape == (1, 8, 64, 64)
    for channels in (2, 13, 15):
        classification = Classification(
            model=name, weights=str(exported), in_channels=channels, num_classes=8
        )
        assert_loaded(classification.model, path)
        assert classification(torch.randn(2, channels, 64, 64)).shape == (2, 8)
    assert_loaded(load_backbone(exported), path)


def test_fit_says_what_dpt_loads(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    name, path = checkpoint
    args = {'model': 'dpt', 'backbone': f'tu-{name}', 'weights': str(path)}
    task = {'class_path': 'torchgeo.tasks.SemanticSegmentation', 'init_args': args}
    with pytest.raises(CheckpointError, match=r'geofm export .*last\.ckpt FILE --to torchgeo'):
        adopt_model(task)
    exported = export_torchgeo(path, tmp_path / 'weights.ckpt')
    adopt_model({**task, 'init_args': {**args, 'weights': str(exported)}})


def test_a_missing_weight_is_an_error(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    """Models only ignore the second name of a weight."""
    name, path = checkpoint
    content = torch.load(export_torchgeo(path, tmp_path / 'whole.ckpt'), weights_only=True)
    state = content['state_dict']
    lacking = {k: v for k, v in state.items() if 'norm1' not in k}
    foreign = {**state, 'modelmodel..decoder.weight': torch.zeros(1)}
    for broken, told in ((lacking, 'Missing key'), (foreign, 'Unexpected key')):
        torch.save({**content, 'state_dict': broken}, tmp_path / 'broken.ckpt')
        with pytest.raises(RuntimeError, match=told):
            SemanticSegmentation(
                model='dpt', backbone=f'tu-{name}', weights=str(tmp_path / 'broken.ckpt'),
                in_channels=15, num_classes=8,
            )  # fmt: skip
    backbone = load_backbone(path)
    weights = backbone.state_dict()
    with pytest.raises(RuntimeError, match='Missing key'):
        backbone.load_state_dict({k: v for k, v in weights.items() if 'norm1' not in k})
    with pytest.raises(RuntimeError, match='Unexpected key'):
        backbone.load_state_dict({**weights, 'decoder.weight': torch.zeros(1)})


def test_errors_name_foreign_files(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        'text.ckpt': None,
        'stack.ckpt': '.',
        'number.ckpt': 'G',
        'tensor.ckpt': torch.zeros(3),
        'weights.ckpt': {'state_dict': {}},
        'other.ckpt': {'state_dict': {'a': torch.zeros(1)}, 'hyper_parameters': {'lr': 1.0}},
        'code.ckpt': {'state_dict': {}, 'hyper_parameters': {'f': Path}},
    }
    for name, content in cases.items():
        path = tmp_path / name
        if content is None:
            path.write_text('not a checkpoint')
        elif isinstance(content, str):
            # Pickle opcodes with an empty stack, and a truncated file.
            path.write_text(content)
        else:
            torch.save(content, path)
        with pytest.raises(CheckpointError, match=name):
            load_backbone(path)
    with pytest.raises(CheckpointError, match='no such file'):
        load_backbone(tmp_path / 'absent.ckpt')


def test_weights_that_do_not_fit_are_refused(checkpoint: tuple[str, Path], tmp_path: Path) -> None:
    _, path = checkpoint
    content = torch.load(path, weights_only=True)
    content['hyper_parameters']['model_args'] = {'depth': 3}
    torch.save(content, tmp_path / 'shallow.ckpt')
    with pytest.raises(CheckpointError, match=r'shallow\.ckpt: describes 3 blocks, but'):
        load_backbone(tmp_path / 'shallow.ckpt')
    assert create_backbone(content['hyper_parameters']).depth == 3
