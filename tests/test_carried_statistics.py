"""The statistics of the input of a backbone are stored with its weights in all formats."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchgeo.tasks import Classification

from geofm.datamodules import NamedBandsDataModule
from geofm.evaluation import BackboneConfig
from geofm.evaluation.backbones import build_backbone
from geofm.maps.make.products import map_scene
from geofm.maps.make.survey import Observer, Wanted
from geofm.maps.scene import Scene
from geofm.models import (
    CheckpointError,
    MultiSensorViT,
    export_backbone,
    load_backbone,
    load_backbone_weights,
    register_encoder,
)
from geofm.models.checkpoints.model_file import read_model
from geofm.models.timm_vit import load_model
from geofm.sensors import SENSORS, band_statistics
from geofm.tasks import DINOv2
from geofm.transforms import Normalize
from geofm.transforms.statistics import InputStatistics
from tests.maps.scenes import noise, write
from tests.tasks.test_dinov2 import SMALL, small_trainer

BANDS = ['B02', 'B03', 'B04']
MEAN = {'B02': 400.5, 'B03': 500.25, 'B04': 601.1}
STD = {'B02': 80.1, 'B03': 90.0, 'B04': 100.7}
MODEL = 'geofm_vit_tiny_patch16_s2'

register_encoder('small_bgr', MODEL, bands=BANDS, **SMALL['model_args'])


class Dark(Dataset[dict[str, Tensor]]):
    """Return Sentinel-2 DN of a dark place."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = 500 + 80 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {'image': image, 'label': torch.tensor(index % 2)}


def dark(**kwargs: Any) -> NamedBandsDataModule:
    data: Any = Dark()
    return NamedBandsDataModule(BANDS, train_dataset=data, batch_size=2, **kwargs)


def pretrain(folder: Path, **kwargs: Any) -> Path:
    task = DINOv2(**{**SMALL, 'model': MODEL, 'bands': BANDS, 'in_channels': 3})
    trainer = small_trainer(folder, max_steps=1, enable_checkpointing=False)
    trainer.fit(task, datamodule=dark(**kwargs))
    path = folder / 'run.ckpt'
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope='module')
def checkpoint(module_path: Path) -> Path:
    """A checkpoint of a run with its own statistics."""
    return pretrain(module_path, mean=MEAN, std=STD)


def as_trained(statistics: InputStatistics | None) -> None:
    assert statistics is not None
    assert statistics.mean == pytest.approx(MEAN)
    assert statistics.std == pytest.approx(STD)
    assert statistics.clip == 5.0


