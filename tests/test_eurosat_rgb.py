"""The configurations of the EuroSAT RGB experiment: training, callbacks and benchmark."""

import csv
import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchgeo import tasks

import geofm.tasks
from geofm.callbacks.knn import backbone_of
from geofm.cli import main
from geofm.datamodules import EuroSATRGBDataModule, NamedBandsDataModule
from geofm.evaluation import BackboneConfig, labelled_data
from geofm.evaluation.backbones import build_backbone
from geofm.models import create_backbone, load_backbone_weights
from tests.datasets.test_eurosat_rgb import write

ROOT = Path(__file__).parents[1]
TASKS: dict[str, Any] = {
    'pretrain/eurosat_rgb': geofm.tasks.DINOv2,
    'pretrain/eurosat_rgb_words': geofm.tasks.MaskedWords,
    'pretrain/eurosat_rgb_simclr': tasks.SimCLR,
    'pretrain/eurosat_rgb_mae': tasks.MAE,
    'finetune/eurosat_rgb_supervised': tasks.Classification,
}
#: Arguments that make a method fast.
SMALLER: dict[str, list[str]] = {
    'pretrain/eurosat_rgb_words': [
        *('--model.init_args.words=32', '--model.init_args.target_dim=8'),
        '--model.init_args.fit_images=96',
    ],
}
BANDS = ['B04', 'B03', 'B02']
#: All of the training cells that `write` makes in a batch. `limit_train_batches=1` may be read as
#: 1.0, all batches: typing takes int | float and float | int for one, whichever came first.
ONE_BATCH = '--data.init_args.datamodule.init_args.batch_size=24'


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Definitions in the script of the experiment."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'path', [str(ROOT / 'experiments'), *sys.path])
    return runpy.run_path(str(ROOT / 'experiments' / 'eurosat_rgb.py'))


def test_all_train_the_same_backbone_on_the_same_data(experiment: dict[str, Any]) -> None:
    experiment['check_architectures']()
    configs = [method.configs[0] for method in experiment['METHODS'].values()]
    assert {str(c.relative_to('configs').with_suffix('')) for c in configs} == set(TASKS)
    data = [
        yaml.safe_load(path.read_text())['data']['init_args']
        for path in [*configs, Path('configs/benchmark/eurosat_rgb.yaml')]
    ]
    for arguments in data:
        # Methods have different batch sizes.
        del arguments['datamodule']['init_args']['batch_size']
    for arguments in data:
        assert {**arguments, 'bands': BANDS} == data[-1]


@pytest.mark.parametrize('name', TASKS)
def test_two_steps_then_the_benchmark_sees_the_features_of_the_module(
    name: str, experiment: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path)
    main(
        [
            'fit',
            f'--config=configs/{name}.yaml',
            f'--trainer.default_root_dir={tmp_path}',
            '--trainer.accelerator=cpu',
            '--trainer.enable_progress_bar=false',
            '--trainer.max_epochs=2',
            '--trainer.logger=CSVLogger',
            f'--trainer.logger.save_dir={tmp_path}',
            *experiment['watching'](tmp_path, 1),
            ONE_BATCH,
            *SMALLER.get(name, []),
            f'{experiment["ROOT"]}={tmp_path}',
        ]
    )
    (path,) = tmp_path.rglob('last.ckpt')
    curve = experiment['read_curve']([path])
    assert [point['epoch'] for point in curve] == [1, 2]
    assert 0 < curve[0]['minutes'] < curve[1]['minutes'] < 5
    assert all(0 <= point[kind] <= 1 for point in curve for kind in experiment['CURVES'])
    with (path.parents[1] / 'metrics.csv').open() as file:
        assert any(row.get('knn/top1_k20') for row in csv.DictReader(file))

    content = torch.load(path, weights_only=True)
    assert content['global_step'] == 2
    hparams = {k: v for k, v in content['hyper_parameters'].items() if not k.startswith('_')}
    task = TASKS[name](**hparams)
    task.load_state_dict(content['state_dict'])
    module: Any = backbone_of(task).eval()

    source = EuroSATRGBDataModule(root=tmp_path)
    named = NamedBandsDataModule(BANDS, source, bands=BANDS, mean=dict.fromkeys(BANDS, 900.0))
    data = labelled_data(named)
    backbone = build_backbone(BackboneConfig(str(path)), data.bands, data.statistics, seed=0)
    assert backbone.learned
    raw = next(iter(data.loader('test')))['image'][:3]
    # The checkpoint has no statistics, and those of the data are used.
    image = named.aug({'image': raw})['image']
    with torch.inference_mode():
        found = backbone.encoder.pooled(backbone.adapter({'image': raw}))
        tokens = module.forward_features(image)
    torch.testing.assert_close(found[:, 0], tokens[:, 0])
    torch.testing.assert_close(found[:, 1], tokens[:, module.num_prefix_tokens :].mean(1))
    random = build_backbone(
        BackboneConfig(str(path)), data.bands, data.statistics, seed=0, random=True
    )
    assert not random.learned
    with torch.inference_mode():
        assert not torch.allclose(random.encoder.pooled(random.adapter({'image': raw})), found)


