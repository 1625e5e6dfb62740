"""Distillation of a frozen teacher with few bands into a student with more."""

import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import timm
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torch.utils.data import DataLoader
from torchgeo.tasks.utils import extract_backbone

from geofm.cli import main
from geofm.datasets.eurosat_rgb import DN_PER_LEVEL
from geofm.models import CheckpointError, load_backbone
from geofm.models.checkpoints.files import METADATA
from geofm.models.checkpoints.statistics import carry_statistics
from geofm.sensors import RGB_BANDS, SENTINEL2, BandError, band_statistics
from geofm.tasks import Distillation, MaskedWords, Teacher
from geofm.tasks.nonfinite import DumpError, replay
from geofm.tasks.teacher import FrozenTeacher
from geofm.transforms.statistics import InputStatistics
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, Record, batch, small_task, small_trainer

ROOT = Path(__file__).parents[2]
BANDS = SENTINEL2.band_names
MODEL = 'geofm_vit_tiny_patch16_s2'
WIDE: dict[str, Any] = {
    'embed_dim': 48,
    'depth': 3,
    'num_heads': 3,
    'patch_size': 8,
    'init_values': 1.0,
}
DINOV3: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2}
STATISTICS = InputStatistics(
    dict(zip(RGB_BANDS, (900.0, 1000.0, 1100.0), strict=True)),
    dict(zip(RGB_BANDS, (500.0, 400.0, 300.0), strict=True)),
    4.0,
)
STUDENT: dict[str, Any] = {
    'model': MODEL,
    'in_channels': 13,
    'model_args': {**SMALL['model_args'], 'img_size': 32},
    'global_size': 32,
    'local_size': 16,
    'drop_path_rate': 0.0,
    'warmup_epochs': 0.5,
}


@pytest.fixture(scope='module')
def teacher(module_path: Path) -> Teacher:
    """A checkpoint for red, green and blue, with its own statistics."""
    torch.manual_seed(0)
    hparams = {'model': MODEL, 'in_channels': 3, 'bands': list(RGB_BANDS), 'model_args': WIDE}
    task_model = timm.create_model(MODEL, in_chans=3, bands=RGB_BANDS, num_classes=0, **WIDE)
    path = module_path / 'rgb.ckpt'
    weights = {f'model.{key}': value for key, value in task_model.state_dict().items()}
    metadata = carry_statistics(STATISTICS)
    torch.save({'hyper_parameters': hparams, 'state_dict': weights, METADATA: metadata}, path)
    return Teacher(str(path))


@pytest.fixture(scope='module')
def dinov3(module_path: Path) -> Teacher:
    """A ViT in DINOv3's layout, with rotary positions and random weights."""
    torch.manual_seed(0)
    vit = timm.create_model('vit_small_patch16_dinov3', num_classes=0, **DINOV3)
    path = module_path / 'dinov3.pth'
    torch.save(vit.state_dict(), path)
    return Teacher('vit_small_patch16_dinov3', str(path), white=10_000, model_args=DINOV3)


def raw_images(count: int = 4, size: int = 32) -> Tensor:
    """Make images with 13 bands in DN (reflectance x 10,000)."""
    return torch.rand(count, 13, size, size) * 4000


