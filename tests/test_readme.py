"""The workflow of the README, run on generated data and with small models."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from geofm.cli import main
from geofm.datasets import write_sample_data
from geofm.models import load_backbone

ROOT = Path(__file__).resolve().parents[1]
TREE = '/data/SEN12MSCRTS'

#: Additional arguments that make lines fast, by their beginning. Models and data are kept.
SMALLER = {
    'fit --config configs/pretrain/': [
        *('--trainer.max_steps=1', '--trainer.limit_val_batches=0', '--trainer.accelerator=cpu'),
        *('--trainer.precision=32', '--trainer.enable_progress_bar=false'),
        *('--data.init_args.batch_size=2', '--data.init_args.num_workers=0'),
        *('--model.init_args.global_size=32', '--model.init_args.local_size=16'),
        *('--model.init_args.n_local=1', '--model.init_args.prototypes=8'),
        *('--model.init_args.head_hidden_dim=8', '--model.init_args.head_bottleneck_dim=8'),
        *('--model.init_args.model_args.depth=1', '--model.init_args.model_args.num_heads=2'),
        '--model.init_args.model_args.embed_dim=48',
    ],
    'fit --config configs/finetune/': [
        *('--trainer.max_steps=1', '--trainer.limit_val_batches=1', '--trainer.accelerator=cpu'),
        *('--data.init_args.batch_size=2', '--trainer.enable_progress_bar=false'),
    ],
    'attention': ['--window=32'],
    'benchmark': ['--probes=[knn]', '--k=[1]'],
}


def workflow() -> list[str]:
    """Return the lines of the longest block of commands in the README."""
    blocks = re.findall(r'```console\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    lines = max(blocks, key=len).splitlines()
    assert all(line.startswith('$ ') for line in lines)
    return [line.removeprefix('$ ') for line in lines]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configurations, SEN12MS-CR-TS and a scene, as in the README."""
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    write_sample_data(tmp_path / 'tree', patches_per_roi=1, time_steps=1, size=64)
    for key in ('s1', 's2'):
        first = min((tmp_path / 'tree').rglob(f'{key}_*.tif'))
        shutil.copy(first, tmp_path / f'{key}.tif')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, place: Path) -> None:
    """Run a line of the README with small data."""
    command, *args = shlex.split(line, comments=True)
    if command == 'cp':
        shutil.copy(*args)
        return
    assert command == 'geofm'
    if args[0] == 'sample-data':
        write_sample_data(place / args[1], patches_per_roi=4, time_steps=1, size=128)
        return
    args = [str(place / 'tree') if arg == TREE else arg for arg in args]
    text = ' '.join(args)
    for start, options in SMALLER.items():
        args += options if text.startswith(start) else []
    main(args)


def test_the_workflow_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install, *lines = workflow()
    assert install == 'make install && source .venv/bin/activate'
    starts = [line.split('#')[0].split()[:2] for line in lines]
    assert {'fit', 'attention', 'export', 'benchmark'} <= {start[1] for start in starts}
    for line in lines:
        run(line, place)
    backbone = load_backbone('last.ckpt')
    # The width and registers of pretraining, through a configuration that names a tiny ViT.
    assert (backbone.embed_dim, backbone.num_reg_tokens) == (48, 2)
    (tuned,) = (place / 'output' / 'classification').rglob('*.ckpt')
    content = torch.load(tuned, weights_only=True)
    assert content['hyper_parameters']['model'] == 'geofm_vit_base_patch16_linear'
    assert content['state_dict']['model.stand_in'].shape == (2, 2 + 2, 48)
    assert load_backbone('weights.ckpt').num_reg_tokens == 2
    assert list(place.glob('maps/*.tif'))
    assert any((place / 'output' / 'benchmark').rglob('*.csv'))
