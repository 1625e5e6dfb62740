"""Command-line interface: ``geofm fit --config ...`` and the commands around it."""

import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geofm
from geofm.printing import format_warning, printable


@dataclass(frozen=True, slots=True)
class Command:
    """A command beside LightningCLI's.

    Attributes:
        function: Where the function is that it runs, as ``module:name``: imported only when the
            command is given, for PyTorch takes its seconds. Its signature is the usage.
        summary: One line of help.
        positional: Whether required arguments are given by position.
    """

    function: str
    summary: str
    positional: bool = False

    def load(self) -> Any:
        """The function."""
        module, name = self.function.split(':')
        return getattr(importlib.import_module(f'geofm.commands.{module}'), name)


COMMANDS: dict[str, Command] = {
    'sample-data': Command('data:sample_data', 'write a small generated data set', positional=True),
    'index': Command('data:index', 'catalogue a data set, and find bad files', positional=True),
    'split': Command('data:split', 'split a data set by region of interest', positional=True),
    'stats': Command('data:stats', 'work out the statistics of each band', positional=True),
    'map': Command('maps:map_', 'map what a backbone sees of a scene', positional=True),
    'attention': Command('maps:attention', 'map and draw where it looks'),
    'pca': Command('maps:pca', 'map principal components of patch tokens'),
    'embed': Command('maps:embed', 'write the embedding of every patch'),
    'search': Command('maps:search', 'list places similar to one place', positional=True),
    'figure': Command('maps:figure', 'draw a scene and its products', positional=True),
    'page': Command('page:page', 'make a web page to explore a scene', positional=True),
    'benchmark': Command('benchmark:benchmark', 'measure backbones, beside their floors'),
    'replay': Command('training:replay', 'do a step again that was not finite', positional=True),
    'export': Command('export:export', 'write a backbone for other tools', positional=True),
    'doctor': Command('doctor:doctor', 'print versions and devices, and what to mend'),
}

#: Values that a switch may be given.
_SWITCHED = (['true'], ['false'])

LIGHTNING_COMMANDS: dict[str, str] = {
    'fit': 'pretrain or fine-tune, from a YAML file',
    'validate': 'evaluate on the validation split',
    'test': 'evaluate on the test split',
    'predict': 'predict on the prediction split',
}


def _help() -> str:
    lines = ['usage: geofm COMMAND [ARGUMENTS]   (geofm COMMAND --help lists them)', '']
    lines += [geofm.__doc__ or '', '', 'Train, with Lightning:']
    lines += [f'  {name:<12} {summary}' for name, summary in LIGHTNING_COMMANDS.items()]
    lines += ['', 'Around it:']
    lines += [f'  {name:<12} {command.summary}' for name, command in COMMANDS.items()]
    lines += [
        '',
        'Start:',
        '  geofm sample-data data/sample',
        '  geofm fit --config configs/pretrain/quickstart.yaml',
    ]
    return '\n'.join(lines)


def _train(args: list[str] | None) -> None:
    """Run one of LightningCLI's sub-commands, with the arguments of the process if None."""
    import torch

    # Importing these lets a YAML name their classes without the module, and registers our models.
    import torchgeo.datamodules
    import torchgeo.tasks
    from lightning.pytorch.cli import LightningCLI

    import geofm.callbacks
    import geofm.datamodules
    import geofm.tasks

    torch.set_float32_matmul_precision('high')
    LightningCLI(
        model_class=torchgeo.tasks.BaseTask,
        datamodule_class=torchgeo.datamodules.BaseDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={'overwrite': True},
        parser_kwargs={'version': geofm.__version__},
        args=args,
    )


def _spell_out(args: list[str], function: Any) -> list[str]:
    """Options as jsonargparse knows them: ``--pairs-json FILE``, and switches without a value."""
    switches = {
        name for name, kind in inspect.get_annotations(function).items() if kind in (bool, 'bool')
    }
    spelt = []
    for i, arg in enumerate(args):
        option, equals, value = arg.partition('=')
        if option.startswith('--'):
            option = '--' + option[2:].replace('-', '_')
            if option[2:] in switches and not equals and args[i + 1 : i + 2] not in _SWITCHED:
                equals, value = '=', 'true'
        spelt.append(option + equals + value)
    return spelt


def _run(name: str, args: list[str]) -> None:
    """Run one of our own commands; what is wrong with its input takes one line to say."""
    from jsonargparse import auto_cli

    command = COMMANDS[name]
    # argparse takes '-0.78,38.1', a longitude and latitude, for an option.
    for i in range(len(args) - 1, 0, -1):
        if re.match(r'-\d.*,', args[i]) and args[i - 1].startswith('--'):
            args[i - 1 : i + 1] = [f'{args[i - 1]}={args[i]}']
    function = command.load()
    args = _spell_out(args, function)
    try:
        auto_cli(function, args=args, as_positional=command.positional, prog=f'geofm {name}')
    except (ValueError, OSError) as error:
        sys.exit(f'geofm {name}: {printable(error)}')


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Arguments; those of the process by default.
    """
    given, args = args, list(sys.argv[1:] if args is None else args)
    # A folder of SEN12MS-CR-TS holds 15,000 files: GDAL must not list it for each one it opens.
    os.environ.setdefault('GDAL_DISABLE_READDIR_ON_OPEN', 'EMPTY_DIR')
    # Warnings name files, whose names may hold anything.
    warnings.formatwarning = format_warning
    if not args or args[0] in ('-h', '--help'):
        print(_help())
    elif args[0] == '--version':
        print(f'geofm {geofm.__version__}')
    elif args[0] in LIGHTNING_COMMANDS:
        _train(None if given is None else args)
    elif args[0] in COMMANDS:
        _run(args[0], args[1:])
    else:
        sys.exit(f"geofm: no command '{args[0]}'\n\n{_help()}")
