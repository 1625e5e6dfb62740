"""Fine-tuning of a backbone: all of it, its adapters alone, or none of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from geofm.models import MultiSensorViT
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.weights.adapters import (
    adapted_layers,
    adapter_state,
    add_adapters,
    load_adapter_state,
)
from geofm.tasks.parameters import layer_scale, scale_learning_rates

#: Where a checkpoint holds the adapters.
KEY = 'geofm_adapters'

#: Linear layers of a block, by what they are called here.
_TARGETS = {
    'qkv': r'attn\.qkv',
    'proj': r'attn\.proj',
    'mlp': r'mlp\.(?:fc1|fc2|fc1_g|fc1_x|w12|w3)',
}

Target = Literal['qkv', 'proj', 'mlp']


class Adapt(Callback):
    """Say how a fine-tuning task adapts its backbone.

    For TorchGeo's ``Classification``, ``Regression``, ``SemanticSegmentation`` and
    ``PixelwiseRegression`` and :class:`geofm.tasks.Mask2Former`, on one of our backbones or a
    ``VisionTransformer`` of timm. Heads, decoders and pyramids are trained in any case.

    * 'full': all of the backbone. The learning rate falls by *layer_decay* a block from the last
      to the first (Bao et al., 2022, https://arxiv.org/abs/2106.08254).
    * 'frozen': nothing of the backbone, which stays in evaluation mode.
    * 'lora': low-rank adapters (Hu et al., 2022, https://arxiv.org/abs/2106.09685) in linear
      layers of its blocks. Checkpoints hold the merged weights, under the names that they have
      without adapters, and beside them what resuming needs.

    Args:
        method: One of these, or None: as the task has it.
        layer_decay: Factor a block of 'full'; 1: the same learning rate everywhere.
        rank: Rank of adapters.
        alpha: The output of adapters is multiplied by alpha / rank.
        dropout: Dropout before adapters.
        targets: Linear layers with adapters: 'qkv', 'proj', 'mlp'.
        blocks: Blocks with adapters: 'all', numbers counted from 0, or the last k.

    Raises:
        ValueError: If an argument cannot be what it is.
    """

    def __init__(
        self,
        method: Literal['full', 'frozen', 'lora'] | None = None,
        layer_decay: float = 0.75,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: list[Target] | None = None,
        blocks: Literal['all'] | int | list[int] = 'all',
    ) -> None:
        """Initialize a new Adapt instance."""
        if method not in (None, 'full', 'frozen', 'lora'):
            raise ValueError(f"adapt.method is 'full', 'frozen' or 'lora', not {method!r}")
        if not 0 < layer_decay <= 1:
            raise ValueError(f'adapt.layer_decay is above 0 and at most 1, not {layer_decay}')
        if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
            raise ValueError(
                f'adapt.rank is at least 1, alpha above 0, dropout in [0, 1), not {rank}, {alpha}, '
                f'{dropout}'
            )
        self.targets: list[str] = list(_TARGETS) if targets is None else list(targets)
        if not self.targets or not set(self.targets) <= set(_TARGETS):
            raise ValueError(f'adapt.targets are some of {list(_TARGETS)}, not {targets}')
        self.method = method
        self.layer_decay = layer_decay
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.blocks = blocks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze what is not to be trained, and add adapters.

        Args:
            trainer: The trainer.
            pl_module: The task; changed in place.
            stage: Nothing is changed unless it is 'fit'.

        Raises:
            ValueError: If the task has no ViT, or more than one, or freezes it itself.
        """
        if self.method is None or stage != 'fit':
            return
        name, backbone = find_backbone(pl_module)
        hparams: Mapping[str, Any] = pl_module.hparams
        if hparams.get('freeze_backbone') and self.method != 'frozen':
            raise ValueError(
                f'adapt.method {self.method} and freeze_backbone: true contradict each other: '
                'leave out freeze_backbone'
            )
        if self.method == 'frozen':
            backbone.requires_grad_(False)
        elif self.method == 'lora' and not adapted_layers(backbone):
            layers = self._layers(backbone)
            add_adapters(backbone, layers, self.rank, self.alpha, self.dropout)
        _classifier(backbone).requires_grad_(True)
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        every = sum(p.numel() for p in pl_module.parameters())
        rank_zero_info(
            f'adapt: {self.method}, trains {trained:,} of {every:,} parameters '
            f"({trained / every:.1%}); the backbone is '{name}'"
        )

    def _layers(self, backbone: nn.Module) -> list[str]:
        """Names of the layers to give an adapter."""
        depth = _depth(backbone)
        if self.blocks == 'all':
            chosen = set(range(depth))
        elif isinstance(self.blocks, int):
            chosen = set(range(depth - self.blocks, depth))
        else:
            chosen = set(self.blocks)
        if not chosen or not chosen <= set(range(depth)):
            raise ValueError(
                f'adapt.blocks {self.blocks}: the backbone has blocks 0 to {depth - 1}; give '
                "'all', numbers of these, or how many of the last"
            )
        kinds = '|'.join(_TARGETS[target] for target in self.targets)
        pattern = re.compile(rf'(?:.*\.)?blocks\.(\d+)\.(?:{kinds})')
        return [
            name
            for name, module in backbone.named_modules()
            # A sensor that is not in the input has an encoder that is frozen, and never runs.
            if isinstance(module, nn.Linear)
            and module.weight.requires_grad
            and (match := pattern.fullmatch(name))
            and int(match[1]) in chosen
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each block its learning rate, before the optimiser's state is restored.

        Args:
            trainer: The trainer.
            pl_module: The task.
        """
        if self.method != 'full' or self.layer_decay == 1:
            return
        _, backbone = find_backbone(pl_module)
        depth = _depth(backbone)
        scales = {
            id(parameter): layer_scale(name, depth, self.layer_decay)
            for name, parameter in backbone.named_parameters()
        }
        for optimizer in trainer.optimizers:
            scale_learning_rates(optimizer, scales)
        for config in trainer.lr_scheduler_configs:
            _follow_groups(config.scheduler)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep a frozen backbone in evaluation mode.

        Args:
            trainer: The trainer.
            pl_module: The task.
            batch: The batch.
            batch_idx: Its index.
        """
        if self.method == 'frozen':
            _, backbone = find_backbone(pl_module)
            if any(module.training for module in backbone.children()):
                for name, module in backbone.named_children():
                    module.train(name in ('head', 'head_drop'))
                backbone.training = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what resuming needs of the adapters.

        Args:
            trainer: The trainer.
            pl_module: The task.
            checkpoint: The checkpoint; changed in place.
        """
        if adapted_layers(pl_module):
            checkpoint[KEY] = adapter_state(pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the adapters of the run that is resumed.

        A task that is only evaluated needs none: the checkpoint holds the merged weights.

        Args:
            trainer: The trainer.
            pl_module: The task.
            checkpoint: The checkpoint.

        Raises:
            CheckpointError: If the checkpoint's run had other adapters.
        """
        own = bool(adapted_layers(pl_module))
        if not own and trainer.state.fn is not TrainerFn.FITTING:
            return
        if own != (KEY in checkpoint):
            raise CheckpointError(
                'the checkpoint to resume is not of a run with LoRA: resume with the method that '
                'it was trained with, without --adapt.method lora'
                if own
                else 'the checkpoint to resume is of a run with LoRA: resume with the method that '
                'it was trained with, --adapt.method lora'
            )
        if own:
            load_adapter_state(pl_module, checkpoint[KEY])


def find_backbone(task: nn.Module) -> tuple[str, nn.Module]:
    """Find the one ViT in a task.

    Args:
        task: The task.

    Returns:
        Its name in the task, and the ViT.

    Raises:
        ValueError: If there is none, or more than one.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in task.named_modules():
        inside = any(name.startswith(f'{outer}.') for outer, _ in found)
        if isinstance(module, MultiSensorViT | VisionTransformer) and not inside:
            found.append((name, module))
    if len(found) != 1:
        raise ValueError(
            f'adapt: {type(task).__name__} has {len(found)} vision transformers, and one is to be '
            'adapted: leave out adapt.method, or give the task a geofm backbone or a ViT of timm'
        )
    return found[0]


def _depth(backbone: nn.Module) -> int:
    blocks: Sequence[Any] | Any = getattr(backbone, 'blocks', None)
    return backbone.depth if isinstance(backbone, MultiSensorViT) else len(blocks)


def _classifier(backbone: nn.Module) -> nn.Module:
    """The head, which a task on top of the backbone leaves empty."""
    vit: Any = backbone
    head: nn.Module = vit.get_classifier()
    return head


def _follow_groups(scheduler: Any) -> None:
    """Tell a scheduler, made before the groups were split, of the groups that there are."""
    for part in getattr(scheduler, '_schedulers', ()):
        _follow_groups(part)
    if not isinstance(scheduler, LRScheduler) or not hasattr(scheduler, 'base_lrs'):
        # ReduceLROnPlateau multiplies whatever the groups have.
        return
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, LambdaLR):
        if len({id(rule) for rule in scheduler.lr_lambdas}) > 1:
            raise ValueError('adapt.layer_decay: a LambdaLR with one rule a group; set it to 1')
        scheduler.lr_lambdas = scheduler.lr_lambdas[:1] * len(groups)
    scheduler.base_lrs = [group['initial_lr'] for group in groups]
