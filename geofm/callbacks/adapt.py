"""How fine-tuning adapts a backbone: all weights, adapters only, or none."""

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
from geofm.models.checkpoints import CheckpointError
from geofm.models.weights import (
    adapted_layers,
    adapter_state,
    add_adapters,
    load_adapter_state,
)
from geofm.tasks import layer_scale, scale_learning_rates

#: Key of the adapters in a checkpoint.
KEY = 'geofm_adapters'

#: Patterns of the linear layers in a block, by the names that *targets* takes.
_TARGETS = {
    'qkv': r'attn\.qkv',
    'proj': r'attn\.proj',
    'mlp': r'mlp\.(?:fc1|fc2|fc1_g|fc1_x|w12|w3)',
}

Target = Literal['qkv', 'proj', 'mlp']


class Adapt(Callback):
    """Callback that sets how a fine-tuning task adapts its backbone.

    It supports TorchGeo's ``Classification``, ``Regression``, ``SemanticSegmentation`` and
    ``PixelwiseRegression`` and :class:`geofm.tasks.Mask2Former`, with a geofm backbone or a
    ``VisionTransformer`` of timm. Heads, decoders and pyramids are always trained.

    * 'full': train the whole backbone. The learning rate is multiplied by *layer_decay* per block,
      from the last block to the first (Bao et al., 2022, https://arxiv.org/abs/2106.08254).
    * 'frozen': train nothing in the backbone, which stays in evaluation mode.
    * 'lora': train low-rank adapters (Hu et al., 2022, https://arxiv.org/abs/2106.09685) of linear
      layers in the blocks. Checkpoints hold the merged weights under the names of the plain model,
      and in addition the adapters for resuming.

    Args:
        method: 'full', 'frozen' or 'lora'. By default (null), the task is left as it is.
        layer_decay: Factor of the learning rate per block, for 'full'. With 1, all blocks have the
            same learning rate.
        rank: Rank of the adapters.
        alpha: The output of the adapters is multiplied by alpha / rank.
        dropout: Dropout probability before the adapters.
        targets: Linear layers with adapters: 'qkv', 'proj', 'mlp'. Default: all of them.
        blocks: Blocks with adapters: 'all', a list of block numbers from 0, or a number k for the
            last k blocks.

    Raises:
        ValueError: If an argument is invalid.
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
            raise ValueError(f"adapt.method must be 'full', 'frozen' or 'lora', not {method!r}")
        if not 0 < layer_decay <= 1:
            raise ValueError(f'adapt.layer_decay must be above 0 and at most 1, not {layer_decay}')
        if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
            raise ValueError(
                'adapt.rank must be at least 1, alpha above 0 and dropout in [0, 1), '
                f'not {rank}, {alpha} and {dropout}'
            )
        self.targets: list[str] = list(_TARGETS) if targets is None else list(targets)
        if not self.targets or not set(self.targets) <= set(_TARGETS):
            raise ValueError(f'adapt.targets must be some of {list(_TARGETS)}, not {targets}')
        self.method = method
        self.layer_decay = layer_decay
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.blocks = blocks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze parameters and add adapters.

        Args:
            trainer: The trainer.
            pl_module: The task; changed in place.
            stage: Stage of the trainer. The task is changed in the stage 'fit' only.

        Raises:
            ValueError: If the task has no ViT or more than one, or if its ``freeze_backbone``
                contradicts the method.
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
        """Return the names of the layers that get an adapter."""
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
                "'all', a list of these numbers, or how many of the last blocks"
            )
        kinds = '|'.join(_TARGETS[target] for target in self.targets)
        pattern = re.compile(rf'(?:.*\.)?blocks\.(\d+)\.(?:{kinds})')
        return [
            name
            for name, module in backbone.named_modules()
            # The encoder of a sensor that is not in the input is frozen and never runs.
            if isinstance(module, nn.Linear)
            and module.weight.requires_grad
            and (match := pattern.fullmatch(name))
            and int(match[1]) in chosen
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rate of each block, before the optimiser's state is restored.

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
        """Save the adapters, which resuming needs.

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
        """Load the adapters of the resumed run.

        A task that is only evaluated needs no adapters: the checkpoint holds the merged weights.

        Args:
            trainer: The trainer.
            pl_module: The task.
            checkpoint: The checkpoint.

        Raises:
            CheckpointError: If only one of checkpoint and task has adapters, or theirs differ.
        """
        own = bool(adapted_layers(pl_module))
        if not own and trainer.state.fn is not TrainerFn.FITTING:
            return
        if own != (KEY in checkpoint):
            raise CheckpointError(
                'the checkpoint is from a run without LoRA: resume it without --adapt.method lora'
                if own
                else 'the checkpoint is from a run with LoRA: resume it with --adapt.method lora'
            )
        if own:
            load_adapter_state(pl_module, checkpoint[KEY])


def find_backbone(task: nn.Module) -> tuple[str, nn.Module]:
    """Find the one ViT in a task.

    Args:
        task: The task.

    Returns:
        The name of the ViT in the task, and the ViT.

    Raises:
        ValueError: If there is no ViT or more than one.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in task.named_modules():
        inside = any(name.startswith(f'{outer}.') for outer, _ in found)
        if isinstance(module, MultiSensorViT | VisionTransformer) and not inside:
            found.append((name, module))
    if len(found) != 1:
        raise ValueError(
            f'adapt: {type(task).__name__} has {len(found)} vision transformers instead of one: '
            'leave out adapt.method, or give the task a geofm backbone or a ViT of timm'
        )
    return found[0]


def _depth(backbone: nn.Module) -> int:
    blocks: Sequence[Any] | Any = getattr(backbone, 'blocks', None)
    return backbone.depth if isinstance(backbone, MultiSensorViT) else len(blocks)


def _classifier(backbone: nn.Module) -> nn.Module:
    """Return the head, which is empty in a task that has its own head or decoder."""
    vit: Any = backbone
    head: nn.Module = vit.get_classifier()
    return head


def _follow_groups(scheduler: Any) -> None:
    """Update a scheduler that was created before the parameter groups were split."""
    for part in getattr(scheduler, '_schedulers', ()):
        _follow_groups(part)
    if not isinstance(scheduler, LRScheduler) or not hasattr(scheduler, 'base_lrs'):
        # ReduceLROnPlateau changes the current learning rates and keeps no list of groups.
        return
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, LambdaLR):
        if len({id(rule) for rule in scheduler.lr_lambdas}) > 1:
            raise ValueError(
                'adapt.layer_decay does not support a LambdaLR with one rule per group; set it to 1'
            )
        scheduler.lr_lambdas = scheduler.lr_lambdas[:1] * len(groups)
    scheduler.base_lrs = [group['initial_lr'] for group in groups]