def normalised(raw: Tensor) -> Tensor:
    mean, std = band_statistics(BANDS)
    return (raw - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def test_a_teacher_of_geofm_sees_its_bands_by_its_own_statistics(teacher: Teacher) -> None:
    frozen, raw = FrozenTeacher(teacher, BANDS), raw_images()
    cls, patches = frozen(normalised(raw))
    rgb = raw[:, [BANDS.index(band) for band in RGB_BANDS]]
    mean, std = (torch.tensor([*values.values()]) for values in (STATISTICS.mean, STATISTICS.std))
    image = ((rgb - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).clamp(-4, 4)
    backbone = load_backbone(teacher.model)
    with torch.no_grad():
        tokens = backbone.forward_features(image)
    torch.testing.assert_close(cls, tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        patches, tokens[:, backbone.num_prefix_tokens :], rtol=1e-4, atol=1e-4
    )
    # With other statistics of the student's data, the teacher still sees the same values.
    frozen.set_statistics(torch.full((13,), 100.0), torch.full((13,), 10.0))
    torch.testing.assert_close(frozen((raw - 100) / 10)[0], cls, rtol=1e-4, atol=1e-4)


def test_a_dinov3_of_timm_sees_reflectance_as_a_picture(dinov3: Teacher) -> None:
    frozen, raw = FrozenTeacher(dinov3, BANDS), raw_images(size=64)
    cls, patches = frozen(normalised(raw))
    vit: Any = timm.create_model(
        dinov3.model, num_classes=0, dynamic_img_size=True, **DINOV3
    ).eval()
    vit.load_state_dict(torch.load(str(dinov3.weights), weights_only=True))
    rgb = raw[:, [BANDS.index(band) for band in RGB_BANDS]] / 10_000
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        tokens = vit.forward_features((rgb - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    torch.testing.assert_close(cls, tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patches, tokens[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_teacher_moves_with_the_task_and_is_no_part_of_it(dinov3: Teacher) -> None:
    task = Distillation(dinov3, **STUDENT)
    assert task.distillation is not None
    frozen = task.distillation.teacher
    # As many patches as the student: 4 x 4 of 16 px.
    assert task.distillation.image_size == 64
    assert not any('network' in name or '.teacher.' in name for name in task.state_dict())
    assert not any('network' in name for name, _ in task.named_modules())
    task.train().double()
    assert not frozen.network.training
    assert {p.dtype for p in frozen.network.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in frozen.network.parameters())
    assert 'teacher' not in task.hparams
    # The student starts as it would without a teacher.
    torch.manual_seed(3)
    alone = small_task(**{**STUDENT, 'teacher': None}).model.state_dict()
    torch.manual_seed(3)
    taught = Distillation(dinov3, **STUDENT).model.state_dict()
    assert all(torch.equal(value, taught[key]) for key, value in alone.items())


def test_crops_that_lack_the_sensor_of_the_teacher_do_not_count(teacher: Teacher) -> None:
    task = Distillation(teacher, **{**SMALL_BOTH, 'photometry': False}).eval()
    images, counted = batch(4), torch.tensor([True, True, False, True])
    images['present'] = torch.stack([torch.ones(4, dtype=torch.bool), counted], dim=1)
    found = []
    for value in (0.0, 9.0):
        images['image'][2, 2:] = value
        torch.manual_seed(0)
        found.append({k: v.item() for k, v in task.compute_losses(images, None)[0].items()})
    assert found[0] == found[1]


SMALL_BOTH: dict[str, Any] = {
    k: v for k, v in SMALL.items() if not k.startswith(('proto', 'head', 'n_local', 'warmup_te'))
}


@pytest.mark.parametrize('method', ['alone', 'dinov2'])
def test_a_run_with_a_teacher(tmp_path: Path, teacher: Teacher, method: str) -> None:
    """A run resumes bit-exactly; its checkpoint describes the teacher without its weights."""

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f'{trainer.current_epoch}.ckpt')

    records = [Record(), Record()]
    for record, path in zip(records, (None, tmp_path / '0.ckpt'), strict=True):
        seed_everything(0)
        if method == 'alone':
            task: Any = Distillation(teacher, **SMALL_BOTH, sensor_dropout=0.5)
        else:
            task = small_task(teacher=teacher, gram_weight=1.0)
        trainer = small_trainer(
            tmp_path, max_epochs=2, callbacks=[record, Save()], limit_val_batches=2
        )
        data = RandomPairsDataModule()
        trainer.fit(task, datamodule=data, ckpt_path=path, weights_only=True)
    assert records[0].losses[4:] == records[1].losses
    expected = {'val_teacher_cls', 'val_teacher_patch'} | (
        {'val_dino'} if method != 'alone' else set()
    )
    assert expected <= set(trainer.callback_metrics)
    checkpoint = torch.load(tmp_path / '1.ckpt', weights_only=True)
    assert checkpoint[METADATA]['teacher'] == {
        'model': 'rgb.ckpt',
        'bands': list(RGB_BANDS),
        'file': 'rgb.ckpt',
        'sha256': hashlib.sha256(Path(teacher.model).read_bytes()).hexdigest(),
    }
    assert 'teacher' not in checkpoint['hyper_parameters']
    _, weights = extract_backbone(str(tmp_path / '1.ckpt'))
    assert set(weights) == {*task.model.state_dict(), 'architecture'}
    assert load_backbone(tmp_path / '1.ckpt').bands == task.model.bands
    # A phase without a teacher resumes from it, and one with a teacher from a phase without.
    if method != 'alone':
        small_task(continue_from=str(tmp_path / '1.ckpt'))


def test_a_step_is_replayed_with_the_teacher_of_its_configuration(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: dict[str, float] = {}

    class Explode(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 2:
                found = trainer.callback_metrics
                names = ('teacher_cls', 'teacher_patch')
                losses.update({name: found[f'train_{name}'].item() for name in names})
                pl_module.distillation.heads['teacher_cls'].weight.grad[0] = torch.inf

    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[Explode()], limit_val_batches=0)
    with pytest.raises(FloatingPointError, match=r"step 2: .*'distillation': inf"):
        trainer.fit(Distillation(teacher, **SMALL_BOTH), datamodule=RandomPairsDataModule())
    dump = tmp_path / 'nonfinite-step2-rank0.pt'
    values = replay(dump, files={'teacher': teacher})
    assert {name: values[name] for name in losses} == losses
    with pytest.raises(DumpError, match='teacher'):
        replay(dump)
    config = tmp_path / 'config.yaml'
    config.write_text(
        yaml.safe_dump({'model': {'init_args': {'teacher': {'model': teacher.model}}}})
    )
    main(['replay', str(dump), '--run', str(config)])
    assert 'teacher_patch' in capsys.readouterr().out


def test_a_teacher_that_cannot_teach_is_refused(
    tmp_path: Path, teacher: Teacher, dinov3: Teacher
) -> None:
    def refused(error: type[Exception], match: str, teacher: Teacher, **kwargs: Any) -> None:
        with pytest.raises(error, match=match):
            Distillation(teacher, **{**STUDENT, **kwargs})

    gone = str(tmp_path / 'gone.pth')
    refused(
        CheckpointError, rf'teacher: {gone}: no such file\. Give', replace(dinov3, weights=gone)
    )
    refused(CheckpointError, 'vit_x: no such file; a model name needs weights', Teacher('vit_x'))
    refused(CheckpointError, 'do not fit', replace(dinov3, model_args={**DINOV3, 'depth': 1}))
    refused(
        BandError,
        r"rgb\.ckpt needs bands that the student lacks: missing bands \['B03'\]",
        teacher,
        in_channels=2,
        bands=['B02', 'B04'],
    )
    refused(
        ValueError,
        'image_size 60 must be a positive multiple of 16',
        replace(dinov3, image_size=60),
    )
    refused(BandError, 'mean and std must have the bands', replace(dinov3, mean={'B04': 0.0}))
    radar = {'model': 'geofm_vit_tiny_patch16_linear', 'in_channels': 15}
    unknown = replace(dinov3, bands=['VV', 'VH', 'B04'])
    refused(
        BandError,
        r"the normalisation of .* for the bands \['VV', 'VH', 'B04'\] is unknown",
        unknown,
        **radar,
    )
    with pytest.raises(ValueError, match='MaskedWords does not support a teacher'):
        MaskedWords(teacher=dinov3, **STUDENT)
    with pytest.raises(ValueError, match='image_size is 64, but gram_size is 32'):
        small_task(teacher=replace(dinov3, image_size=64), gram_weight=1.0)


def test_the_command_line_takes_a_teacher(
    tmp_path: Path, teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {'accelerator': 'cpu', 'logger': False, 'enable_progress_bar': False}
    model = {
        'class_path': 'geofm.tasks.Distillation',
        'init_args': {**SMALL_BOTH, 'teacher': {'model': teacher.model, 'patch_weight': 0.5}},
    }
    config = {
        'trainer': {'max_steps': 1, 'default_root_dir': str(tmp_path), **quiet},
        'model': model,
        'data': {'class_path': 'tests.pairs.RandomPairsDataModule'},
    }
    path = tmp_path / 'run.yaml'
    path.write_text(yaml.safe_dump(config))
    main(['fit', '--config', str(path), '--trainer.limit_val_batches=0'])
    assert list(tmp_path.rglob('*.ckpt'))
    with pytest.raises(SystemExit, match=r'^geofm fit: [^\n]*no such file[^\n]*$'):
        main(['fit', '--config', str(path), '--model.init_args.teacher.model=gone.ckpt'])


def test_the_shipped_config_builds_on_a_file_of_dinov3(dinov3: Teacher) -> None:
    config = yaml.safe_load((ROOT / 'configs/pretrain/distill.yaml').read_text())
    args = config['model']['init_args']
    given = Teacher(**args.pop('teacher'))
    assert (given.model, given.bands) == (dinov3.model, list(RGB_BANDS))
    task = Distillation(replace(given, weights=dinov3.weights, model_args=DINOV3), **args)
    assert task.distillation is not None
    assert (task.distillation.grid, task.distillation.image_size) == ((8, 8), 128)
    losses, _ = task.compute_losses({'image': normalised(raw_images(2, 64))}, None)
    assert all(loss.isfinite() for loss in losses.values())


def scenes(count: int, seed: int) -> Tensor:
    """Make smooth images with 13 bands that are mixtures of six fields."""
    mixing = torch.randn(13, 6, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(count, 6, 1, 1, generator=generator)
    fields = interpolate(torch.randn(count, 6, 6, 6, generator=generator), (40, 40), mode='bicubic')
    return torch.einsum('cf,nfhw->nchw', mixing, levels + fields) / 3


def neighbours_of(features: Tensor, k: int = 5) -> Tensor:
    features = normalize(features, dim=1)
    return (features @ features.T).fill_diagonal_(-2).topk(k).indices


class SharedNeighbours(Callback):
    """Callback that records the fraction of the 5 nearest images shared by teacher and student."""

    def __init__(self, teacher: FrozenTeacher, images: Tensor) -> None:
        self.images, self.values = images, list[float]()
        self.wanted = neighbours_of(teacher(images)[0])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            found = neighbours_of(pl_module.model.forward_features(self.images)[:, 0])
        same = (found[:, :, None] == self.wanted[:, None]).any(dim=-1)
        self.values.append(same.float().mean().item())


def shared_neighbours(
    path: Path, teacher: Teacher, train: Tensor, held_out: Tensor, epochs: int
) -> list[float]:
    """Distil on some images, and compare neighbours of held-out images after each epoch."""
    seed_everything(0)
    mean, std = train.mean(dim=(0, 2, 3)), train.std(dim=(0, 2, 3))
    train, held_out = ((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1) for x in (train, held_out))
    settings = {'lr': 2e-2, 'layer_decay': 1.0, 'patch_embed_lr_mult': 1.0, 'photometry': False}
    task = Distillation(teacher, **{**STUDENT, **settings, 'global_scale': (0.6, 1.0)})
    assert task.distillation is not None
    task.distillation.teacher.set_statistics(mean, std)
    measure = SharedNeighbours(task.distillation.teacher, held_out)
    trainer = small_trainer(path, max_epochs=epochs, callbacks=[measure], limit_val_batches=0)
    samples: Any = [{'image': image} for image in train]
    trainer.fit(task, DataLoader(samples, batch_size=16, shuffle=True))
    return measure.values


def test_neighbours_of_the_student_come_to_be_those_of_the_teacher(
    tmp_path: Path, teacher: Teacher
) -> None:
    """Neighbours of held-out images, with random weights, after one epoch, and after five."""
    teacher = replace(
        teacher, mean=dict.fromkeys(RGB_BANDS, 0.0), std=dict.fromkeys(RGB_BANDS, 1.0)
    )
    shared = shared_neighbours(tmp_path, teacher, scenes(128, 1), scenes(96, 5), epochs=5)
    assert shared[0] + 0.1 < shared[1]
    assert shared[1] + 0.1 < shared[-1]
    assert shared[-1] > 0.7


def test_a_teacher_of_real_pictures_teaches_a_student_of_13_bands(
    tmp_path: Path, shared_data: Path
) -> None:
    """A teacher trained briefly on EuroSAT RGB, and a student on patches with 13 bands."""
    statistics = {'B04': (1001.1, 592.8), 'B03': (1073.2, 398.1), 'B02': (1128.9, 334.0)}
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in zip(*statistics.values(), strict=True))
    pictures = (real_pictures(shared_data / 'eurosat_rgb' / 'eurosat_rgb.zip', 256) - mean) / std
    pictures = pictures[..., :32, :32]
    small: dict[str, Any] = {'model_args': WIDE, 'global_size': 32, 'local_size': 16}
    words = MaskedWords(
        words=64, target_dim=32, bands=RGB_BANDS, in_channels=3, model=MODEL, **small
    )
    trainer = small_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    samples: Any = [{'image': image} for image in pictures]
    data: Any = DataLoader(samples, batch_size=32, shuffle=True)
    trainer.fit(words, data)
    trainer.save_checkpoint(tmp_path / 'rgb.ckpt')
    teacher = Teacher(
        str(tmp_path / 'rgb.ckpt'),
        mean={band: values[0] for band, values in statistics.items()},
        std={band: values[1] for band, values in statistics.items()},
    )
    patches = real_patches(shared_data / 'real' / 'eurosat_ms_geotorch' / 'eurosat')
    patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))]
    # Two windows of each patch to learn from, and generated images.
    windows = [patches[50:, :, i : i + 32, i : i + 32] for i in (0, 32)]
    generated = 1500 + 700 * scenes(32, 1)[..., :32, :32]
    held_out = patches[:50, :, :32, :32]
    shared = shared_neighbours(tmp_path, teacher, torch.cat([*windows, generated]), held_out, 3)
    assert shared[-1] > max(shared[:2]) + 0.1


def real_pictures(path: Path, count: int) -> Tensor:
    """Load some EuroSAT RGB images of all classes, in DN."""
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.endswith('.jpg'))
        chosen = names[:: len(names) // count][:count]
        images = [np.asarray(Image.open(io.BytesIO(file.read(name)))) for name in chosen]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() * DN_PER_LEVEL


def real_patches(folder: Path) -> Tensor:
    """Load real patches with 13 bands, in DN. In the files, B8A is the last band."""
    in_files = [*(band for band in BANDS if band != 'B8A'), 'B8A']
    images = []
    for path in sorted(folder.glob('*/*.tif')):
        with rasterio.open(path) as source:
            images.append(source.read().astype('float32'))
    return torch.from_numpy(np.stack(images))[:, [in_files.index(band) for band in BANDS]]
