"""Commands of the documentation, run on small data and with few steps."""

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from geofm.cli import main
from geofm.datasets import write_sample_scenes

ROOT = Path(__file__).resolve().parents[1]

#: Places of the generated scenes.
ROIS = (('ROIs1868', 36), ('ROIs2017', 25), ('ROIs1970', 57))

_SHORT = [
    *('--trainer.max_steps=2', '--trainer.limit_val_batches=1', '--trainer.accelerator=cpu'),
    *('--trainer.enable_progress_bar=false', '--trainer.check_val_every_n_epoch=1'),
    *('--trainer.max_epochs=1', '--data.init_args.batch_size=2'),
]

#: Additional arguments that make commands fast, by their beginning. Models and data are kept.
SMALLER = {
    'fit --config configs/pretrain/': [
        *_SHORT,
        *('--model.init_args.global_size=32', '--model.init_args.local_size=16'),
        *('--model.init_args.n_local=1', '--model.init_args.prototypes=8'),
        *('--model.init_args.head_hidden_dim=8', '--model.init_args.head_bottleneck_dim=8'),
        *('--model.init_args.model_args.depth=1', '--data.init_args.window_size=48'),
    ],
    'fit --config configs/pretrain/images.yaml': [
        '--data.init_args.patch_size=48',
        '--data.init_args.root=pictures',
    ],
    'fit --config configs/finetune/': [*_SHORT, '--trainer.num_sanity_val_steps=0'],
    'attention': ['--window=32'],
    'benchmark': [
        '--epochs=1',
        '--data.init_args.window_size=48',
        '--data.init_args.batch_size=4',
    ],
}

#: Additional arguments that some commands do not accept, by their beginning.
_UNKNOWN = {'fit --config configs/pretrain/images.yaml': 'window_size'}


def sections(page: str) -> dict[str, list[str]]:
    """Return the commands below each second-level heading, and before the first one for ''."""
    found: dict[str, list[str]] = {}
    for i, part in enumerate(re.split(r'^## ', page, flags=re.MULTILINE)):
        title = part.splitlines()[0] if i else ''
        blocks = re.findall(r'```console\n(.*?)```', part, re.DOTALL)
        lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
        # Lines without a prompt are output.
        found[title] = [line.removeprefix('$ ') for line in lines if line.startswith('$ ')]
    return found


def run(line: str, rois: Sequence[tuple[str, int]] = ROIS, size: int = 96) -> None:
    """Run a command of the documentation with small data.

    Args:
        line: The command.
        rois: Places of the generated scenes.
        size: Side of the generated scenes in pixels.
    """
    command, *args = shlex.split(line)
    if command == 'cp':
        shutil.copy(*args)
        return
    assert command == 'geofm', line
    if args[0] == 'sample-data':
        kind = {'scenes': 'scene', 'bands': 'band'}[args[args.index('--layout') + 1]]
        write_sample_scenes(args[1], kind, rois, dates=2, size=size)  # type: ignore[arg-type]
        return
    given = ' '.join(args)
    for start, options in SMALLER.items():
        if given.startswith(start):
            args += options
    for start, word in _UNKNOWN.items():
        if given.startswith(start):
            args = [arg for arg in args if word not in arg]
    main(args)
