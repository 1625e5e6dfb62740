import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rasterio
import torch
import yaml

from geofm.cli import COMMANDS, LIGHTNING_COMMANDS, _place_first, _spell_out, main
from geofm.datasets import write_sample_data
from geofm.models import load_backbone
from tests.models.weights.vits import timm_vit

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = sorted((ROOT / 'configs' / 'benchmark').glob('*.yaml'))
CONFIGS = sorted(
    p for kind in ('pretrain', 'finetune') for p in (ROOT / 'configs' / kind).glob('*.yaml')
)

#: Arguments for a small version of the same method.
SMALL = [
    '--model.init_args.model_args.depth=2',
    '--model.init_args.global_size=32',
    '--model.init_args.local_size=16',
    '--model.init_args.n_local=1',
    '--model.init_args.prototypes=16',
    '--data.init_args.patch_size=32',
    '--data.init_args.batch_size=2',
]


@pytest.fixture(scope='module')
def sample(module_path: Path) -> Path:
    path = module_path / 'sample'
    write_sample_data(path, patches_per_roi=1, time_steps=2, size=64)
    return path


@pytest.fixture(scope='module')
def checkpoint(sample: Path, module_path: Path) -> Path:
    """A checkpoint written by `geofm fit`."""
    fit(module_path, sample, '--trainer.max_steps=2')
    return module_path / 'lightning_logs' / 'version_0' / 'checkpoints' / 'last.ckpt'


def fit(root: Path, sample: Path, *args: str) -> None:
    main(
        [
            'fit',
            f'--config={ROOT}/configs/pretrain/quickstart_dinov2.yaml',
            f'--trainer.default_root_dir={root}',
            f'--data.init_args.paths={sample}',
            '--trainer.accelerator=cpu',
            '--trainer.enable_progress_bar=false',
            '--trainer.limit_val_batches=1',
            *SMALL,
            *args,
        ]
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(['--help'])
    text = capsys.readouterr().out
    for command in (*COMMANDS, *LIGHTNING_COMMANDS):
        assert f'  {command} ' in text
    assert max(len(line) for line in text.splitlines()) <= 80


#: Run commands, and exit with 1 if PyTorch was imported, which takes seconds.
WITHOUT_TORCH = """
import sys
from contextlib import suppress
from geofm.cli import main
for args in sys.argv[1:]:
    with suppress(SystemExit):
        main(args.split())
sys.exit('torch' in sys.modules)
"""


def test_light_commands_do_not_import_torch() -> None:
    light = ['sample-data', 'index', 'split', 'scene', 'change', 'page', 'export', 'replay']
    light += ['configs', 'doctor']
    args = ['--help', '--version', 'configs', *(f'{name} --help' for name in light)]
    subprocess.run([sys.executable, '-c', WITHOUT_TORCH, *args], check=True, capture_output=True)


def test_light_commands_have_the_defaults_of_the_library() -> None:
    from geofm.datasets.catalogue.catalogue import JOBS
    from geofm.datasets.pairs.table import MIN_OVERLAP
    from geofm.datasets.table.scanning import JOBS as TABLE_JOBS

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(COMMANDS['index'].load()).parameters.items()
    }
    assert defaults['jobs'] == JOBS == TABLE_JOBS
    assert defaults['min_overlap'] == MIN_OVERLAP


def test_map_commands_share_their_options() -> None:
    shared = {'checkpoint', 's1', 's2', 'scene', 'scene_bands', 'reference_sensor', 'output'}
    shared |= {'missing_bands', 'device', 'window', 'overlap', 'batch_size'}
    for name in ('map', 'attention', 'pca', 'embed', 'predict'):
        parameters = inspect.signature(COMMANDS[name].load()).parameters
        assert shared <= parameters.keys(), name
        assert next(iter(parameters)) == 'checkpoint'


def test_a_checkpoint_is_given_by_position_or_as_an_option() -> None:
    for name in ('map', 'attention', 'pca', 'embed', 'predict', 'export'):
        function = COMMANDS[name].load()
        for given in (['--checkpoint', 'a.ckpt'], ['--checkpoint=a.ckpt'], ['a.ckpt']):
            assert _place_first([*given, '--s2', 'b.tif'], function) == ['a.ckpt', '--s2', 'b.tif']
    benchmark = COMMANDS['benchmark'].load()
    assert _place_first(['a.ckpt', '--k=1'], benchmark) == ['--checkpoint=a.ckpt', '--k=1']
    assert _place_first(['--checkpoint', 'a'], benchmark) == ['--checkpoint', 'a']
    # A switch is not given by position.
    assert _place_first(['x'], COMMANDS['doctor'].load()) == ['x']


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match='0'):
        main([command, '--help'])
    return capsys.readouterr().out


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Wide enough not to wrap lines.
    monkeypatch.setenv('COLUMNS', '1000')
    text = help_of(command, capsys)
    assert text.startswith(f'usage: geofm {command} ')
    for option in ('--sensors FILE', '--debug', '-h, --help'):
        assert f'\n  {option}' in text
    function = COMMANDS[command].load()
    description = (inspect.getdoc(function) or '').partition('\n\nArgs:')[0]
    assert ' '.join(description.split()) in ' '.join(text.split())
    for name, parameter in inspect.signature(function).parameters.items():
        by_position = COMMANDS[command].positional and parameter.default is parameter.empty
        if by_position and parameter.kind is not parameter.KEYWORD_ONLY:
            assert name.upper().removesuffix('S') in text.partition(' [OPTIONS]')[0]
        else:
            assert f'\n  --{name}' in text
    assert not re.search(r'<class|type:|null, default|Optional\[|subclasses:|ITEM|true,false', text)


