"""Untrusted sharded checkpoints are read as plain values or rejected."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from geofm.callbacks.identity import remove_requeues, run_of
from geofm.checkpoint_io import AtomicCheckpointIO
from geofm.commands.adoption import adopt_model
from geofm.models.checkpoints.files import CheckpointError, read_file

WEIGHTS = {'model.weight': torch.arange(12.0).view(3, 4), 'model.bias': torch.ones(0)}
RUN = 'a' * 12


def write(folder: Path, **more: Any) -> Path:
    """Write a sharded checkpoint with one rank."""
    save({'state_dict': WEIGHTS, **more}, checkpoint_id=folder, no_dist=True)
    torch.save({'epoch': 3, 'run': RUN}, folder / 'meta.pt')
    return folder


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ('ran',)


pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled')


def test_it_is_read_as_one_process_would_have_written_it(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    groups: list[dict[str, Any]] = [
        {'params': [model.bias], 'lr_mult': 0.5},
        {'params': [model.weight]},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.6))
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    expected = optimizer.state_dict()
    names = ['bias', 'weight']
    by_name: dict[str, Any] = {
        'state': {names[i]: value for i, value in expected['state'].items()},
        'param_groups': [
            {**group, 'params': [names[i] for i in group['params']]}
            for group in expected['param_groups']
        ],
    }
    folder = write(tmp_path / 'last.ckpt', optimizer_0=by_name)
    content = read_file(folder)
    assert content.keys() == {'epoch', 'run', 'state_dict'}
    assert all(torch.equal(content['state_dict'][key], WEIGHTS[key]) for key in WEIGHTS)
    (found,) = AtomicCheckpointIO().load_checkpoint(folder)['optimizer_states']
    assert found['param_groups'] == expected['param_groups']
    torch.testing.assert_close(found['state'], expected['state'], rtol=0, atol=0)
    assert run_of(folder) == RUN


def test_no_object_is_created_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = write(tmp_path / 'value.ckpt', optimizer_0={'state': {}, 'param_groups': [Evil()]})
    index = write(tmp_path / 'index.ckpt')
    (index / '.metadata').write_bytes(pickle.dumps(Evil()))
    rest = write(tmp_path / 'rest.ckpt')
    torch.save({'run': Evil()}, rest / 'meta.pt')
    for folder in (index, rest):
        with pytest.raises(CheckpointError, match=r'holds more than weights \(posix.mkdir\)'):
            read_file(folder)
    with pytest.raises(ValueError, match=r'value.ckpt: holds more than tensors'):
        AtomicCheckpointIO().load_checkpoint(value)
    assert run_of(rest) is None
    assert not Path('ran').exists()


def test_no_file_outside_of_it_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / 'last.ckpt')
    index = pickle.loads((folder / '.metadata').read_bytes())
    for info in index.storage_data.values():
        info.relative_path = f'../{info.relative_path}'
    (folder / '.metadata').write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(f'{folder}: ')):
        read_file(folder)


@pytest.mark.parametrize('name', ['.metadata', '__0_0.distcp', 'meta.pt'])
def test_half_of_it_is_said_to_be_damaged(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / 'last.ckpt')
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r'last.ckpt: .*damaged'):
        read_file(folder)


def test_folders_of_earlier_requeues_are_removed(tmp_path: Path) -> None:
    folders = [write(tmp_path / f'hpc_ckpt_{i}.ckpt') for i in (1, 2)]
    remove_requeues(tmp_path, RUN)
    assert list(tmp_path.iterdir()) == folders[1:]


def test_fine_tuning_says_what_to_do(tmp_path: Path) -> None:
    weights = str(write(tmp_path / 'last.ckpt'))
    task = {'class_path': 'torchgeo.tasks.Classification', 'init_args': {'weights': weights}}
    with pytest.raises(CheckpointError, match=r"'geofm export .*last.ckpt FILE --to torchgeo'"):
        adopt_model(task)
