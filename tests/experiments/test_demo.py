"""The table of the demo, on a little generated data and a small model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from geofm.datasets import write_sample_data

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    names = ('demo', 'runs')
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = __import__('demo')
    for name in names:
        # Not left behind under so common a name.
        monkeypatch.delitem(sys.modules, name)
    return module


def test_a_model_that_learned_nothing_is_where_random_weights_are(
    demo: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rois = [('ROIs1868', 36), ('ROIs1868', 119)]
    write_sample_data(tmp_path / 'sample', rois, patches_per_roi=4, time_steps=1)
    model_args: dict[str, Any] = {'depth': 1, 'embed_dim': 12, 'num_heads': 1}
    name = 'geofm_vit_nano_patch16_linear'
    torch.manual_seed(5)
    model = timm.create_model(name, in_chans=15, **model_args)
    hparams = {'model': name, 'in_channels': 15, 'bands': None, 'model_args': model_args}
    state = {f'model.{key}': value for key, value in model.state_dict().items()}
    torch.save({'state_dict': state, 'hyper_parameters': hparams}, tmp_path / 'a.ckpt')
    monkeypatch.setattr(demo, 'RANDOM_FEATURES', demo.FEATURES)
    found = demo.measure(tmp_path / 'a.ckpt', tmp_path / 'sample', seed=5)
    assert list(found) == [
        'pretrained, both sensors',
        'pretrained, best single sensor',
        'random weights',
        'patch words',
        'band mean and std',
    ]
    assert found['pretrained, both sensors'] == found['random weights']
    # By chance alone, one window in eight.
    values = [value for columns in found.values() for value in columns.values()]
    assert all(0.125 < value <= 1 for value in values)
    assert 'best single sensor is Sentinel-' in capsys.readouterr().out


def test_few_labels_are_drawn_per_class(demo: Any) -> None:
    torch.manual_seed(0)
    labels, truth = torch.arange(60) % 3, torch.arange(20) % 3
    bank = torch.randn(60, 4) + labels[:, None]
    queries = torch.randn(20, 4) + truth[:, None]
    data = bank, labels, queries, truth
    every = demo.knn_accuracy(*data, demo.NEIGHBOURS)
    # With all labels, each draw is the whole bank in another order.
    assert demo.few_label_accuracy(*data, per_class=100, draws=3) == pytest.approx(every)
