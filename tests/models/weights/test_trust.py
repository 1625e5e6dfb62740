"""Untrusted files cause no network access, no excessive memory, and no traceback."""

import json
import pickle
import random
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _builder, _factory, _hub
from torchgeo.tasks import Classification

from geofm.cli import main
from geofm.models import (
    CheckpointError,
    export_backbone,
    load_backbone,
    load_backbone_weights,
    read_hparams,
    read_task_weights,
)
from geofm.models.checkpoints.files import read_file
from geofm.models.timm_vit import load_model
from geofm.sensors import BANDS
from geofm.tasks import DINOv2
from geofm.tasks.nonfinite import DumpError, replay

SMALL: dict[str, Any] = {'embed_dim': 16, 'depth': 1, 'num_heads': 2, 'img_size': 32}
NAME = 'geofm_vit_tiny_patch16_linear'
HPARAMS: dict[str, Any] = {
    'model': NAME,
    'in_channels': 15,
    'bands': list(BANDS),
    'model_args': SMALL,
}


@pytest.fixture(scope='module')
def state() -> dict[str, Any]:
    model = timm.create_model(NAME, in_chans=15, **SMALL)
    return {f'model.{key}': value for key, value in model.state_dict().items()}


@pytest.fixture
def no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on network access, subprocesses, and models from other files."""

    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f'called out: {args}')

    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', refuse)
    for module, name in (
        (_factory, 'load_model_config_from_hf'),
        (_factory, 'load_model_config_from_path'),
        (_factory, 'load_checkpoint'),
        (_builder, 'load_pretrained'),
        (_hub, 'hf_hub_download'),
    ):
        monkeypatch.setattr(module, name, refuse, raising=False)


def write(folder: Path, state: Any, hparams: Any = HPARAMS, name: str = 'a.ckpt') -> Path:
    torch.save({'state_dict': state, 'hyper_parameters': hparams}, folder / name)
    return folder / name


def one_line(error: pytest.ExceptionInfo[BaseException], path: Path) -> None:
    text = str(error.value)
    assert path.name in text
    assert '\n' not in text
    assert '\x1b' not in text


CALLING: dict[str, dict[str, Any]] = {
    'hub': {'model': 'hf-hub:someone/something'},
    'folder': {'model': 'local-dir:/tmp/model'},
    'path': {'model': '../model'},
    'url': {'model_args': {**SMALL, 'pretrained_cfg': {'url': 'http://127.0.0.1:9/a.pth'}}},
    'pretrained': {'model_args': {**SMALL, 'pretrained': True}},
    'overlay': {'model_args': {**SMALL, 'pretrained_cfg_overlay': {'hf_hub_id': 'a/b'}}},
    'checkpoint': {'model_args': {**SMALL, 'checkpoint_path': '/etc/passwd'}},
    'cache': {'model_args': {**SMALL, 'cache_dir': '/tmp'}},
    'features': {'model_args': {**SMALL, 'features_only': True}},
    'nested': {'model_args': {**SMALL, 'img_size': {'url': 'x'}}},
    'other model': {'model': 'resnet18'},
}


@pytest.mark.usefixtures('no_calls')
@pytest.mark.parametrize('kind', CALLING)
def test_a_checkpoint_cannot_make_it_call_out(kind: str, state: Any, tmp_path: Path) -> None:
    hparams = {**HPARAMS, **CALLING[kind]}
    path = write(tmp_path, state, hparams)
    exported = tmp_path / 'a.safetensors'
    bare = {key.removeprefix('model.'): value for key, value in state.items()}
    save_file(bare, exported, {'geofm': json.dumps({'hyper_parameters': hparams})})
    fresh: Any = timm.create_model(NAME, **SMALL)
    doors: tuple[Callable[[Path], Any], ...] = (
        load_backbone,
        load_model,
        read_hparams,
        lambda file: export_backbone(file, tmp_path / 'out.pth', 'timm', 's2'),
        lambda file: load_backbone_weights(fresh, file),
        lambda file: load_backbone_weights(fresh, {'s2': str(file)}),
    )
    for file in (path, exported):
        for door in doors:
            with pytest.raises(CheckpointError) as error:
                door(file)
            one_line(error, file)


@pytest.mark.usefixtures('no_calls')
@pytest.mark.parametrize('name', ['hf-hub:a/b', 'tu-hf-hub:a/b', 'hf_hub:a/b', 'a/b', 'vit_tiyn'])
@pytest.mark.parametrize('key', ['model', 'backbone'])
def test_nor_can_the_checkpoint_of_torchgeos_tasks(key: str, name: str, tmp_path: Path) -> None:
    prefix = 'model.' if key == 'model' else 'model.encoder.model.'
    hparams = {key: name, 'in_channels': 3}
    path = write(tmp_path, {f'{prefix}patch_embed.proj.weight': torch.zeros(1)}, hparams)
    with pytest.raises(CheckpointError, match='no model is called') as error:
        load_model(path, bands=['B04', 'B03', 'B02'])
    one_line(error, path)


@pytest.mark.usefixtures('no_calls')
@pytest.mark.parametrize(
    'config',
    [
        {'architecture': 'hf-hub:a/b'},
        {'architecture': 'vit_tiny_patch16_224', 'model_args': {'pretrained': True}},
        {'architecture': 'vit_tiny_patch16_224', 'model_args': {'pretrained_cfg': {'url': 'x'}}},
        {'architecture': 'vit_tiny_patch16_224', 'model_args': ['depth']},
        {'architecture': ['vit_tiny_patch16_224']},
        {},
        [],
    ],
)
def test_nor_can_a_folder_that_it_names(config: Any, tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text(json.dumps(config))
    state = {'model.patch_embed.proj.weight': torch.zeros(1)}
    path = write(tmp_path, state, {'model': f'local-dir:{tmp_path}', 'in_channels': 3})
    with pytest.raises(CheckpointError, match=r'config\.json: cannot be used') as error:
        load_model(path, bands=['B04', 'B03', 'B02'])
    one_line(error, path)


def test_a_folder_s_plain_arguments_are_taken(tmp_path: Path) -> None:
    args: dict[str, Any] = {'img_size': 32, 'embed_dim': 16, 'depth': 1, 'num_heads': 2}
    config = {'architecture': 'vit_tiny_patch16_224', 'model_args': args}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=0, **args)
    state = {f'model.{key}': value for key, value in vit.state_dict().items()}
    path = write(tmp_path, state, {'model': f'local-dir:{tmp_path}', 'in_channels': 3})
    assert load_model(path, bands=['B04', 'B03', 'B02']).depth == 1


@pytest.mark.usefixtures('no_calls')
def test_the_dump_of_a_step_names_no_other_files(tmp_path: Path) -> None:
    content: dict[str, Any] = {'hyper_parameters': {}, 'state_dict': {}, 'statistics': None}
    weights = 'ViTSmall16_Weights.SENTINEL2_ALL_DINO'
    for hparams in ({'model': 'hf-hub:a/b'}, {'model': 'geofm_vit_nano_patch16_s2', 'weight': 1}):
        torch.save({**content, 'hyper_parameters': {**hparams, 'weights': weights}}, tmp_path / 'd')
        with pytest.raises(DumpError) as error:
            replay(tmp_path / 'd')
        one_line(error, tmp_path / 'd')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model': 'geofm_vit_tiny_patch16_liner'}, f"did you mean '{NAME}'"),
        ({'model_args': {'reg_token': 4}}, "did you mean 'reg_tokens'"),
        ({'model': 5}, 'name of its model is of type int'),
        ({'bands': 'B02'}, 'bands is of type str'),
        ({'bands': [1, 2]}, 'unknown bands'),
        ({'bands': ['B02', 'BXX']}, 'unknown bands'),
        ({'bands': ['B02', 'B02']}, 'given twice'),
        ({'bands': ['B02']}, 'describe no model: in_chans=15'),
        ({'in_channels': '15'}, 'in_channels'),
        ({'in_channels': True}, 'in_channels'),
        ({'in_channels': 4, 'bands': None}, 'do not fit'),
        ({'model_args': [1]}, 'model_args is of type list'),
        ({'model_args': {**SMALL, 'depth': '1'}}, "depth has the invalid value '1'"),
        ({'model_args': {**SMALL, 'depth': 10**9}}, 'depth has the invalid value 1000000000'),
        ({'model_args': {**SMALL, 'embed_dim': 10**9}}, 'embed_dim has the invalid'),
        ({'model_args': {**SMALL, 'embed_dim': 16_000}}, 'do not fit'),
        ({'model_args': {**SMALL, 'depth': 100}}, 'describes 100 blocks, but holds weights of 1'),
        ({'model_args': {**SMALL, 'num_heads': 3}}, 'describe no model'),
        ({'model_args': {**SMALL, 'drop_rate': float('nan')}}, 'drop_rate has the invalid value'),
        ({'model_args': {**SMALL, 'act_layer': 'no_such'}}, 'describe no model'),
    ],
)
def test_wrong_hyperparameters(
    change: dict[str, Any], message: str, state: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, state, {**HPARAMS, **change})
    with pytest.raises(CheckpointError) as error:
        load_backbone(path)
    assert message in str(error.value)
    one_line(error, path)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ('run',)


def malformed(folder: Path, state: dict[str, Any]) -> dict[str, Path]:
    """Write files that are no valid checkpoints, each for another reason."""
    good = write(folder, state, name='good.ckpt').read_bytes()
    name = 'model.encoders.s2.norm.weight'
    contents: dict[str, Any] = {
        'no mapping': [1, 2],
        'state no mapping': {'state_dict': [1], 'hyper_parameters': HPARAMS},
        'hparams no mapping': {'state_dict': state, 'hyper_parameters': [1]},
        'no state': {'hyper_parameters': HPARAMS},
        'no hparams': {'state_dict': state},
        'empty state': {'state_dict': {}, 'hyper_parameters': HPARAMS},
        'weight no tensor': {'state_dict': {**state, name: 1}, 'hyper_parameters': HPARAMS},
        'weight missing': {
            'state_dict': {key: value for key, value in state.items() if key != name},
            'hyper_parameters': HPARAMS,
        },
        'weight too many': {
            'state_dict': {**state, 'model.\x1b[31m\n': torch.zeros(1)},
            'hyper_parameters': HPARAMS,
        },
        'shape': {'state_dict': {**state, name: torch.zeros(3)}, 'hyper_parameters': HPARAMS},
        'huge': {
            'state_dict': {**state, name: torch.zeros(1).expand(10**6, 10**6)},
            'hyper_parameters': HPARAMS,
        },
        'sparse': {
            'state_dict': {**state, name: torch.zeros(16).to_sparse()},
            'hyper_parameters': HPARAMS,
        },
        'class': {'state_dict': state, 'hyper_parameters': HPARAMS, 'x': Harmful()},
    }
    texts: dict[str, bytes] = {
        'empty': b'',
        'text': b'not a checkpoint\n',
        'cut off': good[: len(good) // 2],
        'cut off early': good[:100],
        'pickle': pickle.dumps({'x': Harmful()}),
        'json': b'{"state_dict": {}}',
        'safetensors cut off': b'\xff\x00\x00\x00\x00\x00\x00\x00{"a":',
    }
    files = {}
    for i, (kind, content) in enumerate(contents.items()):
        files[kind] = folder / f'content{i}.ckpt'
        torch.save(content, files[kind])
    for i, (kind, text) in enumerate(texts.items()):
        files[kind] = folder / f'text{i}.ckpt'
        files[kind].write_bytes(text)
    bare = {key.removeprefix('model.'): value for key, value in state.items()}
    for i, said in enumerate(('{not json', '[1]', '{"hyper_parameters": 5}', '{"bands": 1}')):
        files[f'metadata {said}'] = folder / f'said{i}.safetensors'
        save_file(bare, files[f'metadata {said}'], {'geofm': said})
    return files


def test_malformed_files_take_one_line(
    state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = malformed(tmp_path, state)
    files['folder'] = tmp_path
    for kind, path in files.items():
        for door in (load_backbone, load_model, read_hparams):
            if door is read_hparams and ('weight' in kind or kind == 'shape'):
                continue
            with pytest.raises(CheckpointError) as error:
                door(path)
            one_line(error, path)
        with pytest.raises(SystemExit) as ended:
            main(['export', str(path), str(tmp_path / 'out.pth'), '--to', 'dinov2'])
        text = f'{ended.value}{capsys.readouterr().err}'.strip()
        assert path.name in text, kind
        assert len(text.splitlines()) == 1, kind
    assert 'print' in _message(files['class'])
    assert 'empty' in _message(files['empty'])


def _message(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_file(path)
    return str(error.value)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_weights_that_are_not_finite_are_refused(value: float, state: Any, tmp_path: Path) -> None:
    name = 'model.encoders.s2.norm.weight'
    weights = state[name].clone()
    weights[3] = value
    path = write(tmp_path, {**state, name: weights})
    bare = {key.removeprefix('model.'): v for key, v in {**state, name: weights}.items()}
    save_file(bare, tmp_path / 'vit.safetensors')
    fresh: Any = timm.create_model(NAME, in_chans=15, **SMALL)
    doors: dict[str, Callable[[], Any]] = {
        'a.ckpt': lambda: load_backbone(path),
        'whole': lambda: load_backbone_weights(fresh, path),
        'sensor': lambda: load_backbone_weights(fresh, {'s2': str(path)}),
        'export': lambda: export_backbone(path, tmp_path / 'out.ckpt', 'torchgeo'),
        'task': lambda: read_task_weights(path, {}),
        'named': lambda: load_model(tmp_path / 'vit.safetensors', NAME),
        'torchgeo': lambda: fresh.load_state_dict(bare),
    }
    for door, load in doors.items():
        with pytest.raises(CheckpointError, match='NaN or infinity'):
            load()
        assert door


def test_nor_are_those_of_a_fine_tuned_vit(tmp_path: Path) -> None:
    task = Classification('resnet18', None, in_channels=3, num_classes=2)
    state = task.state_dict()
    state['model.conv1.weight'] = state['model.conv1.weight'].fill_(float('nan'))
    path = write(tmp_path, state, dict(task.hparams))
    with pytest.raises(CheckpointError, match='NaN or infinity'):
        load_model(path, bands=['B04', 'B03', 'B02'])


def test_what_a_user_asks_for_is_checked_alike() -> None:
    with pytest.raises(ValueError, match=r"reg_token.*did you mean 'reg_tokens'"):
        DINOv2(NAME, model_args={**SMALL, 'reg_token': 2})


# -- mutations ------------------------------------------------------------------------------------

#: What a mutation puts in the place of a value.
_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, 1.5, float('nan'), '', 'geofm_vit_tiny_patch16_xattn', [], ['B02'],
    [[1]], {}, {'a': 1}, b'bytes', torch.zeros(2), torch.tensor(float('nan')),
)  # fmt: skip


def _mutate_content(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Copy content and drop, replace or rename a random value."""
    content = dict(content)
    key = rng.choice(sorted(content, key=str))
    if isinstance(content[key], dict) and content[key] and rng.random() < 0.85:
        content[key] = _mutate_content(content[key], rng)
        return content
    match rng.randrange(4):
        case 0:
            del content[key]
        case 1:
            content[f'{key}x'] = content.pop(key)
        case 2 if isinstance(content[key], torch.Tensor):
            tensor = content[key]
            content[key] = rng.choice(
                (tensor.long(), tensor.half(), tensor[None], tensor.flatten()[:1], tensor * 1e38)
            )
        case _:
            content[key] = rng.choice(_ODD)
    return content


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    # Most bytes are weights; what is said of them stands at the two ends.
    ends = [*range(1500), *range(len(data) - 1500, len(data))]
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.choice(ends) if rng.random() < 0.8 else rng.randrange(len(data))
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_mutated_checkpoints_raise_one_kind_of_error(tmp_path: Path) -> None:
    """200 files of both formats, with changed keys and types, flipped bytes, or truncated."""
    rng = random.Random(0)
    bands = ['B04', 'B03', 'B02']
    name = 'geofm_vit_tiny_patch16_s2'
    model = timm.create_model(name, in_chans=3, bands=bands, **SMALL)
    content = {
        'state_dict': {f'model.{key}': value for key, value in model.state_dict().items()},
        'hyper_parameters': {**HPARAMS, 'model': name, 'in_channels': 3, 'bands': bands},
        'geofm': {'input': {'bands': {'B02': {'mean': 1.0, 'std': 2.0, 'unit': 'DN'}}}},
    }
    torch.save(content, tmp_path / 'good.ckpt')
    good = (tmp_path / 'good.ckpt').read_bytes()
    safe = export_backbone(tmp_path / 'good.ckpt', tmp_path / 'good.safetensors').path.read_bytes()
    refused: dict[str, str] = {}
    for i in range(200):
        path = tmp_path / f'{i}.ckpt'
        if i % 2:
            torch.save(_mutate_content(content, rng), path)
        else:
            path.write_bytes(_mutate_bytes(safe if i % 4 else good, rng))
        # The second reads the checkpoints of TorchGeo's tasks too, as the command line does.
        door = load_model if rng.random() < 0.8 else load_backbone
        try:
            door(path)
        except CheckpointError as error:
            refused[path.name] = str(error)
        path.unlink()
    assert 100 < len(refused) < 200
    assert all(name in text and text.isprintable() for name, text in refused.items())
