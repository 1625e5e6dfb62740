"""Training, evaluation and prediction with Lightning's command line."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, override

import torch

# Imported so that a configuration can give classes without their import path, and to register our
# models.
import torchgeo.datamodules
import torchgeo.tasks
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

import geofm
import geofm.callbacks
import geofm.datamodules
import geofm.tasks
from geofm.atomic import atomic_file
from geofm.callbacks import Adapt, RunIdentity, StopOnSignal
from geofm.checkpoint_io import AtomicCheckpointIO, local_path, remove_partial_checkpoints
from geofm.commands.adoption import adopt_model
from geofm.commands.launcher import end_with_launcher
from geofm.commands.resume import is_requeued, newest_checkpoint, refuse_requeue_of_another_run
from geofm.messages import ShortErrors, UsageError
from geofm.printing import say
from geofm.sensors import load_sensors
from geofm.tasks import NO_STEPS, networks_on_meta

#: Names of the strategy that shards the model, in configurations.
_SHARDING = ('fsdp2', 'geofm.strategies.FullyShardedStrategy')


_DEBUG = 'With --debug, the traceback of an error is printed.'

#: Descriptions in the help texts.
_DESCRIPTIONS = {
    'fit': f'Pretrain or fine-tune a model. {_DEBUG}',
    'validate': f'Evaluate a model on the validation split. {_DEBUG}',
    'test': f'Evaluate a model on the test split. {_DEBUG}',
    'predict': f'Predict on the prediction split. {_DEBUG}',
}


class TrainingParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser with short error messages."""


class SaveConfig(SaveConfigCallback):
    """Callback that writes the configuration to the log folder atomically."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file on rank 0, once.

        Args:
            trainer: The trainer.
            pl_module: The task.
            stage: Either 'fit', 'validate', 'test' or 'predict'.
        """
        # On all ranks, since rank 0 broadcasts the folder.
        folder = trainer.log_dir
        local = None if folder is None else local_path(folder)
        if local is None:
            super().setup(trainer, pl_module, stage)
            return
        if trainer.is_global_zero and not self.already_saved:
            with atomic_file(local / self.config_filename) as part:
                self.parser.save(
                    self.config, part, skip_none=False, overwrite=True, multifile=False
                )
        self.already_saved = True


