"""The examples of CONTRIBUTING.md."""

import re
import runpy
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import timm
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rasterio.transform import from_origin

from geofm.cli import main
from geofm.models import create_backbone, load_backbone
from geofm.models.fusion import FUSIONS
from tests.registry import kept_registry
from tests.tasks.test_dinov2 import SMALL

ROOT = Path(__file__).resolve().parents[1]

#: Arguments that only DINOv2 has.
DINOV2 = (
    *('prototypes', 'head_hidden_dim', 'head_bottleneck_dim'),
    'warmup_teacher_temperature_epochs',
)

SHORT = [
    *('--trainer.max_steps=1', '--trainer.limit_val_batches=0', '--trainer.accelerator=cpu'),
    *('--trainer.enable_progress_bar=false', '--trainer.logger=false'),
]


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of CONTRIBUTING.md, in the import path."""
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    for name, content in re.findall(
        r'^`(\S+)`:\n\n```\w+\n(.*?)```', text, re.DOTALL | re.MULTILINE
    ):
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sensor_a_layout_and_a_method_are_one_file_each(examples: Path) -> None:
    profile = {'driver': 'GTiff', 'width': 48, 'height': 48, 'count': 1, 'dtype': 'float32'}
    transform = from_origin(500_000, 5_000_000, 10, 10)
    values = np.random.default_rng(0).normal(290, 12, (8, 1, 48, 48)).astype('float32')
    (examples / 'data').mkdir()
    for i, pixels in enumerate(values):
        path = examples / 'data' / f'place{i}_20250601.tif'
        with rasterio.open(path, 'w', **profile, crs='EPSG:32633', transform=transform) as file:
            file.write(pixels)
    model = {k: v for k, v in SMALL.items() if k not in DINOV2}
    model |= {'model_args': {**SMALL['model_args'], 'sensors': ['thermal']}, 'in_channels': 1}
    table = {'table': 'table.parquet', 'sensors': ['thermal'], 'window_size': 48, 'batch_size': 2}
    config = {
        'model': {'class_path': 'agree.Agree', 'init_args': model},
        'data': {'class_path': 'geofm.datamodules.RasterArchiveDataModule', 'init_args': table},
    }
    Path('run.yaml').write_text(yaml.safe_dump(config))
    sensors = ['--sensors', 'thermal.yaml']
    layout = ['--layout', 'thermal_layout.yaml']
    with kept_registry():
        main(['index', 'data', *layout, *sensors, '--output', 'table.parquet'])
        main(['fit', '--config', 'run.yaml', *sensors, *SHORT])
        (checkpoint,) = examples.rglob('*.ckpt')
        backbone = load_backbone(checkpoint)
    assert backbone.bands == ('thermal.temperature',)
    content = torch.load(checkpoint, weights_only=True)
    assert content['global_step'] == 1
    assert 'heads.projection.weight' in content['state_dict']


def test_a_fusion_is_one_module(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSIONS, 'mean', FUSIONS['linear'])
    runpy.run_path(str(examples / 'mean_fusion.py'))
    small: dict[str, Any] = {'depth': 1, 'embed_dim': 24, 'num_heads': 2}
    name = 'geofm_vit_tiny_patch16_linear'
    model: Any = timm.create_model(name, in_chans=15, fusion='mean', **small).eval()
    assert type(model.fusion).__name__ == 'MeanFusion'
    images = torch.randn(2, 15, 32, 32)
    tokens = [
        model.encoders[key].forward_features(images[:, part])
        for key, part in (('s1', slice(2)), ('s2', slice(2, None)))
    ]
    fused = model.fusion.projection((tokens[0] + tokens[1]) / 2)
    torch.testing.assert_close(model.forward_features(images), fused)
    # Checkpoints may name it, too.
    args = {'fusion': 'mean', **small}
    described = {'model': name, 'in_channels': 15, 'bands': None, 'model_args': args}
    assert type(create_backbone(described).fusion).__name__ == 'MeanFusion'


def test_a_benchmark_set_is_one_file(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='0'):
        main(['benchmark', '--config', 'clouds.yaml', '--print_config'])
    printed = yaml.safe_load(capsys.readouterr().out)
    wrapped = printed['data']['init_args']['datamodule']
    assert wrapped['class_path'].endswith('CloudCoverDetectionDataModule')


def pinned() -> dict[str, str]:
    """Return the tested version of each distribution."""
    lines = (ROOT / '.ci' / 'constraints.txt').read_text().splitlines()
    return {canonicalize_name(name): pin for name, _, pin in (x.partition('==') for x in lines)}


def test_pinned_versions_are_compatible() -> None:
    pins = pinned()
    conflicts = [
        f'{distribution.name} requires {requirement}, and {pins[name]} is pinned'
        for distribution in metadata.distributions()
        if pins.get(canonicalize_name(distribution.name)) == distribution.version
        for requirement in map(Requirement, distribution.requires or ())
        if (requirement.marker is None or requirement.marker.evaluate({'extra': ''}))
        and (name := canonicalize_name(requirement.name)) in pins
        and not requirement.specifier.contains(pins[name], prereleases=True)
    ]
    assert not conflicts, '\n'.join(conflicts)


def test_lower_bounds_are_not_above_the_tested_versions() -> None:
    pins = pinned()
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    extras = project['project']['optional-dependencies']
    groups = [project['project']['dependencies'], *extras.values()]
    groups += project['dependency-groups'].values()
    wanted = [Requirement(entry) for group in groups for entry in group]
    for requirement in wanted:
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f'{requirement}: {pin} is tested'
    assert len(wanted) > 30
