"""timm and geofm load the same tokens from a hub folder, and its card has no injected markup."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from geofm.commands.export import export
from geofm.models import create_backbone, load_backbone
from geofm.models.checkpoints import files
from geofm.models.checkpoints.files import METADATA, CheckpointError
from geofm.models.checkpoints.model_file import ModelFile
from geofm.models.dates import NO_DATE
from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.hub import escape
from geofm.sensors import SENSORS
from geofm.transforms.statistics import InputStatistics
from tests.models.weights.vits import SMALL, randomise

BANDS = ['B08', 'VV', 'B02', 'VH', 'B11']
STATISTICS = InputStatistics(
    {band: float(i) for i, band in enumerate(BANDS)}, dict.fromkeys(BANDS, 2.0), 4.0
)


def checkpoint(folder: Path, kind: str, bands: list[str] = BANDS, **args: Any) -> Path:
    """Write a checkpoint in the layout of `geofm fit`, with statistics and malicious texts."""
    hparams = {
        'model': f'geofm_vit_nano_patch16_{kind}',
        'in_channels': len(bands),
        'bands': bands,
        'model_args': {**SMALL, 'img_size': 64, 'reg_tokens': 2, **args},
        'lr': 4e-3,
        'weights': '/home/someone/secret.pth',
    }
    backbone = create_backbone(hparams)
    randomise(backbone)
    content = {
        'state_dict': {f'model.{k}': v for k, v in backbone.state_dict().items()},
        'hyper_parameters': hparams,
        'epoch': 3,
        'callbacks': {
            'x': {
                'monitor': 'val | <script>alert(1)</script>',
                'best_model_score': torch.tensor(0.5),
            }
        },
        METADATA: {'input': STATISTICS.entry()},
    }
    torch.save(content, folder / 'last.ckpt')
    return folder / 'last.ckpt'


@pytest.mark.parametrize('kind', ['linear', 'xattn', 'early', 'joint', next(iter(SENSORS))])
def test_timm_and_we_load_the_same_tokens(kind: str, tmp_path: Path) -> None:
    bands = BANDS if kind not in SENSORS else ['VH', 'VV']
    path = checkpoint(tmp_path, kind, bands)
    export(path, tmp_path / 'hub', 'hub', license='cc-by-4.0')
    model = load_backbone(path)
    by_timm: Any = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    ours = load_backbone(tmp_path / 'hub')
    images = torch.randn(2, len(bands), 32, 48)
    present = torch.tensor([[True, False], [False, True]])[:, : len(model.sensors)]
    dates = torch.tensor([[17590, NO_DATE], [17586, 17800]])
    for loaded in (by_timm, ours):
        assert isinstance(loaded, MultiSensorViT)
        assert loaded.bands == tuple(bands)
        assert loaded.statistics == STATISTICS
        with torch.no_grad():
            for args in ((images,), (images, dates), (images, dates, None, present)):
                assert torch.equal(loaded.forward_features(*args), model.forward_features(*args))


def test_timm_gives_the_model_a_head(tmp_path: Path) -> None:
    export(checkpoint(tmp_path, 'linear'), tmp_path / 'hub', 'hub')
    model = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True, num_classes=7)
    assert model(torch.zeros(1, 5, 32, 32)).shape == (1, 7)


def test_card_states_what_the_checkpoint_says(tmp_path: Path) -> None:
    export(checkpoint(tmp_path, 'linear'), tmp_path / 'hub', 'hub', license='cc-by-4.0')
    card = (tmp_path / 'hub' / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: timm\nlicense: cc-by-4.0\n')
    assert '| 0 | B08 | ' in card
    assert '| lr | 0.004 |' in card
    assert '| epoch | 3 |' in card
    assert '0.5' in card
    assert '<script>' not in card
    for file in (tmp_path / 'hub').iterdir():
        assert b'secret' not in file.read_bytes()


def test_markup_is_escaped() -> None:
    text = escape('a | [b](javascript:x)\n# <img src=x>')
    assert '\n' not in text
    assert '<' not in text
    assert '\\|' in text
    assert '\\[b\\]\\(' in text


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'pretrained_cfg': {'url': 'http://localhost'}}, 'not allowed in a checkpoint'),
        ({'sensor_definitions': []}, 'invalid'),
        ({'input_statistics': {}}, 'bands'),
        ({'depth': 10**6}, 'depth has the invalid value'),
    ],
)
def test_arguments_out_of_the_folder_are_checked(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, 'linear')
    export(path, tmp_path / 'hub', 'hub')
    file = tmp_path / 'hub' / 'config.json'
    config = json.loads(file.read_text())
    config['model_args'] |= change
    file.write_text(json.dumps(config))
    if 'pretrained_cfg' not in change:
        with pytest.raises(ValueError, match=message):
            timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True)
    content = torch.load(path, weights_only=True)
    content['hyper_parameters'] = {'model': f'local-dir:{tmp_path / "hub"}'}
    with pytest.raises(ValueError, match=message):
        _ = ModelFile(path, content).task


def test_what_is_asked_for_wrongly_is_said(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 'linear')
    with pytest.raises(ValueError, match='identifier'):
        export(path, tmp_path / 'hub', 'hub', license='a\nb: c')
    with pytest.raises(ValueError, match='leave license out'):
        export(path, tmp_path / 'a.ckpt', license='mit')
    with pytest.raises(ValueError, match='leave sensor out'):
        export(path, tmp_path / 'hub', 'hub', sensor=next(iter(SENSORS)))
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'mine').touch()
    with pytest.raises(FileExistsError, match='exists already'):
        export(path, tmp_path / 'hub', 'hub')


def test_half_the_size_within_its_rounding_and_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, 'linear')
    export(path, tmp_path / 'whole', 'hub')
    export(path, tmp_path / 'releases' / 'small', 'hub', half=True)
    whole, half = (
        (tmp_path / name / 'model.safetensors').stat().st_size
        for name in ('whole', 'releases/small')
    )
    assert half < 0.6 * whole
    monkeypatch.setattr(files, 'RELEASES', tmp_path / 'releases')
    assert files.released() == ['small']
    loaded, original = load_backbone('small').state_dict(), load_backbone(path).state_dict()
    for key, value in original.items():
        assert loaded[key].dtype == value.dtype
        torch.testing.assert_close(loaded[key], value, atol=1e-6, rtol=2**-11)
    # A file of that name is meant where there is one.
    monkeypatch.chdir(tmp_path)
    Path('small').write_bytes(b'')
    with pytest.raises(CheckpointError, match='small: an empty file'):
        load_backbone('small')


def test_only_hub_has_halves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only the format 'hub' supports float16 weights"):
        export(checkpoint(tmp_path, 'linear'), tmp_path / 'x.pth', 'geofm', half=True)


@pytest.mark.parametrize('name', files.released())
def test_weights_that_come_with_the_package(name: str) -> None:
    """Packaged weights are small, have a licence, and normalise by their training statistics."""
    folder = files.RELEASES / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8 * 2**20
    card = (folder / 'README.md').read_text()
    assert json.loads((folder / 'config.json').read_text())['pretrained_cfg']['license'] in card
    backbone = load_backbone(name)
    assert backbone.statistics is not None
    size = 8 * backbone.patch_size
    with torch.inference_mode():
        features = backbone(torch.randn(2, len(backbone.bands), size, size))
    assert features.shape == (2, backbone.embed_dim)
    assert features.isfinite().all()