def test_help_shows_options_as_they_are_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('COLUMNS', '1000')
    texts = {name: help_of(name, capsys) for name in ('index', 'shard', 'classify', 'search')}
    assert re.search(r'\n  --stac  +Read', texts['index'])
    assert re.search(r'\n  --jobs INT  .*\(default: 8\)\n', texts['index'])
    assert '\n  --edge {shift,drop}' in texts['shard']
    assert '\n  --split_by.KEY VALUE' in texts['shard']
    assert '\n  --bands BAND [BAND ...]\n' in texts['shard']
    assert 'usage: geofm classify EMBEDDING [EMBEDDING ...] [OPTIONS]\n' in texts['classify']
    assert '\n  --scene KEY=PATH' in texts['classify']
    assert '\n  --scene_bands KEY=[VALUE,...]' in texts['classify']
    assert 'usage: geofm search EMBEDDINGS --at AT [OPTIONS]\n' in texts['search']
    assert re.search(r'\n  --at AT  .*\(required\)\n', texts['search'])


def test_help_says_that_config_selects_the_command_of_lightning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    helps = {name: ' '.join(help_of(name, capsys).split()) for name in ('predict', 'map', 'submit')}
    assert "--config FILE Configuration of Lightning's predict" in helps['predict']
    assert '--config FILE YAML file with options of this command' in helps['map']
    assert '--config FILE' not in helps['submit'].partition('positional')[2]


def test_help_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of('fit', capsys)
    assert text.startswith('usage: geofm fit --config FILE [OPTIONS]\n')
    for option in ('--debug', '--sensors', '--resume', '--adapt.method'):
        assert option in text
    assert '<class' not in text


def test_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit, match="no command 'pretrain'"):
        main(['pretrain'])


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_is_understood(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='0'):
        main(['fit', f'--config={config}', '--print_config'])
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    given: dict[str, Any] = yaml.safe_load(config.read_text())
    assert printed['model']['class_path'] == given['model']['class_path']


