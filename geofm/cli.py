"""Command-line interface: Lightning's commands, such as ``geofm fit``, and those of geofm."""

import importlib
import inspect
import itertools
import json
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import geofm
from geofm.commands.configs import check_configs, find_config, find_configs
from geofm.printing import format_warning


@dataclass(frozen=True, slots=True)
class Command:
    """A command that is not one of LightningCLI's.

    Attributes:
        function: The function to run, as ``module:name`` in :mod:`geofm.commands`. It is imported
            only when the command is given, since importing PyTorch takes seconds. The command line
            is generated from its signature.
        summary: One line of help.
        positional: Whether required arguments are given by position.
        many: Whether the first argument takes several files.
        passes_on: Whether the command also takes options of ``geofm fit``, which are passed to its
            parameter *fit*.
    """

    function: str
    summary: str
    positional: bool = True
    many: bool = False
    passes_on: bool = False

    def load(self) -> Any:
        """Import and return the function."""
        module, name = self.function.split(':')
        return getattr(importlib.import_module(f'geofm.commands.{module}'), name)


COMMANDS: dict[str, Command] = {
    'sample-data': Command('data:sample_data', 'write a small generated data set'),
    'index': Command('data:index', 'catalogue a data set and find bad files'),
    'scene': Command('scene:scene', 'write the rasters of one place of a table'),
    'shard': Command('shards:shard', 'write samples as shards for fast reading'),
    'split': Command('data:split', 'split a data set by region of interest'),
    'stats': Command('stats:stats', 'compute the statistics of each band'),
    'map': Command('maps:map_', 'map the features of a scene'),
    'attention': Command('maps:attention', 'map and draw attention'),
    'pca': Command('maps:pca', 'map principal components of patch tokens'),
    'embed': Command('maps:embed', 'write the embedding of every patch'),
    'predict': Command('predict:predict', 'map classes with a fine-tuned checkpoint'),
    'classify': Command('classify:classify', 'map classes from a few labels', many=True),
    'search': Command('maps:search', 'list patches similar to the patch at a point'),
    'change': Command('change:change', 'map the change between two dates'),
    'figure': Command('maps:figure', 'draw a scene and its products'),
    'page': Command('page:page', 'make a web page to explore a scene'),
    'benchmark': Command(
        'benchmark:benchmark', 'compare backbones with baselines', positional=False
    ),
    'submit': Command('submit:submit', 'train under SLURM', many=True, passes_on=True),
    'replay': Command('training:replay', 'replay a training step that was not finite'),
    'export': Command('export:export', 'write a backbone in the format of other tools'),
    'configs': Command('configs:configs', 'list or copy the shipped configurations'),
    'doctor': Command('doctor:doctor', 'check the installation and the hardware'),
}

#: Values of a boolean option, and spellings of its type.
_SWITCHED = (['true'], ['false'])
_SWITCH = (str(bool), 'bool')

#: Beginnings of the types of options with several values.
_LISTS = ('list[', 'Sequence[')

#: Options of ``geofm fit`` without a dot in their name.
_FIT_OPTIONS = ('-c', '--config', '--sensors', '--seed_everything')

#: A key and a value, e.g. of ``--scene dem=FILE``.
_ENTRY = re.compile(r'([a-z][a-z0-9_]*)=(.*)', re.DOTALL)

LIGHTNING_COMMANDS: dict[str, str] = {
    'fit': 'pretrain or fine-tune a model from a YAML file',
    'validate': 'evaluate on the validation split',
    'test': 'evaluate on the test split',
    'predict': 'predict on the prediction split (with --config)',
}


def _help() -> str:
    lines = ['usage: geofm COMMAND [ARGUMENTS]', '', geofm.__doc__ or '', '']
    lines += ['`geofm COMMAND --help` lists the arguments of a command.', '']
    lines += ['Train, with Lightning:']
    lines += [f'  {name:<12} {summary}' for name, summary in LIGHTNING_COMMANDS.items()]
    lines += ['', 'Other commands:']
    lines += [f'  {name:<12} {command.summary}' for name, command in COMMANDS.items()]
    lines += [
        '',
        'Start:',
        '  geofm sample-data data/sample',
        '  geofm fit --config configs/pretrain/quickstart.yaml',
        '',
        '`geofm configs` lists the shipped configurations; --config takes their names.',
        'All commands take --sensors FILE, a YAML file that defines further sensors.',
        '--debug, with any command, prints the traceback of an error.',
        'Exit codes: 0 success, 1 error while running, 2 wrong usage.',
    ]
    return '\n'.join(lines)