def test_dinov2_starts_from_the_weights_of_mae(
    experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: str | Path) -> None:
        main([str(arg) for arg in args])

    # In this process: a new one imports everything, which takes longer than the run.
    monkeypatch.setitem(experiment['train'].__globals__, 'geofm', run)
    write(tmp_path)
    few = '--trainer.max_epochs=1', '--trainer.accelerator=cpu'
    options = Namespace(
        # Without learning, to compare the initial weights.
        fit=[*few, ONE_BATCH, '--model.init_args.lr=0'],
        data=tmp_path,
        precision='32-true',
        every_n_epochs=1,
        only_done=False,
    )
    method, output = experiment['METHODS']['MAE, then DINOv2'], tmp_path / 'output'
    mae, dinov2 = experiment['train'](method, 0, output, options)
    first, second = (torch.load(path, weights_only=True)['state_dict'] for path in (mae, dinov2))
    # The bands of the first layer have another order.
    kernel = 'blocks.5.mlp.fc2.weight'
    expected = first[f'backbone.vit.{kernel}']
    torch.testing.assert_close(second[f'model.encoders.s2.{kernel}'], expected, atol=1e-5, rtol=0)

    curve = experiment['read_curve']([mae, dinov2])
    assert [point['epoch'] for point in curve] == [1, 2]
    assert 0 < curve[0]['minutes'] < curve[1]['minutes']
    # What has been run is not run again; what has not is missed where only that is asked for.
    options.only_done = True
    assert experiment['train'](method, 0, output, options) == [mae, dinov2]
    with pytest.raises(FileNotFoundError, match='start: not run'):
        experiment['train'](method, 1, tmp_path / 'other', options)


def test_the_vit_of_mae_can_be_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    task = tasks.MAE(model='local-dir:configs/models/eurosat_rgb_mae', size=64)
    path = tmp_path / 'mae.ckpt'
    state = {'state_dict': task.state_dict(), 'hyper_parameters': dict(task.hparams)}
    torch.save(state, path)
    ours = create_backbone(
        {
            'model': 'geofm_vit_nano_patch8_s2',
            'in_channels': 3,
            'bands': BANDS,
            'model_args': {'img_size': 64, 'init_values': 1.0, 'reg_tokens': 0},
        }
    ).eval()
    with pytest.warns(UserWarning, match='no mask_token'):
        load_backbone_weights(ours, path)
    image = torch.randn(2, 3, 64, 64)
    # Three channels are assumed to be B04, B03, B02. The position of CLS is added to the token.
    with torch.inference_mode():
        expected = task.backbone.vit.eval().forward_features(image)
        torch.testing.assert_close(ours.forward_features(image), expected, atol=1e-5, rtol=1e-4)


def test_a_run_of_the_settings_of_today_is_taken_from_the_results_file(
    experiment: dict[str, Any], tmp_path: Path
) -> None:
    settings = {'fit': [], 'precision': '32-true', 'results': tmp_path, 'data': tmp_path}
    options = Namespace(**settings, output=tmp_path, methods=['MAE'], only_done=True)
    assert experiment['recorded_runs'](options) == {}
    mae, dinov2 = (
        {'settings': experiment['stages'](experiment['METHODS'][name], options)}
        for name in ('MAE', 'DINOv2')
    )
    dinov2['settings'][0]['config']['trainer']['max_epochs'] += 1
    point = {'epoch': 60, 'minutes': 40.0}
    run = {'seed': 3, 'device': 'a lamp', 'curve': [point], 'accuracy': {'MAE': {'linear': 0.5}}}
    about = {
        'settings': {'MAE': mae['settings'], 'DINOv2': dinov2['settings']},
        'runs': {'MAE': [run], 'DINOv2': [run]},
    }
    (tmp_path / 'eurosat_rgb.json').write_text(json.dumps(about))
    recorded = experiment['recorded_runs'](options)
    assert list(recorded) == ['MAE']
    assert recorded['MAE'][3] == experiment['Run'](**run)
    text = experiment['report']({'MAE': [recorded['MAE'][3]]}, '32-true')
    assert '| MAE | 40 |' in text
    assert '| 50.0 |' in text
    assert 'a lamp (*MAE*)' in text
