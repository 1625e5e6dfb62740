"""Deployed files compute `load_backbone`'s features from raw values, and describe their inputs."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torchgeo.tasks import Classification

from geofm.commands.export import export
from geofm.deploy import onnx_file
from geofm.deploy.deploy import load_network
from geofm.deploy.network import Network, RawImage
from geofm.deploy.onnx_file import write_onnx
from geofm.deploy.program import EXTRA, trace, write_pt2
from geofm.models import CheckpointError, MultiSensorViT, export_backbone, load_backbone
from geofm.models.checkpoints.files import METADATA
from geofm.models.dates import NO_DATE
from geofm.sensors import Band, Sensor, band_statistics, bands_of, register_sensor
from geofm.transforms.statistics import InputStatistics
from tests.docs_commands import ROOT, run, sections
from tests.models.test_hub import BANDS, STATISTICS, checkpoint
from tests.registry import kept_registry

type Arrays = dict[str, npt.NDArray[Any]]
type Run = Callable[[Arrays], Mapping[str, npt.NDArray[Any]]]

#: The bands of each input, by hand: those of BANDS in the sensors' own order.
INPUTS = {'s1': ('VV', 'VH'), 's2': ('B02', 'B08', 'B11')}

#: A sensor of one's own.
SLOPE = Sensor(
    name='slope',
    title='Slope',
    bands=(Band('slope', 5.0, 4.0),),
    quantity='other',
    unit='degree',
    static=True,
)

#: Batch size, height and width.
SIZES = ((1, 64, 64), (3, 32, 80), (2, 112, 48))


def by_onnxruntime(path: Path) -> tuple[dict[str, Any], Run]:
    """Return metadata and inference function of an ONNX file."""
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    said = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    return said, lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def by_torch_export(path: Path) -> tuple[dict[str, Any], Run]:
    """Return metadata and inference function of a torch.export program."""
    files = {EXTRA: ''}
    module = torch.export.load(path, extra_files=files).module()

    def run(inputs: Arrays) -> Mapping[str, npt.NDArray[Any]]:
        outputs = module({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: output.detach().numpy() for name, output in outputs.items()}

    return json.loads(files[EXTRA]), run


def raw_inputs(
    model: MultiSensorViT, inputs: Mapping[str, tuple[str, ...]], size: tuple[int, int, int]
) -> Arrays:
    """Make raw values with outliers, a sensor missing in sample 0, and nodata in the last."""
    batch, height, width = size
    rng = np.random.default_rng(batch)
    arrays: Arrays = {
        key: rng.normal(0, 5, (batch, len(bands), height, width)).astype(np.float32)
        for key, bands in inputs.items()
    }
    arrays['dates'] = rng.integers(-3652, 21915, (batch, len(model.date_sensors)))
    arrays['dates'][0, 0] = NO_DATE
    arrays[list(inputs)[-1]][-1, 0, 3, 5] = np.nan
    if len(inputs) > 1:
        arrays['present'] = np.ones((batch, len(inputs)), bool)
        arrays['present'][0, batch % len(inputs)] = False
        # Whatever stands for a missing sensor must not matter.
        arrays[list(inputs)[batch % len(inputs)]][0] = np.nan
    return arrays


def expected(
    model: MultiSensorViT, inputs: Mapping[str, tuple[str, ...]], arrays: Arrays
) -> dict[str, Tensor]:
    """Compute outputs of the backbone on images that are normalised here."""
    statistics = model.statistics
    assert statistics is not None
    assert statistics.clip is not None
    channels: dict[str, npt.NDArray[np.float32]] = {}
    present = arrays.get('present', np.ones((len(arrays['dates']), 1), bool))
    for i, (key, bands) in enumerate(inputs.items()):
        for j, band in enumerate(bands):
            channels[band] = np.where(present[:, i, None, None], arrays[key][:, j], 0)
    raw = np.stack([channels[band] for band in model.bands], axis=1)
    # Bands of which the checkpoint has no statistics have their sensor's.
    mean, std = (
        np.array([given.get(b, float(own[i])) for i, b in enumerate(model.bands)])[:, None, None]
        for given, own in zip(
            (statistics.mean, statistics.std), band_statistics(model.bands), strict=True
        )
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
    """Check outputs and metadata of the deployed file of a checkpoint."""
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


def deploy(path: Path, *suffixes: str) -> tuple[Path, ExportedProgram]:
    """Write all formats from one traced program; return the last file and the program."""
    network = load_network(path)
    program = trace(network, path)
    for suffix in suffixes:
        write = write_onnx if suffix == '.onnx' else write_pt2
        assert write(network, program, path.with_suffix(suffix)) <= 1e-4
    return path.with_suffix(suffixes[-1]), program


# Conversions to ONNX take ten seconds each: this one, and those of early fusion and one sensor.
@pytest.mark.parametrize(('kind', 'suffix'), [('linear', '.pt2'), ('xattn', '.onnx')])
def test_fused_backbone(kind: str, suffix: str, tmp_path: Path) -> None:
    args: dict[str, Any] = {'nlayer': 1, 'query': 's2'} if kind == 'xattn' else {}
    path = checkpoint(tmp_path, kind, depth=1, **args)
    file, _ = deploy(path, suffix)
    assert_same(path, file, INPUTS)
    # No file or folder of this machine.
    assert str(ROOT).encode() not in file.read_bytes()


def test_joint_backbone_of_three_sensors(tmp_path: Path) -> None:
    with kept_registry():
        register_sensor(SLOPE)
        sensors = ['s1', 's2', 'slope']
        path = checkpoint(tmp_path, 'joint', [*BANDS, 'slope.slope'], depth=1, sensors=sensors)
        file, _ = deploy(path, '.pt2')
        assert_same(path, file, {**INPUTS, 'slope': ('slope.slope',)})
        said, _ = by_torch_export(file)
    assert Sensor.from_dict(said['sensors']['slope']) == SLOPE
    assert said['input']['bands']['slope.slope'] == {'mean': 5.0, 'std': 4.0, 'unit': 'degree'}


def test_backbone_of_one_sensor_with_weights_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, 's1', ['VH', 'VV'], depth=1)
    # As if the weights were larger than a file of ONNX can be.
    monkeypatch.setattr(onnx_file, 'LARGEST', 0)
    file, program = deploy(path, '.onnx')
    assert {file.name for file in tmp_path.iterdir()} == {
        'last.ckpt',
        'last.onnx',
        'last.onnx.data',
    }
    onnx.checker.check_model(file)
    assert_same(path, file, {'s1': ('VV', 'VH')})
    other = load_network(path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    with pytest.raises(ValueError, match=r'b\.pt2: not written, because its outputs differ'):
        write_pt2(other, program, tmp_path / 'b.pt2')
    assert not list(tmp_path.glob('*.pt2'))


def test_the_page_on_an_early_fused_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bands = list(bands_of(['s1', 's2']))
    path = checkpoint(tmp_path, 'early', bands, depth=1)
    # Tracing takes longest: the page writes both formats, here from one program.
    programs: dict[Path, ExportedProgram] = {}

    def traced(network: Network, checkpoint: Path) -> ExportedProgram:
        if checkpoint not in programs:
            programs[checkpoint] = trace(network, checkpoint)
        return programs[checkpoint]

    monkeypatch.setattr(importlib.import_module('geofm.deploy.deploy'), 'trace', traced)
    page = (ROOT / 'docs' / 'models.md').read_text()
    for line in sections(page)['Deploying']:
        if not line.startswith('pip'):
            run(line)
    text = page[page.index('## Deploying') :]
    (printed,) = re.findall(r'```text\n(.*?)```', text, re.DOTALL)
    *shown, difference = printed.splitlines()
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(shown)] == shown
    # The last line has a figure that depends on the weights.
    assert difference.startswith('largest difference from PyTorch: ')
    assert lines[len(shown)].startswith('largest difference from PyTorch: ')
    names: dict[str, Any] = {}
    for snippet in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        exec(compile(snippet, 'models.md', 'exec'), names)
    for name, output in names['outputs'].items():
        np.testing.assert_allclose(output.detach(), names[name], atol=1e-4)
    assert_same(path, tmp_path / 'backbone.onnx', {'s1': tuple(bands[:2]), 's2': tuple(bands[2:])})


def test_a_fine_tuned_task(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 'linear', depth=1)
    export_backbone(path, tmp_path / 'weights.ckpt', 'torchgeo')
    task = Classification(
        'geofm_vit_nano_patch16_linear',
        weights=str(tmp_path / 'weights.ckpt'),
        in_channels=len(BANDS),
        num_classes=3,
        labels=['field', 'forest', 'water'],
    ).eval()
    tuned = tmp_path / 'tuned.ckpt'
    content = {'hyper_parameters': dict(task.hparams), 'state_dict': task.state_dict()}
    torch.save(content | {METADATA: {'input': STATISTICS.entry()}}, tuned)
    file, _ = deploy(tuned, '.pt2')
    said, predict = by_torch_export(file)
    assert {key: tuple(bands) for key, bands in said['inputs'].items()} == INPUTS
    assert [entry['name'] for entry in said['classes']] == ['field', 'forest', 'water']
    arrays = raw_inputs(load_backbone(path), INPUTS, (1, 64, 96))
    del arrays['dates'], arrays['present']
    values = np.concatenate([np.nan_to_num(arrays[key]) for key in INPUTS], axis=1)
    order = [[*INPUTS['s1'], *INPUTS['s2']].index(band) for band in BANDS]
    mean = np.array([STATISTICS.mean[band] for band in BANDS])[:, None, None]
    image = ((values[:, order] - mean) / 2).clip(-4, 4).astype(np.float32)
    found = predict({key: np.nan_to_num(arrays[key]) for key in INPUTS})['logits']
    with torch.no_grad():
        np.testing.assert_allclose(found, task(torch.from_numpy(image)), atol=1e-4)


def test_what_cannot_be_deployed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, 's1', ['VH', 'VV'], depth=1)
    with pytest.raises(ValueError, match=r'a\.onnx: name it \.pt2'):
        export(path, tmp_path / 'a.onnx', 'pt2')
    with pytest.raises(ValueError, match='takes neither --sensor nor --license'):
        export(path, tmp_path / 'a.onnx', 'onnx', license='mit')
    with kept_registry():
        register_sensor(replace(SLOPE, name='dates'))
        with pytest.raises(ValueError, match="rename the sensor 'dates'"):
            RawImage(['dates.slope'], None)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, 'geofm.deploy.onnx_file')
        patch.setitem(sys.modules, 'onnxruntime', None)
        with pytest.raises(ModuleNotFoundError, match=r"onnxruntime: pip install 'geofm\[onnx\]'"):
            export(path, tmp_path / 'a.onnx', 'onnx')


class OfOneSize(Network):
    """Network that branches on values, or supports one size only."""

    outputs, multiple, smallest = ('sum',), 16, 32

    def __init__(self, branches: bool) -> None:
        super().__init__(['VV', 'VH'], None)
        self.branches = branches

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        image = self.image(inputs)
        if self.branches and image.sum() > 0:
            image = -image
        return {'sum': image.sum(dim=(2, 3))}


def test_a_network_that_is_not_traced_for_all_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'x\.ckpt: the network cannot be traced'):
        trace(OfOneSize(branches=True), Path('x.ckpt'))
    network = OfOneSize(branches=False)
    inputs = {'s1': torch.zeros(2, 2, 64, 96)}
    program = torch.export.export(network, (inputs,))
    with pytest.raises(ValueError, match=r'a\.pt2: not written, .* does not run on 1 image of 32'):
        write_pt2(network, program, tmp_path / 'a.pt2')
    assert not list(tmp_path.iterdir())