def test_an_entry_round_trips_exactly() -> None:
    normalize = Normalize(BANDS, list(MEAN.values()), list(STD.values()), clip=None)
    entry = json.loads(json.dumps(InputStatistics.of(normalize).entry()))
    again = InputStatistics.from_entry(entry).normalize(['B04', 'B02', 'B08'])
    order = [BANDS.index('B04'), BANDS.index('B02')]
    assert torch.equal(again.mean[:2], normalize.mean[order])
    assert torch.equal(again.std[:2], normalize.std[order])
    assert again.clip is None
    # A band without an entry gets the built-in statistics.
    assert again.mean[2].item() == band_statistics(['B08'])[0].item()


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        ([], "no mapping 'bands'"),
        ({'bands': {'B02': 1}}, 'does not map names'),
        ({'bands': {'B02': {'mean': '1', 'std': 1.0, 'unit': 'DN'}}}, 'must be numbers'),
        ({'bands': {'B02': {'mean': 1.0, 'std': 0.0, 'unit': 'DN'}}}, 'positive'),
        ({'bands': {'B02': {'mean': float('nan'), 'std': 1.0, 'unit': 'DN'}}}, 'finite'),
        ({'bands': {'B02': {'mean': 1.0, 'std': 1.0, 'unit': 'reflectance'}}}, "'reflectance'"),
        ({'bands': {'BXX': {'mean': 1.0, 'std': 1.0, 'unit': 'DN'}}}, 'unknown bands'),
        ({'bands': {}, 'clip': 'no'}, 'clip'),
    ],
)
def test_damaged_entries_are_refused(entry: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        InputStatistics.from_entry(entry)
    path = tmp_path / 'a.ckpt'
    torch.save({'geofm': {'input': entry}}, path)
    with pytest.raises(CheckpointError, match=r'a\.ckpt: the statistics of its input'):
        _ = read_model(path).statistics


@pytest.mark.parametrize('to', ['geofm', 'torchgeo', 'timm', 'dinov2'])
@pytest.mark.parametrize('suffix', ['.ckpt', '.safetensors'])
def test_exports_contain_the_statistics(
    to: Any, suffix: str, checkpoint: Path, tmp_path: Path
) -> None:
    if (to, suffix) == ('torchgeo', '.safetensors'):
        pytest.skip('TorchGeo reads no safetensors')
    exported = export_backbone(checkpoint, tmp_path / f'exported{suffix}', to)
    if to in ('timm', 'dinov2') and suffix == '.ckpt':
        assert any('statistics' in part for part in exported.left_out)
        return
    as_trained(read_model(exported.path).statistics)
    if to in ('geofm', 'torchgeo'):
        as_trained(load_backbone(exported.path).statistics)
        return
    fresh = DINOv2(**{**SMALL, 'model': MODEL, 'bands': BANDS, 'in_channels': 3}).model
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        load_backbone_weights(fresh, exported.path)
    as_trained(fresh.statistics)


def test_maps_show_the_input_of_training(checkpoint: Path, tmp_path: Path) -> None:
    model = load_backbone(checkpoint)
    as_trained(model.statistics)
    pixels = noise('s2', 32, 32) / 6
    path = write(tmp_path / 's2.tif', pixels)
    names = {'s2': list(SENSORS['s2'].band_names)}
    with Scene(model.bands, None, path, names=names) as scene:
        sample = {key: value[None] for key, value in scene.read(0, 0, 32, 32).items()}
        seen = Observer(model, scene, Wanted(tokens=True)).observe(sample)
    order = [SENSORS['s2'].band_names.index(band) for band in model.bands]
    image = (torch.from_numpy(pixels[order]) - list_of(MEAN, model.bands)) / list_of(
        STD, model.bands
    )
    with torch.inference_mode():
        expected = model.forward_features(image.clamp(-5, 5)[None].float(), sample['dates'])
    torch.testing.assert_close(seen.tokens, expected, atol=1e-4, rtol=1e-4)

    files = map_scene(model, None, path, tmp_path / 'maps', ['embedding'], names=names)
    assert files


def list_of(values: dict[str, float], bands: Any) -> Tensor:
    return torch.tensor([values[band] for band in bands]).view(-1, 1, 1)


def test_tokens_that_are_not_finite_stop_a_map(checkpoint: Path, tmp_path: Path) -> None:
    model = load_backbone(checkpoint)
    with torch.no_grad():
        model.get_parameter('encoders.s2.norm.weight').fill_(3e38)
        model.get_parameter('encoders.s2.norm.bias').fill_(3e38)
    path = write(tmp_path / 's2.tif', noise('s2', 32, 32))
    with pytest.raises(ValueError, match='not finite'):
        map_scene(model, None, path, tmp_path / 'maps', ['embedding'])


def test_the_benchmark_normalises_as_in_training(checkpoint: Path) -> None:
    def normalised(config: BackboneConfig, of_data: Any, random: bool = False) -> Any:
        backbone = build_backbone(config, BANDS, of_data, 0, random)
        adapter: Any = backbone.adapter
        return adapter.normalise.mean.flatten().tolist(), ' '.join(backbone.lines)

    mean, said = normalised(BackboneConfig(str(checkpoint)), {})
    assert mean == pytest.approx(list(MEAN.values()))
    assert 'statistics that its weights were trained with' in said
    # Its baseline gets the same images.
    assert normalised(BackboneConfig(str(checkpoint)), {}, random=True)[0] == mean
    mean, said = normalised(BackboneConfig(str(checkpoint)), {'B02': (1.0, 2.0)})
    assert mean == pytest.approx([1.0, MEAN['B03'], MEAN['B04']])
    assert 'B02 are normalised by the given statistics' in said


def test_fine_tuning_normalises_as_in_training(checkpoint: Path, tmp_path: Path) -> None:
    """TorchGeo's task gets the file, and the data module uses its statistics."""
    exported = export_backbone(checkpoint, tmp_path / 'w.ckpt', 'torchgeo').path
    task = Classification('resnet18', None, in_channels=3, num_classes=2)
    task.weights = str(exported)
    trainer = small_trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    data = dark()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*statistics')
        trainer.fit(task, datamodule=data)
    as_trained(InputStatistics.of(data.aug))
    assert data.mean.tolist() == pytest.approx(list(MEAN.values()))
    # The checkpoint of the fine-tuned task also contains them.
    trainer.save_checkpoint(tmp_path / 'tuned.ckpt')
    as_trained(read_model(tmp_path / 'tuned.ckpt').statistics)

    # When it is tested from its checkpoint, it gets the same images.
    again = dark(val_dataset=Dark())
    task = Classification('resnet18', None, in_channels=3, num_classes=2)
    small_trainer(tmp_path).validate(task, datamodule=again, ckpt_path=tmp_path / 'tuned.ckpt')
    as_trained(InputStatistics.of(again.aug))


def test_given_statistics_take_precedence_with_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    task = DINOv2(
        **{**SMALL, 'model': MODEL, 'bands': BANDS, 'in_channels': 3}, weights=str(checkpoint)
    )
    data = dark(mean={'B03': 700.0})
    trainer = small_trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    with pytest.warns(UserWarning, match='normalises B03 with the given statistics'):
        trainer.fit(task, datamodule=data)
    assert data.mean.tolist() == pytest.approx([400.5, 700.0, 601.1])
    trainer.save_checkpoint(tmp_path / 'next.ckpt')
    found = read_model(tmp_path / 'next.ckpt').statistics
    assert found is not None
    assert found.mean['B03'] == 700.0


def test_a_fine_tuned_timm_vit_gets_the_input_of_fine_tuning(tmp_path: Path) -> None:
    task = Classification('vit_tiny_patch16_224', None, in_channels=3, num_classes=2)
    state = {
        'state_dict': task.state_dict(),
        'hyper_parameters': dict(task.hparams),
        'NamedBandsDataModule': dark(mean=MEAN, std=STD).state_dict(),
    }
    torch.save(state, tmp_path / 'tuned.ckpt')
    as_trained(load_model(tmp_path / 'tuned.ckpt', bands=BANDS).statistics)


def test_a_checkpoint_without_statistics_uses_the_built_in_ones(
    checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for key in ('geofm', 'NamedBandsDataModule'):
        del content[key]
    torch.save(content, tmp_path / 'old.ckpt')
    model = load_backbone(tmp_path / 'old.ckpt')
    assert isinstance(model, MultiSensorViT)
    assert model.statistics is None
    path = write(tmp_path / 's2.tif', noise('s2', 32, 32))
    with Scene(model.bands, None, path) as scene:
        normalize = Observer(model, scene, Wanted(tokens=True)).normalize
    assert torch.equal(normalize.mean.flatten(), band_statistics(model.bands)[0])


def test_a_warning_names_data_with_unknown_normalisation(tmp_path: Path) -> None:
    data = dark()
    data.aug = lambda batch: batch
    task = DINOv2(**{**SMALL, 'model': MODEL, 'bands': BANDS, 'in_channels': 3})
    data._name_bands = lambda bands: None  # type: ignore[method-assign]
    trainer = small_trainer(tmp_path, max_steps=1, enable_checkpointing=False)
    with pytest.warns(UserWarning, match='the normalisation of NamedBandsDataModule is unknown'):
        trainer.fit(task, datamodule=data)