class GeofmCLI(LightningCLI):
    """Lightning's command line with atomic checkpoints, ``--resume`` and ``--sensors``."""

    def __init__(self, args: Sequence[str]) -> None:
        """Initialize a new GeofmCLI instance, and run a subcommand.

        Args:
            args: The subcommand and its arguments.
        """
        self._requested = args[0] if args else None
        super().__init__(
            model_class=torchgeo.tasks.BaseTask,
            datamodule_class=torchgeo.datamodules.BaseDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={'overwrite': True},
            parser_class=TrainingParser,
            parser_kwargs={'version': geofm.__version__},
            args=list(args),
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommands and the arguments that they skip.

        Returns:
            Only the requested subcommand, because a parser takes long to build; all of them if it
            is unknown.
        """
        every = super().subcommands()
        requested = {name: skip for name, skip in every.items() if name == self._requested}
        return requested or every

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of geofm to those of trainer, model and data.

        Args:
            parser: The parser.
        """
        parser.add_argument(
            '--sensors',
            type=str | list[str] | None,
            default=None,
            help='YAML file, or list of files, that define further sensors',
        )
        parser.add_lightning_class_args(Adapt, 'adapt')

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f'geofm {subcommand} --config FILE [OPTIONS]'
        parser.description = _DESCRIPTIONS[subcommand]
        assert parser.groups is not None
        # By default, the tuple of the two base classes.
        parser.groups['lr_scheduler'].title = 'Base classes of all learning rate schedulers'
        if subcommand == 'fit':
            parser.add_argument(
                '--resume',
                type=Literal['auto'] | None,
                default=None,
                help='`auto`: resume from the newest checkpoint of the run in default_root_dir, or '
                'start a new run if there is none',
            )
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse arguments.

        Args:
            parser: The parser.
            args: The arguments.
        """
        self.config = parser.parse_args(args)

    @override
    def before_instantiate_classes(self) -> None:
        """Register the user's sensors, and set the model to that of the initial checkpoint."""
        files = self._get(self.config, 'sensors') or []
        for file in [files] if isinstance(files, str) else files:
            load_sensors(file)
        adopt_model(self.config[self.subcommand].model)

    @override
    def instantiate_classes(self) -> None:
        """Make task, data and trainer. Networks to be sharded are built on the meta device."""
        strategy = self.config[self.subcommand].trainer.strategy
        shards = getattr(strategy, 'class_path', strategy) in _SHARDING
        if shards:
            # Registers the strategy; slow to import.
            import geofm.strategies  # noqa: F401
        with networks_on_meta() if shards else nullcontext():
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer.

        Args:
            **kwargs: Further arguments of the trainer.

        Returns:
            The trainer. Checkpoints are written by :class:`AtomicCheckpointIO` unless the
            configuration has a checkpoint plugin. With DDP, *gradient_as_bucket_view* defaults to
            True, which saves memory.
        """
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == 'fit':
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks += [RunIdentity(self.settings()), StopOnSignal()]
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy._ddp_kwargs.setdefault('gradient_as_bucket_view', True)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Choose the checkpoint to resume from, and remove partial checkpoints.

        Raises:
            ValueError: If there is no step to train, or ``--ckpt_path last`` has no checkpoint.
        """
        self._require_last()
        trainer = self.trainer
        if 0 in (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches):
            raise ValueError(NO_STEPS)
        self._choose_checkpoint()
        if trainer.is_global_zero:
            for folder in _run_folders(trainer):
                remove_partial_checkpoints(folder)

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify an experiment.

        Returns:
            The configuration of the model, as plain JSON data.
        """
        model = self.config[self.subcommand].model.as_dict()
        settings: dict[str, Any] = json.loads(json.dumps(model, default=str))
        return settings

    def _choose_checkpoint(self) -> None:
        """Choose the newest checkpoint of this run with ``--resume auto`` or after a requeue."""
        given, auto = self._get(self.config, 'ckpt_path'), self._get(self.config, 'resume')
        root = local_path(self.trainer.default_root_dir)
        if given is not None and auto:
            raise UsageError('--resume auto chooses the checkpoint: leave out --ckpt_path')
        if given is not None or root is None:
            return
        chosen = None
        if auto or is_requeued():
            chosen = newest_checkpoint(root, _run_folders(self.trainer), self.settings())
        if chosen is None:
            refuse_requeue_of_another_run(root)
        else:
            self.config_init[self.subcommand]['ckpt_path'] = str(chosen)

    def after_fit(self) -> None:
        """Print the last checkpoint.

        Raises:
            ValueError: If there were no training batches, where Lightning only warns.
        """
        if self.trainer.num_training_batches == 0:
            raise ValueError(NO_STEPS)
        if self.trainer.is_global_zero:
            for callback in self.trainer.checkpoint_callbacks:
                if path := getattr(callback, 'last_model_path', ''):
                    say(f'last checkpoint: {path}')

    def before_validate(self) -> None:
        """Check ``--ckpt_path last``."""
        self._require_last()

    def before_test(self) -> None:
        """Check ``--ckpt_path last``."""
        self._require_last()

    def before_predict(self) -> None:
        """Check ``--ckpt_path last``."""
        self._require_last()

    def _require_last(self) -> None:
        """Raise an error if ``--ckpt_path last`` has no checkpoint, where Lightning only warns."""
        if self._get(self.config, 'ckpt_path') != 'last':
            return
        trainer = self.trainer
        written = [getattr(callback, 'ckpt_path', '') for callback in trainer.checkpoint_callbacks]
        folders = _checkpoint_folders(trainer)
        if any(_last_checkpoints(folder) for folder in folders) or any(
            path and os.path.exists(path)  # noqa: PTH110 - may be a URL
            for path in written
        ):
            return
        others = [path for folder in _run_folders(trainer) for path in _last_checkpoints(folder)]
        newest = max(others, key=lambda path: path.stat().st_mtime, default=None)
        advice = '' if newest is None else f'; the newest of another run is {newest}'
        raise ValueError(
            f'--ckpt_path last: no last checkpoint in {", ".join(map(str, folders))}{advice}. Give '
            'the path of a checkpoint, or leave out --ckpt_path to start a new run'
        )


class FitSettings(GeofmCLI):
    """Command line that is parsed and checked, but not run."""

    @override
    def _set_seed(self) -> None:
        pass

    @override
    def before_instantiate_classes(self) -> None:
        """Do nothing: the run registers sensors and reads checkpoints."""

    @override
    def instantiate_classes(self) -> None:
        """Do nothing."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _default_folder(trainer: Trainer) -> str:
    """Return the folder of checkpoints for callbacks without *dirpath*, as Lightning does."""
    root = trainer.default_root_dir
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version
        version = version if isinstance(version, str) else f'version_{version}'
        root = os.path.join(logger.save_dir or root, str(logger.name), version)  # noqa: PTH118 - may be a URL
    return os.path.join(root, 'checkpoints')  # noqa: PTH118


def _checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Return the folders that this run writes checkpoints to."""
    default = _default_folder(trainer)
    given = [
        callback.dirpath or default
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    ]
    paths = [local_path(folder) for folder in dict.fromkeys(given)]
    return [path for path in paths if path is not None]


def _run_folders(trainer: Trainer) -> list[Path]:
    """Return the checkpoint folders of this run and of other versions of its log folder."""
    folders = _checkpoint_folders(trainer)
    default = local_path(_default_folder(trainer))
    # Without a logger, neighbouring folders belong to other runs.
    if trainer.loggers and default is not None:
        folders += default.parent.parent.glob('*/checkpoints')
    return list(dict.fromkeys(folders))


def _last_checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob('last*.ckpt'))


def train(args: Sequence[str]) -> None:
    """Run one of LightningCLI's subcommands.

    Args:
        args: The subcommand and its arguments.
    """
    end_with_launcher()
    torch.set_float32_matmul_precision('high')
    GeofmCLI(args)
