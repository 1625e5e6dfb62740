"""The flagship's checkpoint in each of the tasks, by each way of adapting: one step of training.

The clone has the configuration's ``model_args``; its width and depth are reduced as in
tests/test_doors.py, so that the architecture is not that of its name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from torchgeo.tasks import Classification, PixelwiseRegression, SemanticSegmentation

from geofm.callbacks.adapt import Adapt, find_backbone
from geofm.models import CheckpointError, MultiSensorViT, export_torchgeo, load_backbone
from geofm.tasks import Mask2Former
from tests.test_doors import CONFIGS, reduced, write_checkpoint

CONFIG = CONFIGS['sen12mscrts_vitb16_linear']
NAME = reduced(CONFIG)['model']
SIDE = 32
SMALL = {'encoder_layers': 1, 'decoder_layers': 2, 'encoder_feedforward_dim': 32, 'hidden_dim': 32}


def segmentation(decoder: Any, prefix: str = '') -> Callable[[str], Any]:
    return lambda weights: SemanticSegmentation(
        decoder, f'{prefix}{NAME}', weights, 15, num_classes=3, num_filters=16
    )


TASKS: dict[str, Callable[[str], Any]] = {
    'classification': lambda weights: Classification(NAME, weights, 15, num_classes=3),
    'dpt': segmentation('dpt', 'tu-'),
    'unet': segmentation('unet'),
    'upernet': segmentation('upernet'),
    'segformer': segmentation('segformer'),
    'regression': lambda weights: PixelwiseRegression('unet', NAME, weights, 15),
    'mask2former': lambda weights: Mask2Former(
        NAME, weights, 15, num_classes=3, num_queries=2, model_args=SMALL
    ),
}


@pytest.fixture(scope='module')
def checkpoint(module_path: Path) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(module_path / 'last.ckpt', **reduced(CONFIG))


@pytest.fixture(scope='module')
def exported(checkpoint: Path) -> Path:
    return export_torchgeo(checkpoint, checkpoint.with_name('exported.ckpt'))


class AtStart(Callback):
    """Callback that keeps the initial weights of the backbone."""

    weights: dict[str, torch.Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = copied(find_backbone(pl_module)[1])


def copied(backbone: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in backbone.named_parameters()}


def batches(kind: str) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 15, SIDE, SIDE, generator=generator)
    shape = () if kind == 'classification' else (SIDE, SIDE)
    targets = torch.randint(3, (4, *shape), generator=generator)
    key = 'label' if kind == 'classification' else 'mask'
    targets = targets.float() if kind == 'regression' else targets
    samples: Any = [{'image': i, key: t} for i, t in zip(images, targets, strict=True)]
    return DataLoader(samples, batch_size=2)


@pytest.mark.parametrize('method', ['frozen', 'lora', 'full'])
@pytest.mark.parametrize('kind', TASKS)
def test_one_step(kind: str, method: Any, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    pytest.importorskip('transformers' if kind == 'mask2former' else 'peft')
    expected = load_backbone(checkpoint)
    assert expected.num_reg_tokens == CONFIG['model_args']['reg_tokens'] == 2
    torch.manual_seed(0)
    task = TASKS[kind](str(exported if kind == 'dpt' else checkpoint))
    start = AtStart()
    trainer = Trainer(
        max_steps=1,
        accelerator='cpu',
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        callbacks=[Adapt(method), start],
    )
    trainer.fit(task, batches(kind))
    _, backbone = find_backbone(task)
    assert isinstance(backbone, MultiSensorViT)
    assert (backbone.num_reg_tokens, backbone.depth) == (2, 2)
    before, after = start.weights, copied(backbone)
    # LoRA replaces layers, whose weights are then called 'base_layer'.
    names = {name: name.replace('.base_layer', '') for name in before}
    own = dict(expected.named_parameters())
    for name, plain in names.items():
        if plain in own:
            assert torch.equal(before[name], own[plain]), name
    assert set(own) - set(names.values()) <= {'head.weight', 'head.bias'}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in changed if not name.startswith('head.')}
    if method == 'frozen':
        assert not inside
    elif method == 'lora':
        assert inside
        assert all('.lora_' in name for name in inside)
    else:
        assert {f'encoders.{key}.cls_token' for key in expected.sensors} <= inside


@pytest.mark.parametrize('kind', TASKS)
def test_a_part_of_the_backbone_is_refused(
    kind: str, checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    pytest.importorskip('transformers' if kind == 'mask2former' else 'torch')
    content = torch.load(exported if kind == 'dpt' else checkpoint, weights_only=True)
    state = content['state_dict']
    gone = [name for name in state if 'blocks.1.attn.qkv.weight' in name and 's2' in name]
    assert gone
    content['state_dict'] = {k: v for k, v in state.items() if k not in gone}
    torch.save(content, tmp_path / 'part.ckpt')
    with pytest.raises((CheckpointError, RuntimeError), match='qkv') as error:
        TASKS[kind](str(tmp_path / 'part.ckpt'))
    assert len(str(error.value).splitlines()) <= 2


def test_every_configuration_of_fine_tuning_says_how_it_adapts() -> None:
    folder = Path(__file__).resolve().parents[1] / 'configs' / 'finetune'
    for path in folder.glob('*.yaml'):
        config = yaml.safe_load(path.read_text())
        assert 'method' in config['adapt'], path.name
