"""Deployed files compute what `load_backbone` does, from raw values, and say what they take."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torchgeo.tasks import Classification

from geofm.commands.export import export
from geofm.deploy import onnx_file
from geofm.deploy.deploy import load_network
from geofm.deploy.network import BackboneNetwork, Network, RawImage
from geofm.deploy.onnx_file import write_onnx
from geofm.deploy.program import trace
from geofm.deploy.pt2_file import EXTRA, write_pt2
from geofm.models import CheckpointError, MultiSensorViT, export_backbone, load_backbone
from geofm.models.dates import NO_DATE
from geofm.models.weights.files import METADATA
from geofm.sensors import Band, Sensor, check_bands, register_sensor
from geofm.transforms.statistics import InputStatistics
from tests.models.test_hub import BANDS, STATISTICS, checkpoint
from tests.registry import kept_registry

type Arrays = dict[str, npt.NDArray[Any]]
type Run = Callable[[Arrays], Mapping[str, npt.NDArray[Any]]]

#: The bands of each input, by hand: those of BANDS in the sensors' own order.
INPUTS = {'s1': ('VV', 'VH'), 's2': ('B02', 'B08', 'B11')}

#: Batch size, height and width.
SIZES = ((1, 64, 64), (3, 32, 80), (2, 112, 48))


def by_onnxruntime(path: Path) -> tuple[dict[str, Any], Run]:
    """What an ONNX file says and computes."""
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    said = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    return said, lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def by_torch_export(path: Path) -> tuple[dict[str, Any], Run]:
    """What a program of torch.export says and computes."""
    files = {EXTRA: ''}
    module = torch.export.load(path, extra_files=files).module()

    def run(inputs: Arrays) -> Mapping[str, npt.NDArray[Any]]:
        outputs = module({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: output.detach().numpy() for name, output in outputs.items()}

    return json.loads(files[EXTRA]), run


def raw_inputs(
    model: MultiSensorViT, inputs: Mapping[str, tuple[str, ...]], size: tuple[int, int, int]
) -> Arrays:
    """Raw values, outliers among them; in sample 0 a sensor is missing, in the last one a pixel."""
    batch, height, width = size
    rng = np.random.default_rng(batch)
    arrays: Arrays = {
        key: rng.normal(0, 5, (batch, len(bands), height, width)).astype(np.float32)
        for key, bands in inputs.items()
    }
    arrays['dates'] = rng.integers(-3652, 21915, (batch, len(model.date_sensors)))
    arrays['dates'][0, 0] = NO_DATE
    arrays[next(reversed(inputs))][-1, 0, 3, 5] = np.nan
    if len(inputs) > 1:
        arrays['present'] = np.ones((batch, len(inputs)), bool)
        arrays['present'][0, batch % len(inputs)] = False
        # Whatever stands for a missing sensor must not matter.
        arrays[list(inputs)[batch % len(inputs)]][0] = np.nan
    return arrays


def expected(
    model: MultiSensorViT, inputs: Mapping[str, tuple[str, ...]], arrays: Arrays
) -> dict[str, Tensor]:
    """Outputs of the backbone on images that are normalised here."""
    statistics = model.statistics
    assert statistics is not None
    assert statistics.clip is not None
    channels: dict[str, npt.NDArray[np.float32]] = {}
    present = arrays.get('present', np.ones((len(arrays['dates']), 1), bool))
    for i, (key, bands) in enumerate(inputs.items()):
        for j, band in enumerate(bands):
            channels[band] = np.where(present[:, i, None, None], arrays[key][:, j], 0)
    raw = np.stack([channels[band] for band in model.bands], axis=1)
    mean, std = (
        np.array([values[band] for band in model.bands])[:, None, None]
        for values in (statistics.mean, statistics.std)
    )
    image = ((raw - mean) / std).clip(-statistics.clip, statistics.clip)
    image = np.where(np.isnan(raw).any(axis=1, keepdims=True), 0, image)
    x, dates = torch.from_numpy(image.astype(np.float32)), torch.from_numpy(arrays['dates'])
    here = torch.from_numpy(arrays['present']) if 'present' in arrays else None
    with torch.no_grad():
        tokens = model.forward_features(x, dates, present=here)
        features = model(x, dates, here)
    grid = (x.shape[2] // model.patch_size, x.shape[3] // model.patch_size)
    patches = tokens[:, model.num_prefix_tokens :].mT.unflatten(2, grid)
    return {'features': features, 'patches': patches}


def assert_same(path: Path, file: Path, inputs: Mapping[str, tuple[str, ...]]) -> None:
    """A deployed file of a checkpoint gives its tokens, and says what it takes."""
    model = load_backbone(path)
    assert model.statistics is not None
    said, run = (by_onnxruntime if file.suffix == '.onnx' else by_torch_export)(file)
    for size in SIZES:
        arrays = raw_inputs(model, inputs, size)
        outputs = run(arrays)
        for name, want in expected(model, inputs, arrays).items():
            np.testing.assert_allclose(outputs[name], want, rtol=0, atol=1e-4)
    described = {key: tuple(said['inputs'][key]) for key in inputs}
    assert described == inputs
    assert said['inputs'].get('present', list(inputs)) == list(inputs)
    assert tuple(said['inputs']['dates']) == model.date_sensors
    statistics = InputStatistics.from_entry(said['input'])
    assert statistics.clip == model.statistics.clip
    assert not statistics.differs(model.statistics)
    assert {Sensor.from_dict(entry).name for entry in said['sensors'].values()} == set(inputs)


def deploy_both(path: Path) -> tuple[Path, Path]:
    """Both files of a checkpoint, of one traced program."""
    network = load_network(path)
    program = trace(network, path)
    files = path.with_suffix('.onnx'), path.with_suffix('.pt2')
    assert write_onnx(network, program, files[0]) <= 1e-4
    assert write_pt2(network, program, files[1]) <= 1e-4
    return files


@pytest.mark.parametrize('kind', ['linear', 'xattn'])
def test_fused_backbone(kind: str, tmp_path: Path) -> None:
    args = {'nlayer': 2, 'query': 's2'} if kind == 'xattn' else {}
    path = checkpoint(tmp_path, kind, depth=1, **args)
    for file in deploy_both(path):
        assert_same(path, file, INPUTS)
        # No file or folder of this machine.
        assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()


def test_joint_backbone_of_three_sensors(tmp_path: Path) -> None:
    with kept_registry():
        slope = Sensor(
            name='slope', title='Slope', bands=(Band('slope', 5.0, 4.0),), quantity='other',
            unit='degree', static=True,
        )  # fmt: skip
        register_sensor(slope)
        bands = [*BANDS, 'slope.slope']
        path = checkpoint(tmp_path, 'joint', bands, depth=1, sensors=['s1', 's2', 'slope'])
        file, _ = deploy_both(path)
        assert_same(path, file, {**INPUTS, 'slope': ('slope.slope',)})
        said, _ = by_onnxruntime(file)
        assert Sensor.from_dict(said['sensors']['slope']) == slope


def test_backbone_of_one_sensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, 's1', ['VH', 'VV'], depth=1)
    network = load_network(path)
    program = trace(network, path)
    # As if the weights were larger than a file of ONNX can be.
    monkeypatch.setattr(onnx_file, 'LARGEST', 0)
    write_onnx(network, program, tmp_path / 'a.onnx')
    assert {file.name for file in tmp_path.iterdir()} == {'last.ckpt', 'a.onnx', 'a.onnx.data'}
    onnx.checker.check_model(tmp_path / 'a.onnx')
    assert_same(path, tmp_path / 'a.onnx', {'s1': ('VV', 'VH')})
    # A network that is not the one that was traced.
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    before = (tmp_path / 'a.onnx').read_bytes()
    for write in (write_onnx, write_pt2):
        with pytest.raises(ValueError, match=r'a\.onnx: not written, as its outputs differ'):
            write(network, program, tmp_path / 'a.onnx')
    assert (tmp_path / 'a.onnx').read_bytes() == before
