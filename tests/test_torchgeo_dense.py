"""ViTs with a feature pyramid in TorchGeo's pixel-wise tasks, and their configurations."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from segmentation_models_pytorch.encoders import encoders
from torch import nn
from torchgeo.tasks import Classification, PixelwiseRegression, SemanticSegmentation

from geofm.cli import main
from geofm.models import CheckpointError, export_torchgeo, load_backbone, register_encoder
from geofm.models.timm_vit import load_model
from tests.dense import write_dfc2020, write_mmflood, write_sen12ms
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, small_task, small_trainer

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'finetune'
DECODERS = ('unet', 'upernet', 'segformer', 'deeplabv3+')
#: Encoder with the architecture of `small_task`.
ENCODER = 'dense_small'


@pytest.fixture(autouse=True, scope='module')
def _encoder() -> Iterator[None]:
    register_encoder(ENCODER, SMALL['model'], **SMALL['model_args'])
    yield
    del encoders[ENCODER]


@pytest.fixture(scope='module')
def checkpoint(module_path: Path) -> Path:
    """A checkpoint of `fit` with random weights that differ from any initialisation."""
    task = small_task()
    for parameter in task.model.parameters():
        nn.init.normal_(parameter, std=0.05)
    trainer = small_trainer(module_path, max_steps=1, limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule(batch_size=2, length=2))
    trainer.save_checkpoint(module_path / 'last.ckpt')
    return module_path / 'last.ckpt'


def assert_loaded(encoder: Any, path: Path) -> None:
    """Check that the encoder has exactly the tensors of the backbone of the checkpoint."""
    weights, pretrained = encoder.model.state_dict(), load_backbone(path).state_dict()
    assert weights.keys() == pretrained.keys()
    for key, value in pretrained.items():
        assert torch.equal(weights[key], value), key


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [15, 13, 2])
@pytest.mark.parametrize('model', DECODERS)
def test_segmentation_takes_the_checkpoint_itself(
    model: Any, channels: int, checkpoint: Path
) -> None:
    task = SemanticSegmentation(
        model, ENCODER, weights=str(checkpoint), in_channels=channels, num_classes=5
    )
    assert_loaded(task.model.encoder, checkpoint)
    logits = task(torch.randn(2, channels, 32, 64))
    assert logits.shape == (2, 5, 32, 64)
    assert logits.isfinite().all()


@pytest.mark.parametrize('model', DECODERS)
def test_pixel_regression_accepts_the_checkpoint(model: str, checkpoint: Path) -> None:
    task = PixelwiseRegression(model, ENCODER, weights=str(checkpoint), in_channels=2)
    assert_loaded(task.model.encoder, checkpoint)
    assert task(torch.randn(2, 2, 32, 64)).shape == (2, 1, 32, 64)


def test_both_tasks_accept_the_export(checkpoint: Path, tmp_path: Path) -> None:
    exported = str(export_torchgeo(checkpoint, tmp_path / 'exported.ckpt'))
    segmentation = SemanticSegmentation('upernet', ENCODER, exported, 15, num_classes=5)
    assert_loaded(segmentation.model.encoder, checkpoint)
    regression = PixelwiseRegression('unet', ENCODER, exported, 15)
    assert_loaded(regression.model.encoder, checkpoint)


def test_a_model_is_built_and_loaded_by_name(tmp_path: Path) -> None:
    """Nothing is registered explicitly, as with the YAML file of a user."""
    name, path = 'geofm_vit_tiny_patch16_linear', tmp_path / 'last.ckpt'
    task = small_task(model=name, model_args=None)
    torch.save({'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}, path)
    for channels in (15, 13, 2):
        segmentation = SemanticSegmentation('upernet', name, str(path), channels, num_classes=5)
        assert_loaded(segmentation.model.encoder, path)
        assert segmentation(torch.randn(2, channels, 64, 32)).shape == (2, 5, 64, 32)


def test_the_backbone_of_a_fine_tuned_classifier_is_found(tmp_path: Path) -> None:
    name = 'geofm_vit_tiny_patch16_s1'
    task = Classification(name, in_channels=2, num_classes=3)
    content = {'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}
    torch.save(content, tmp_path / 'fine-tuned.ckpt')
    path = str(tmp_path / 'fine-tuned.ckpt')
    segmentation = SemanticSegmentation('unet', name, path, 2, num_classes=5)
    tuned = task.model.state_dict()
    for key, value in segmentation.model.encoder.model.state_dict().items():
        assert torch.equal(value, tuned[key]), key


def test_the_architecture_is_taken_from_the_checkpoint(checkpoint: Path) -> None:
    """The pyramid follows a width, depth and patch size that differ from those of the name."""
    task = SemanticSegmentation('unet', SMALL['model'], str(checkpoint), 15, num_classes=3)
    assert_loaded(task.model.encoder, checkpoint)
    assert task(torch.randn(2, 15, 32, 64)).shape == (2, 3, 32, 64)


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights are of 'geofm_vit_tiny_patch16_linear'"):
        SemanticSegmentation('unet', 'geofm_vit_small_patch16_linear', str(checkpoint), 15)


def test_a_frozen_backbone_is_not_trained(checkpoint: Path) -> None:
    task = SemanticSegmentation(
        'upernet', ENCODER, str(checkpoint), 15, num_classes=3, freeze_backbone=True
    )
    before = {k: v.clone() for k, v in task.model.named_parameters()}
    optimizer: Any = task.configure_optimizers()
    loss = task(torch.randn(2, 15, 32, 32)).square().mean()
    loss.backward()
    optimizer['optimizer'].step()
    moved = {k for k, v in task.model.named_parameters() if not torch.equal(v, before[k])}
    assert_loaded(task.model.encoder, checkpoint)
    assert {k for k in before if k.startswith('encoder.pyramid.')} <= moved
    assert any(k.startswith('decoder.') for k in moved)


def test_a_fine_tuned_checkpoint_can_be_mapped(tmp_path: Path) -> None:
    """The backbone is found in a checkpoint of SemanticSegmentation on a pyramid."""
    task = SemanticSegmentation('unet', 'geofm_vit_tiny_patch16_s2', None, 13, num_classes=3)
    content = {'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}
    torch.save(content, tmp_path / 'tuned.ckpt')
    model = load_model(tmp_path / 'tuned.ckpt')
    tuned = task.model.encoder.model.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, tuned[key]), key


# -- configs --------------------------------------------------------------------------------------


class Watch(Callback):
    """Record of the batches of training steps."""

    shapes: list[tuple[int, ...]] = []  # noqa: RUF012
    losses: list[float] = []  # noqa: RUF012

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert batch['image'].isfinite().all()
        # Normalised by band, and clipped.
        assert batch['image'].abs().max() <= 5
        self.shapes.append(tuple(batch['image'].shape))
        self.losses.append(float(outputs['loss']))


def two_steps(config: str, root: Path, output: Path, extra: list[str]) -> int:
    """Train with a configuration for two steps, validate, and return the number of channels."""
    options = {
        'sen12ms': ['datamodule.dict_kwargs.root', 'datamodule.dict_kwargs.checksum=false'],
        'dfc2020': ['train_dataset.init_args.root', 'val_dataset.init_args.root'],
        'mmflood': ['datamodule.dict_kwargs.root', 'datamodule.init_args.patch_size=32'],
    }
    data = next(k for k in options if k in (CONFIGS / config).read_text())
    Watch.shapes.clear()
    Watch.losses.clear()
    main(
        [
            *('fit', '--config', str(CONFIGS / config)),
            *('--trainer.max_steps=2', '--trainer.limit_val_batches=1'),
            *('--trainer.accelerator=cpu', '--trainer.enable_progress_bar=false'),
            '--trainer.enable_checkpointing=false',
            *('--trainer.default_root_dir', str(output)),
            *('--trainer.callbacks+=tests.test_torchgeo_dense.Watch',),
            f'--model.init_args.backbone={ENCODER}',
            *('--data.init_args.num_workers=0', '--data.init_args.batch_size=2'),
            *(f'--data.init_args.{o}' + ('' if '=' in o else f'={root}') for o in options[data]),
            *extra,
        ]
    )
    assert len(Watch.shapes) == 2
    assert torch.tensor(Watch.losses).isfinite().all()
    return Watch.shapes[0][1]


SMALL_MASK2FORMER = [
    '--model.init_args.num_queries=5',
    '--model.init_args.model_args={encoder_layers: 1, decoder_layers: 2, train_num_points: 64, '
    'encoder_feedforward_dim: 32, dim_feedforward: 32}',
]

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec('transformers') is None, reason='needs the extra geofm[mask2former]'
)

RUNS = [
    ('upernet.yaml', 'sen12ms', 15, []),
    ('unet.yaml', 'dfc2020', 13, []),
    ('segformer.yaml', 'dfc2020', 2, []),
    ('height.yaml', 'mmflood', 2, []),
    pytest.param('mask2former.yaml', 'sen12ms', 15, SMALL_MASK2FORMER, marks=needs_transformers),
]


@pytest.mark.parametrize(('config', 'data', 'channels', 'extra'), RUNS)
def test_configs_train_on_generated_data(
    config: str, data: str, channels: int, extra: list[str], tmp_path: Path
) -> None:
    write = {'sen12ms': write_sen12ms, 'dfc2020': write_dfc2020, 'mmflood': write_mmflood}
    root = write[data](tmp_path / data)
    assert two_steps(config, root, tmp_path / 'output', extra) == channels


@pytest.mark.parametrize(('config', 'data', 'channels', 'extra'), RUNS)
def test_configs_train_on_stand_ins(
    config: str, data: str, channels: int, extra: list[str], tmp_path: Path, shared_data: Path
) -> None:
    folders = {'dfc2020': 'copernicus/l2_dfc2020_s1s2'}
    root = shared_data / 'torchgeo' / folders.get(data, data)
    if not root.is_dir():
        pytest.skip(f'needs {root}, which is not there')
    if data == 'mmflood':
        # Its tiles are smaller than a window of 32 px.
        extra = [
            '--data.init_args.datamodule.dict_kwargs.res=0.00002',
            '--data.init_args.datamodule.init_args.length=4',
        ]
    assert two_steps(config, root, tmp_path, extra) == channels


def test_every_config_says_how_to_run_it_on_an_encoder_that_exists() -> None:
    for config in CONFIGS.glob('*.yaml'):
        text = config.read_text()
        assert f'--config configs/finetune/{config.name}' in text
        assert '--model.init_args.weights' in text
        backbone = next((line.split()[1] for line in text.splitlines() if 'backbone:' in line), '')
        assert not backbone or backbone in encoders or backbone.startswith('tu-')