def _config_help(name: str) -> str:
    """Return the help of ``--config``, with which some names stand for a command of Lightning."""
    if name not in LIGHTNING_COMMANDS:
        return 'YAML file with options of this command.'
    return (
        f"Configuration of Lightning's {name}, which then runs instead of this command and takes "
        'the options of `geofm fit`.'
    )


def _spell_out(args: list[str], function: Any) -> list[str]:
    """Convert options to the form that jsonargparse expects.

    ``--pairs-json FILE`` becomes ``--pairs_json FILE``, a boolean option without a value gets the
    value ``true``, ``--scene dem=FILE`` becomes ``--scene.dem=FILE``, ``--seeds 0 1`` becomes
    ``--seeds=[0, 1]``, and the deprecated ``--KEY_bands`` becomes ``--scene_bands.KEY``.
    """
    kinds = {name: str(kind) for name, kind in inspect.get_annotations(function).items()}
    kinds = {name: kind.removeprefix('collections.abc.') for name, kind in kinds.items()}
    spelt: list[str] = []
    skip = 0
    for i, arg in enumerate(args):
        if skip:
            skip -= 1
            continue
        option, equals, value = arg.partition('=')
        if option.startswith('--'):
            option = '--' + option[2:].replace('-', '_')
            if (key := _sensor_of_bands(option[2:], kinds)) is not None:
                option = f'--scene_bands.{key}'
            following = args[i + 1] if i + 1 < len(args) else ''
            if kinds.get(option[2:]) in _SWITCH and not equals and [following] not in _SWITCHED:
                equals, value = '=', 'true'
            entry = _ENTRY.fullmatch(value if equals else following)
            if entry is not None and 'dict[' in kinds.get(option[2:], ''):
                skip = int(not equals)
                option, equals, value = f'{option}.{entry[1]}', '=', entry[2]
            elif kinds.get(option[2:], '').startswith(_LISTS) and not equals:
                values = list(itertools.takewhile(_is_value, args[i + 1 :]))
                if values and values != ['null'] and not values[0].startswith('['):
                    skip = len(values)
                    equals, value = '=', _listed(values, kinds[option[2:]])
        spelt.append(option + equals + value)
    return spelt


def _is_value(arg: str) -> bool:
    """Return whether an argument is a value, such as a negative number, and not an option."""
    return re.match(r'-[^\d.]', arg) is None


def _listed(values: list[str], kind: str) -> str:
    """Join the values of a list in one argument."""
    numbers = kind.partition('[')[2].startswith(('int', 'float'))
    return f'[{", ".join(values)}]' if numbers else json.dumps(values)


