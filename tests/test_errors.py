"""Error messages of the command line."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torchgeo.tasks import SemanticSegmentation

from geofm.cli import main
from geofm.datasets import write_sample_data
from geofm.messages import CommandError, describe
from geofm.suggestions import did_you_mean

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / 'configs' / 'pretrain' / 'quickstart_dinov2.yaml'
CLASSIFY = ROOT / 'configs' / 'finetune' / 'classification.yaml'
SMALL = [
    '--trainer.accelerator=cpu',
    '--trainer.enable_progress_bar=false',
    '--trainer.enable_model_summary=false',
    '--trainer.limit_val_batches=1',
    '--trainer.max_steps=1',
]


@pytest.fixture(scope='module')
def sample(module_path: Path) -> Path:
    path = module_path / 'sample'
    write_sample_data(path, patches_per_roi=1, time_steps=1, size=64)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a temporary folder, since runs write to the current folder by default."""
    monkeypatch.chdir(tmp_path)


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Run a command that must fail, and return its exit code and message."""
    with pytest.raises(CommandError) as stopped:
        main(args)
    printed = capsys.readouterr().err
    said = printed[printed.index('geofm') :]
    assert 'Traceback' not in printed
    assert 1 <= len(said.splitlines()) <= 5
    assert str(stopped.value) == said.rstrip('\n')
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, said


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('drop_path_rate', 'drop_path_rat', r"line 28: .*did you mean 'drop_path_rate'"),
        ('tasks.DINOv2', 'tasks.DINO2', r"line 22: .*did you mean 'geofm\.tasks\.DINOv2'"),
        ('geofm.tasks.', 'geofm.task.', r"did you mean 'geofm\.tasks\.DINOv2'"),
        ('geofm.tasks.DINOv2', 'DINO2', r"no class 'DINO2'; did you mean 'DINOv2'"),
        ('tasks.DINOv2', 'datamodules.SEN12MSCRDataModule', 'not correspond to a subclass'),
        ('head_hidden_dim: 512', 'head_hidden_dim: many', r"_dim: expected int, not 'many'"),
        ('[0.95, 1.0]', '[0.95]', r"momentum: expected tuple with 2 elements, not '\[0\.95\]'"),
        ('sinkhorn_knopp', 'sinkhorn_knop', "did you mean 'sinkhorn_knopp'"),
        ('max_epochs: 40', 'max_epochs: [', r'c\.yaml: not valid YAML: .*line 1\d'),
        ('trainer:', 'trainr:', r"line 8: no option 'trainr\.default_root_dir'; .*'trainer\.def"),
        ('max_epochs', 'max_epoch', r"line 10: no option .*did you mean 'trainer\.max_epochs'"),
        ('save_last', 'save_lst', "line 17: .*ModelCheckpoint; did you mean 'save_last'"),
        ('CollapseWatch', 'ColapseWatch', r"did you mean 'geofm\.callbacks\.CollapseWatch'"),
        ('paths:', 'pahts:', r"line 48: .*DataModule; did you mean 'paths'"),
        ('TSDataModule', 'TSDatModule', r"did you mean 'geofm\.datamodules\.SEN12MSCRTSDataM"),
        (
            'init_args:\n    model',
            'init_arg:\n    model',
            'model: expected the keys class_path and init_args',
        ),
    ],
)
def test_a_wrong_configuration(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PRETRAIN.read_text()
    assert old in text
    (tmp_path / 'c.yaml').write_text(text.replace(old, new, 1))
    code, said = error_of(capsys, 'fit', f'--config={tmp_path}/c.yaml')
    assert code == 2
    assert re.search(message, said)


@pytest.mark.parametrize('text', ['', 'hello', '- a\n- b\n'])
def test_a_file_that_is_not_a_configuration(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'c.yaml').write_text(text)
    code, said = error_of(capsys, 'fit', '--config', f'{tmp_path}/c.yaml')
    assert code == 2
    assert 'c.yaml: expected keys and values' in said


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['fit', '--config', 'absent.yaml'], r'--config absent\.yaml: neither a file nor'),
        (['fit', '--config=pretrain/quikstart'], "did you mean 'pretrain/quickstart'"),
        (['fit'], 'missing: fit.data, fit.model'),
        (['fit', f'--config={PRETRAIN}', '--trainer.max_epochs=x'], "fit: .*epochs: .*not 'x'"),
        (['fit', f'--config={PRETRAIN}', '--trainr.max_epochs=1'], "mean '--trainer.max_epochs'"),
        (['fit', f'--config={PRETRAIN}', '--data.init_args.path=x'], "did you mean 'paths'"),
        (['benchmark', '--data=EuroSATDataModule', '--data.root=a'], r'given as dict_kwargs\.root'),
        (['fitt'], "no command 'fitt'; did you mean 'fit'"),
        (['export', 'a', 'b', '--sensr=s1'], "no option '--sensr'; did you mean '--sensor'"),
        (['export', 'a', 'b', '--to=tim'], "expected one of 'geofm', .*did you mean 'timm'"),
        (['index'], 'missing: ROOT'),
        (['index', 'a', '--stac', '--layout=bands'], 'give --stac or --layout'),
        (['index', 'a.csv', '--layout=bands', '--clouds'], '--clouds and --pairs-json'),
        (['export', 'a', 'b', '--to=onnx', '--half'], '--to onnx takes neither'),
        (['classify', 'a.parquet'], 'give either --labels FILE'),
        (['search', 'a.parquet'], 'missing: --at'),
        (['search', 'a.parquet', '--at', '500,0'], 'not on Earth'),
        (['predict', 'a.ckpt', '--split', 'test'], 'give --table'),
        (['configs', 'pretrain/quikstart'], "did you mean 'pretrain/quickstart'"),
    ],
)
def test_wrong_arguments(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = error_of(capsys, *args)
    assert code == 2
    assert re.search(message, said)


@pytest.mark.parametrize(
    ('config', 'args', 'message'),
    [
        (
            PRETRAIN,
            ['--model.init_args.model=geofm_vit_tyny_patch16_linear'],
            "did you mean 'geofm_vit_tiny",
        ),
        (
            PRETRAIN,
            ['--model.init_args.model_args={init_valus: 1.0}'],
            "did you mean 'init_values",
        ),
        (PRETRAIN, ['--data.init_args.bands=[VV,B8]'], r"unknown bands \['B8'\].*mean 'B08'"),
        (PRETRAIN, ['--data.init_args.paths=/absent'], '/absent'),
        (PRETRAIN, ['--trainer.max_steps=0'], 'no step to train'),
        (CLASSIFY, ['--model.init_args.model=resnet5'], "did you mean 'resnet50'"),
        (CLASSIFY, ['--model.init_args.weights=absent.ckpt'], 'absent.ckpt'),
        (CLASSIFY, ['--model.init_args.num_classes=1'], 'num_classes'),
        (CLASSIFY, ['--trainer.limit_train_batches=0'], 'no step to train'),
        (CLASSIFY, ['--data.init_args.batch_size=100000'], 'fewer samples than a batch'),
        (CLASSIFY, ['--model.init_args.num_classes=2'], 'set num_classes to '),
        (CLASSIFY, ['--ckpt_path=last'], 'no last checkpoint in .*checkpoints'),
        (CLASSIFY, ['--ckpt_path=absent.ckpt'], r'absent\.ckpt'),
    ],
)
def test_errors_of_fit_at_run_time(
    config: Path,
    args: list[str],
    message: str,
    sample: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ['--data.init_args.batch_size=4', '--data.init_args.window=16']
    if config == PRETRAIN:
        small = ['--model.init_args.global_size=32', '--model.init_args.prototypes=16']
        small += ['--model.init_args.model_args.depth=1']
    paths = f'--data.init_args.paths={sample}'
    code, said = error_of(capsys, 'fit', f'--config={config}', paths, *SMALL, *small, *args)
    assert code == 1
    assert re.search(message, said)


def test_the_last_checkpoint_of_another_run_is_named(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / 'run' / 'lightning_logs' / 'version_0' / 'checkpoints' / 'last.ckpt'
    other.parent.mkdir(parents=True)
    other.touch()
    args = [f'--data.init_args.paths={sample}', f'--trainer.default_root_dir={tmp_path}/run']
    _, said = error_of(capsys, 'fit', f'--config={CLASSIFY}', *SMALL, *args, '--ckpt_path=last')
    assert f'the newest of another run is {other}' in said


def test_debug_prints_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandError):
        main(['export', 'absent.ckpt', 'out.ckpt', '--debug'])
    printed = capsys.readouterr().err
    assert 'Traceback (most recent call last)' in printed
    assert printed.splitlines()[-1].startswith('geofm export: absent.ckpt: no such file')


def test_an_unexpected_error_takes_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyError('weights')

    monkeypatch.setattr('geofm.models.export_backbone', fails)
    with pytest.raises(CommandError, match=r"KeyError: 'weights'\n\(run again with --debug"):
        main(['export', 'a.ckpt', 'b.ckpt'])


def test_messages_are_short_and_escaped() -> None:
    assert describe(ValueError('a\n' * 50)).count('\n') == 4
    assert describe(ValueError('name \x1b[2J\x07')) == 'name \\x1b[2J\\x07'
    assert describe(ZeroDivisionError()).startswith('ZeroDivisionError')
    worker = (
        'Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call '
        'last):\n  File "a.py", line 3, in f\n    raise ValueError("x")\nValueError: a.tif: bad\n'
    )
    assert describe(ValueError(worker)) == 'a.tif: bad'


@pytest.mark.parametrize(('patch', 'size'), [(14, 56), (16, 48)])
def test_dpt_states_its_requirements(patch: int, size: int) -> None:
    name = f'tu-geofm_vit_nano_patch{patch}_linear'
    task = SemanticSegmentation('dpt', name, in_channels=15, num_classes=2)
    with pytest.raises(RuntimeError) as raised:
        task(torch.zeros(1, 15, size, size))
    assert describe(raised.value).startswith('DPT of segmentation-models-pytorch needs patches')


@pytest.mark.parametrize(
    ('name', 'guess'), [('B8', 'B08'), ('b8a', 'B8A'), ('B1', 'B01'), ('vv', 'VV'), ('NIR', '')]
)
def test_band_names(name: str, guess: str) -> None:
    found = did_you_mean(name, ['VV', 'VH', 'B01', 'B08', 'B8A', 'B11'])
    assert found == (f"; did you mean '{guess}'?" if guess else '')


# -- fuzz --------------------------------------------------------------------------------------

VALUES: list[Any] = [None, True, -1, 0, 0.5, 10**30, float('nan'), '', 'x', '\x1b[0m', [], {}]
VALUES += [['x', 1], {'a': {'b': 1}}, {'class_path': 'os.system'}, '/absent', 'B8A']


def _places(node: Any) -> list[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((node, key))
        if isinstance(value, dict | list):
            found += _places(value)
    return found


def _rename(rng: random.Random, node: Any, key: Any) -> None:
    value = node.pop(key)
    if isinstance(node, dict):
        name = list(str(key))
        name[rng.randrange(len(name))] = rng.choice('aeiou_.0')
        node[''.join(name)] = value


def _drop(rng: random.Random, node: Any, key: Any) -> None:
    del node[key]


def _retype(rng: random.Random, node: Any, key: Any) -> None:
    node[key] = rng.choice(VALUES)


def _spoil(rng: random.Random, text: str) -> str:
    """Change, add or remove characters."""
    for _ in range(rng.randint(1, 5)):
        place = rng.randrange(len(text))
        new = rng.choice(['', '', *':-[]{}&*!|>%@\'"#\t\n\x00\x1b é', 'null'])
        text = text[:place] + new + text[place + rng.randint(0, 2) :]
    return text


def mutated(rng: random.Random, text: str) -> str:
    changes: list[Callable[[random.Random, Any, Any], None]] = [_rename, _drop, _retype]
    kind = rng.randrange(4)
    if kind == 3:
        return _spoil(rng, text)
    content = yaml.safe_load(text)
    for _ in range(rng.randint(1, 2)):
        changes[kind](rng, *rng.choice(_places(content)))
    return yaml.safe_dump(content)


#: Seeds of mutated configurations, 20 files each. A longer run: GEOFM_FUZZ_SEEDS=10.
FUZZ_SEEDS = int(os.environ.get('GEOFM_FUZZ_SEEDS', '2'))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('seed', range(FUZZ_SEEDS))
def test_mutated_configurations(
    seed: int,
    sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(self: Trainer, model: Any, datamodule: Any, **kwargs: Any) -> None:
        datamodule.setup('fit')
        next(iter(datamodule.train_dataloader()))

    monkeypatch.setattr(Trainer, 'fit', fit)
    rng = random.Random(seed)
    text = (PRETRAIN, CLASSIFY)[seed % 2].read_text().replace('data/sample', str(sample))
    for big, small in (('vit_tiny', 'vit_nano'), ('dim: 512', 'dim: 16'), ('1024', '16')):
        text = text.replace(big, small)
    config = tmp_path / 'c.yaml'
    for _ in range(20):
        config.write_text(mutated(rng, text))
        capsys.readouterr()
        stopped: CommandError | None = None
        try:
            main(['fit', f'--config={config}', '--trainer.accelerator=cpu'])
        except CommandError as error:
            stopped = error
        assert 'Traceback' not in ''.join(capsys.readouterr())
        if stopped is not None:
            assert stopped.code in (1, 2), config.read_text()
            assert 1 <= len(str(stopped).splitlines()) <= 5, str(stopped)
