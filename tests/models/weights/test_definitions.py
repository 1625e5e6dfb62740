"""A checkpoint stores the definitions of its sensors, and loads where they are unknown."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchgeo.tasks import Classification

from geofm.models import (
    CheckpointError,
    MultiSensorViT,
    export_backbone,
    load_backbone,
    load_backbone_weights,
)
from geofm.models.architecture import KEY
from geofm.models.checkpoints.files import METADATA
from geofm.models.timm_vit import load_model
from geofm.sensors import SENSORS, Band, Sensor, register_sensor
from tests.registry import kept_registry
from tests.tasks.test_dinov2 import SMALL, small_task

PLANET = Sensor(
    'planet',
    'PlanetScope',
    (Band('blue', 560, 420), Band('red', 900, 700), Band('nir', 2600, 1100)),
    quantity='reflectance',
    unit='DN',
)
MODEL = 'geofm_vit_tiny_patch16_joint'
ARGS = {**SMALL['model_args'], 'sensors': ['s2', 'dem', 'planet']}


@pytest.fixture(scope='module')
def image() -> Tensor:
    return torch.randn(2, 17, 32, 32)


@pytest.fixture(scope='module')
def made(module_path: Path, image: Tensor) -> tuple[Path, Tensor]:
    """Make a checkpoint of a model with a sensor that is not registered, and its tokens."""
    path = module_path / 'planet.ckpt'
    torch.manual_seed(0)
    with kept_registry():
        register_sensor(PLANET)
        task = small_task(model=MODEL, model_args=ARGS, in_channels=17, photometry=False)
        trainer = Trainer(accelerator='cpu', logger=False, enable_progress_bar=False)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(path, weights_only=True)
        export_backbone(path, path.with_suffix('.safetensors'))
        export_backbone(path, path.with_suffix('.pth'))
        export_backbone(path, path.with_name('torchgeo.ckpt'), 'torchgeo')
        export_backbone(path, path.with_name('vit.safetensors'), 'timm', 'planet')
        return path, task.model.forward_features(image)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    with kept_registry():
        assert 'planet' not in SENSORS
        yield


@pytest.mark.parametrize(
    'name', ['planet.ckpt', 'planet.safetensors', 'planet.pth', 'torchgeo.ckpt']
)
@pytest.mark.parametrize('load', [load_backbone, load_model])
def test_it_loads_where_the_sensor_is_not_known(
    name: str, load: Any, made: tuple[Path, Tensor], image: Tensor
) -> None:
    path, tokens = made
    model = load(path.with_name(name))
    assert SENSORS['planet'] == PLANET
    assert model.sensors == ('s2', 'dem', 'planet')
    assert model.bands[-1] == 'planet.nir'
    assert torch.equal(model.forward_features(image), tokens)


def test_a_model_built_by_name_takes_it_from_the_weights(
    made: tuple[Path, Tensor], image: Tensor
) -> None:
    path, tokens = made
    task = Classification(
        model=MODEL, in_channels=17, num_classes=4, weights=str(path.with_name('torchgeo.ckpt'))
    )
    model = task.model
    assert isinstance(model, MultiSensorViT)
    assert torch.equal(model.eval().forward_features(image), tokens)


def test_a_task_of_torchgeos_on_it_is_mapped_and_resumed(
    made: tuple[Path, Tensor], image: Tensor, tmp_path: Path
) -> None:
    """The marker that TorchGeo looks up is not a weight of the model."""
    with kept_registry():
        task = Classification(model=MODEL, in_channels=17, num_classes=4, weights=str(made[0]))
        trainer = Trainer(accelerator='cpu', logger=False, enable_progress_bar=False)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(tmp_path / 'task.ckpt', weights_only=True)
    model = load_model(tmp_path / 'task.ckpt')
    assert isinstance(model, MultiSensorViT)
    assert torch.equal(model.forward_features(image), made[1])
    again = Classification(model=MODEL, in_channels=17, num_classes=4)
    again.load_state_dict(torch.load(tmp_path / 'task.ckpt', weights_only=True)['state_dict'])


def test_another_sensor_under_the_key_is_one_clear_error(made: tuple[Path, Tensor]) -> None:
    path, _ = made
    register_sensor(replace(PLANET, bands=(*PLANET.bands[:2], Band('nir', 2600, 1000))))
    for name in ('planet.ckpt', 'planet.safetensors'):
        with pytest.raises(
            CheckpointError, match=r"two definitions of the sensor 'planet'"
        ) as info:
            load_backbone(path.with_name(name))
        assert str(path.with_name(name)) in str(info.value)
        assert '\n' not in str(info.value)


def test_the_order_of_registration_must_be_that_of_the_checkpoint(tmp_path: Path) -> None:
    second = replace(PLANET, name='other', title='Other')
    with kept_registry():
        register_sensor(PLANET)
        register_sensor(second)
        model = timm.create_model(
            MODEL, sensors=['planet', 'other'], in_chans=6, embed_dim=32, depth=1, num_heads=2
        )
        state = {f'model.{key}': value for key, value in model.state_dict().items()}
        assert isinstance(model, MultiSensorViT)
        assert model.architecture is not None
        state[f'model.{KEY}'] = model.architecture.to_tensor()
    register_sensor(second)
    with pytest.raises(CheckpointError, match=r"order \['planet', 'other'\]"):
        timm.create_model(MODEL, in_chans=6).load_state_dict(state)


DAMAGED: dict[str, Any] = {
    'no mapping': ['planet'],
    'nothing': {},
    'fields': {'planet': {'bands': 3}},
    'key': {'../planet': PLANET.to_dict()},
    'unknown field': {'planet': {**PLANET.to_dict(), 'run': 'rm'}},
    'text': {'planet': 'planet'},
    'number': {'planet': {**PLANET.to_dict(), 'bands': [{'name': 'a', 'mean': 'x', 'std': 1}]}},
    'bands': {'planet': {**PLANET.to_dict(), 'bands': [{}] * 5000}},
    'many': {f'p{i}': PLANET.to_dict() for i in range(65)},
}


@pytest.mark.parametrize('definitions', DAMAGED.values(), ids=DAMAGED)
def test_damaged_definitions_are_refused(
    definitions: Any, made: tuple[Path, Tensor], tmp_path: Path
) -> None:
    content = torch.load(made[0], weights_only=True)
    before = dict(SENSORS)
    record = json.loads(bytes(content['state_dict'][f'model.{KEY}'].tolist()))
    text = json.dumps({**record, 'sensors': definitions}).encode()
    records = [key for key in content['state_dict'] if key.endswith(f'.{KEY}')]
    in_record = {
        **content,
        'state_dict': {
            **content['state_dict'],
            **dict.fromkeys(records, torch.tensor(list(text), dtype=torch.uint8)),
        },
    }
    in_metadata = {**content, METADATA: {**content[METADATA], 'sensors': definitions}}
    for i, damaged in enumerate((in_record, in_metadata)):
        path = tmp_path / f'{i}.ckpt'
        torch.save(damaged, path)
        with pytest.raises(CheckpointError) as info:
            load_backbone(path)
        assert '\n' not in str(info.value)
    assert dict(SENSORS) == before


def test_a_checkpoint_without_definitions_names_the_unknown_sensor(
    made: tuple[Path, Tensor], tmp_path: Path
) -> None:
    content = torch.load(made[0], weights_only=True)
    state = {k: v for k, v in content['state_dict'].items() if not k.endswith(KEY)}
    torch.save({**content, 'state_dict': state}, tmp_path / 'a.ckpt')
    with pytest.raises(CheckpointError, match='planet'):
        load_backbone(tmp_path / 'a.ckpt')


def test_a_vit_of_the_sensor_brings_the_definition(made: tuple[Path, Tensor]) -> None:
    """The export of one sensor's ViT suffices to build a model for that sensor."""
    path = made[0].with_name('vit.safetensors')
    target = timm.create_model(
        'geofm_vit_tiny_patch16_s2',
        sensors=['dem'],
        in_chans=1,
        **SMALL['model_args'],
        img_size=224,
    )
    assert isinstance(target, MultiSensorViT)
    with pytest.warns(UserWarning, match=r'dem\.elevation start from the mean'):
        load_backbone_weights(target, path)
    assert SENSORS['planet'] == PLANET