def _take_fit_options(args: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those of the command and options, with values, of ``geofm fit``."""
    left: list[str] = []
    fit: list[str] = []
    current = left
    for arg in args:
        if not _is_value(arg):
            option = arg.partition('=')[0]
            current = fit if '.' in option or option in _FIT_OPTIONS else left
        current.append(arg)
    return left, fit


def _sensor_of_bands(name: str, kinds: dict[str, str]) -> str | None:
    """Return the sensor of an option ``--KEY_bands``; None for any other option."""
    key = name.removesuffix('_bands')
    if key == name or name in kinds or 'scene_bands' not in kinds:
        return None
    # Imports PyTorch.
    from geofm.sensors import SENSORS

    return key if key in SENSORS else None


def _take_option(args: list[str], name: str) -> tuple[list[str], list[str]]:
    """Split arguments into those that do not belong to an option, and the values of the option."""
    left: list[str] = []
    values: list[str] = []
    arguments = iter(args)
    for arg in arguments:
        option, equals, value = arg.partition('=')
        if option != name:
            left.append(arg)
        else:
            values.append(value if equals else next(arguments, ''))
    return left, values


def _place_first(args: list[str], function: Any) -> list[str]:
    """Move the first argument, such as a checkpoint, to where the parser expects it.

    It may be given by position or as an option in all commands. The parser takes a required
    parameter by position only, and an optional one as an option only.
    """
    first = next(iter(inspect.signature(function).parameters.values()))
    option = f'--{first.name}'
    if first.default is first.empty:
        left, values = _take_option(args, option)
        return [*values, *left]
    if args and not args[0].startswith('-') and str(first.annotation) not in _SWITCH:
        return [f'{option}={args[0]}', *args[1:]]
    return args


def _run(name: str, args: list[str]) -> None:
    """Run one of our own commands."""
    from argparse import SUPPRESS

    from jsonargparse import auto_cli

    from geofm.commands.help import HelpFormatter, describe, usage
    from geofm.messages import Parser

    check_configs(args)
    command = COMMANDS[name]
    fit: list[str] = []
    if command.passes_on:
        args, fit = _take_fit_options(args)
    args, files = _take_option(args, '--sensors')
    if files:
        from geofm.sensors import load_sensors

        for file in files:
            load_sensors(file)
    if command.many:
        # jsonargparse takes a list as one argument.
        count = next((i for i, arg in enumerate(args) if arg.startswith('-')), len(args))
        values = [find_config(arg) if command.passes_on else arg for arg in args[:count]]
        args = [*([json.dumps(values)] if count else []), *args[count:]]
    # argparse would read '-0.78,38.1', a longitude and latitude, as an option.
    for i in range(len(args) - 1, 0, -1):
        if re.match(r'-\d.*,', args[i]) and args[i - 1].startswith('--'):
            args[i - 1 : i + 1] = [f'{args[i - 1]}={args[i]}']
    if fit:
        args.append(f'--fit={json.dumps(fit)}')
    function = command.load()
    if not command.many:
        args = _place_first(args, function)
    auto_cli(
        function,
        args=_spell_out(args, function),
        as_positional=command.positional,
        prog=f'geofm {name}',
        parser_class=Parser,
        formatter_class=HelpFormatter,
        usage=usage(name, function, command.many),
        description=describe(function),
        config_help=SUPPRESS if command.passes_on else _config_help(name),
    )


def _guard(command: str, run: Callable[[], None], args: Sequence[str], debug: bool) -> None:
    """Run a command, and print errors in a few lines, with a traceback only if *debug* is set."""
    try:
        run()
    except Exception as error:
        from geofm.messages import fail

        fail(command, error, args, debug)
    except (KeyboardInterrupt, SystemExit) as error:
        from geofm.messages import stop

        # Compared by name, since importing Lightning takes seconds. It would exit with code 0.
        if type(error).__name__ in ('SIGTERMException', 'StoppedBySignal'):
            number = signal.Signals(getattr(error, 'signum', signal.SIGTERM))
            stop(f'{command}: stopped by {number.name}', 128 + number, error)
        if isinstance(error, KeyboardInterrupt):
            stop(f'{command}: interrupted', 128 + signal.SIGINT, error)
        raise


def _gives_config(args: Sequence[str]) -> bool:
    """Return whether arguments include a configuration, as required by Lightning's commands."""
    return any(arg.partition('=')[0] in ('-c', '--config') for arg in args)


def _train(args: list[str]) -> None:
    """Run one of Lightning's commands."""
    check_configs(args)
    from geofm.commands.fit import train

    train(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Arguments; by default those of the process.

    Raises:
        CommandError: If the command fails: with exit code 2 for wrong usage, otherwise 1. The
            error is printed in one to five lines; ``--debug`` also prints the traceback. After
            SIGTERM, SIGUSR1 and SIGINT the exit code is 143, 138 and 130, as is usual in a shell.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = '--debug' in args
    args = [arg for arg in args if arg != '--debug']
    # Warnings contain file names, which may contain escape sequences.
    warnings.formatwarning = format_warning
    if not args or args[0] in ('-h', '--help'):
        print(_help())
        return
    name, rest = args[0], find_configs(args[1:])
    if name == '--version':
        print(f'geofm {geofm.__version__}')
    elif name in LIGHTNING_COMMANDS and (name not in COMMANDS or _gives_config(rest)):
        _guard(f'geofm {name}', lambda: _train([name, *rest]), rest, debug)
    elif name in COMMANDS:
        _guard(f'geofm {name}', lambda: _run(name, rest), rest, debug)
    else:
        from geofm.messages import stop
        from geofm.suggestions import did_you_mean

        guess = did_you_mean(name, [*COMMANDS, *LIGHTNING_COMMANDS])
        stop(f"geofm: no command '{name}'{guess}\n`geofm --help` lists the commands", 2)