@pytest.mark.parametrize('config', BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_is_understood(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='0'):
        main(['benchmark', f'--config={config}', '--print_config'])
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    given: dict[str, Any] = yaml.safe_load(config.read_text())
    assert printed['data']['class_path'] == given['data']['class_path']
    assert printed['output'] == given['output']


def test_a_run_resumes_from_a_checkpoint(
    checkpoint: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torch.load(checkpoint, weights_only=True)['global_step'] == 2
    fit(tmp_path, sample, '--trainer.max_steps=3', f'--ckpt_path={checkpoint}')
    resumed = tmp_path / 'lightning_logs' / 'version_0' / 'checkpoints' / 'last.ckpt'
    assert f'last checkpoint: {resumed}' in capsys.readouterr().out
    assert torch.load(resumed, weights_only=True)['global_step'] == 3


def test_each_sensor_starts_from_weights_named_in_yaml(sample: Path, tmp_path: Path) -> None:
    vits = {'s1': timm_vit('vit_tiny_patch16_224', in_chans=2, depth=2)}
    vits['s2'] = timm_vit('vit_tiny_patch16_224', in_chans=3, depth=2)
    for key, vit in vits.items():
        torch.save(vit.state_dict(), tmp_path / f'{key}.pth')
    weights = {
        's1': str(tmp_path / 's1.pth'),
        's2': {'path': str(tmp_path / 's2.pth'), 'bands': ['B04', 'B03', 'B02']},
    }
    config = {'model': {'init_args': {'weights': weights, 'lr': 0.0, 'min_lr': 0.0}}}
    (tmp_path / 'weights.yaml').write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match=r's2\.pth into the encoder of s2: .*B12 start from'):
        fit(tmp_path, sample, f'--config={tmp_path}/weights.yaml', '--trainer.max_steps=1')
    (last,) = tmp_path.rglob('last.ckpt')
    backbone = load_backbone(last)
    for key, vit in vits.items():
        for name, value in vit.named_parameters():
            if name.startswith('blocks.'):
                assert torch.equal(backbone.get_parameter(f'encoders.{key}.{name}'), value)
    kernels = vits['s2'].patch_embed.proj.weight
    loaded = backbone.get_parameter('encoders.s2.patch_embed.proj.weight')
    assert torch.equal(loaded[:, 3], kernels[:, 0])
    assert torch.equal(loaded[:, 0], kernels.mean(dim=1))


def test_attention_is_on_the_grid_of_the_scene(
    checkpoint: Path, sample: Path, tmp_path: Path
) -> None:
    s1 = next(sample.rglob('s1_*.tif'))
    s2 = next(s1.parents[2].joinpath('S2', s1.parent.name).glob('s2_*.tif'))
    files = [f'--s1={s1}', f'--s2={s2}', f'--output={tmp_path}']
    main(['attention', str(checkpoint), *files, '--window=32'])
    (raster,) = tmp_path.glob('*_attention.tif')
    (figure,) = tmp_path.glob('*.png')
    assert figure.stat().st_size > 10_000
    with rasterio.open(raster) as result, rasterio.open(s2) as scene:
        assert (result.crs, result.transform) == (scene.crs, scene.transform)
        assert (result.bounds, result.shape) == (scene.bounds, scene.shape)
        assert result.count == 2 * (1 + 3)


def test_benchmark_prints_the_baselines(
    checkpoint: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ['--data=SampleLandCoverDataModule', f'--data.paths={sample}', '--data.window=16']
    data += ['--k=[1,3]', '--steps=10', f'--cache={tmp_path / "features"}']
    output = tmp_path / 'benchmark'
    main(['benchmark', str(checkpoint), *data, f'--output={output}'])
    text = capsys.readouterr().out
    for row in ('pretrained', 'random weights', 'band mean'):
        assert row in text
    scores = yaml.safe_load((output / 'scores.json').read_text())['scores']
    assert {score['probe'] for score in scores} == {'1-NN', '3-NN', 'linear', 'logistic'}
    assert (output / 'scores.png').is_file()


def test_export_lists_what_it_leaves_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / 's2.safetensors'
    main(['export', str(checkpoint), str(output), '--to', 'timm', '--sensor', 's2'])
    assert capsys.readouterr().out.splitlines() == [
        str(output),
        'left out: encoders.s1, day_of_year, fusion, mask_token, stand_in',
    ]


def test_an_error_takes_one_line(tmp_path: Path) -> None:
    absent = tmp_path / 'absent.ckpt'
    with pytest.raises(SystemExit, match=r'^geofm export: .*absent\.ckpt: no such file$'):
        main(['export', str(absent), str(tmp_path / 'out.ckpt')])


@pytest.mark.parametrize(('name', 'window'), [('classification', 16), ('segmentation', 32)])
def test_torchgeo_tasks_start_from_the_checkpoint(
    name: str, window: int, checkpoint: Path, sample: Path, tmp_path: Path
) -> None:
    weights = checkpoint
    if name == 'segmentation':
        weights = tmp_path / 'exported.ckpt'
        main(['export', str(checkpoint), str(weights), '--to=torchgeo'])
    main(
        [
            'fit',
            f'--config={ROOT}/configs/finetune/{name}.yaml',
            f'--model.init_args.weights={weights}',
            f'--data.init_args.paths={sample}',
            f'--data.init_args.window={window}',
            '--data.init_args.batch_size=4',
            f'--trainer.default_root_dir={tmp_path}',
            '--trainer.accelerator=cpu',
            '--trainer.max_steps=1',
            '--trainer.limit_val_batches=1',
            '--trainer.enable_progress_bar=false',
            *('--trainer.callbacks=ModelCheckpoint', '--trainer.callbacks.save_weights_only=true'),
        ]
    )
    assert list(tmp_path.rglob('*.ckpt'))


def test_values_of_a_list_may_be_separate_arguments() -> None:
    from geofm.commands.submit import submit

    args = ['a.yaml', '--seeds', '0', '-1', '--sweep', 'a=1,2', 'b=[3,4]', '--dry-run']
    wanted = ['a.yaml', '--seeds=[0, -1]', '--sweep=["a=1,2", "b=[3,4]"]', '--dry_run=true']
    assert _spell_out(args, submit) == wanted
    for given in (['--seeds', '[0, 1]'], ['--seeds', 'null'], ['--seeds=[0]']):
        assert _spell_out(given, submit) == given
    benchmark, shard = (COMMANDS[name].load() for name in ('benchmark', 'shard'))
    assert _spell_out(['--k', '5', '20'], benchmark) == ['--k=[5, 20]']
    assert _spell_out(['--sensor_keys', 's1', 's2'], shard) == ['--sensor_keys=["s1", "s2"]']


def test_the_deprecated_option_for_bands_of_a_sensor() -> None:
    from geofm.commands.maps import attention

    wanted = ['--scene_bands.s2=[B02]', '--missing_bands=mean']
    assert _spell_out(['--s2_bands=[B02]', '--missing-bands=mean'], attention) == wanted
    assert _spell_out(['--s2_bands', '[B02]'], attention) == ['--scene_bands.s2', '[B02]']
    assert _spell_out(['--s2_band=[B02]'], attention) == ['--s2_band=[B02]']
