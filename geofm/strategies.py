"""Strategy that shards weights and optimiser state over the ranks: ``--trainer.strategy fsdp2``."""

from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, override

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from geofm.atomic import atomic_folder
from geofm.losses import gathered
from geofm.models import SensorTokens
from geofm.models.checkpoints import is_sharded, load_shards, read_rest


class FullyShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2): each rank has a shard of all weights.

    Gradients and the state of the optimiser are sharded as well. The task must shard itself in
    ``configure_model``, as :class:`geofm.tasks.PretrainingTask` does. Every rank gets its own
    batches, as in DDP, and the results equal those of DDP up to rounding.

    A checkpoint is a folder with one file per rank, written atomically. Runs with any number of
    ranks and any strategy can resume from it, and this strategy can resume from checkpoints of
    other strategies.

    Use ``--trainer.strategy fsdp2``, or in YAML ``class_path:
    geofm.strategies.FullyShardedStrategy`` as ``trainer.strategy``.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        """Initialize a new FullyShardedStrategy instance.

        Args:
            save_distributed_checkpoint: Whether each rank saves its shards. Otherwise rank 0
                gathers all shards and saves one file.
            kwargs: ``process_group_backend`` and ``timeout`` of Lightning's
                ``ModelParallelStrategy``.
        """
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    @override
    def setup_environment(self) -> None:
        """Start the processes. All of them are data parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the task.

        Returns:
            Shards of this rank. For checkpoints of one file, whole tensors on the CPU of rank 0,
            and an empty dictionary on other ranks.
        """
        assert self.lightning_module is not None
        # PyTorch's get_model_state_dict handles parameters and buffers only, but the state dict of
        # a task also has the backbone's architecture.
        state: dict[str, Any] = self.lightning_module.state_dict()
        if self._save_distributed_checkpoint:
            return state
        whole: dict[str, Any] = {}
        for key, value in state.items():
            # One at a time, because a GPU may not have memory for all.
            tensor = gathered(value)
            if self.is_global_zero:
                # A copy, because the tensor may be a view of a larger one.
                whole[key] = tensor.to('cpu', copy=True)
        return whole

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint. All ranks must call this.

        Args:
            checkpoint: Content of the checkpoint.
            filepath: Name of the checkpoint.
            storage_options: Not supported.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(filepath)
        if self.is_global_zero and path.is_file():
            path.unlink()
        whole = atomic_folder(path, replace=True) if self.is_global_zero else nullcontext(path)
        with whole as part:
            # Lightning broadcasts the name of rank 0, which is the temporary folder.
            super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the weights and the state of the optimizers.

        Args:
            checkpoint_path: Folder saved by this strategy with any number of ranks, or file of any
                strategy.
            weights_only: Not used; only plain values are ever loaded.

        Returns:
            The rest of the checkpoint.
        """
        task = self.lightning_module
        assert task is not None
        path = Path(self.broadcast(checkpoint_path))
        own: dict[str, Any] = task.state_dict()
        if is_sharded(path):
            state = {'state_dict': own}
            states = [get_optimizer_state_dict(task, optimizer) for optimizer in self.optimizers]
            state |= {f'optimizer_{i}': found for i, found in enumerate(states)}
            load_shards(state, path)
            task.load_state_dict(own, strict=task.strict_loading)
            for optimizer, found in zip(self.optimizers, states, strict=True):
                set_optimizer_state_dict(task, optimizer, found)
            return read_rest(path)
        content = self.checkpoint_io.load_checkpoint(path, weights_only=True)
        weights = content.pop('state_dict')
        for key, value in weights.items():
            if key in own:
                weights[key] = _sharded(value, own[key])
        task.load_state_dict(weights, strict=task.strict_loading)
        # In validation there are no optimizers.
        found_states = content.pop('optimizer_states', ())
        for optimizer, found in zip(self.optimizers, found_states, strict=False):
            optimizer.load_state_dict(_sharded_state(found, optimizer))
        return content


def shard_networks(task: nn.Module, ranks: DeviceMesh) -> None:
    """Shard the networks of a task over ranks, unless they are sharded already.

    Args:
        task: The task. Its networks are its children, and the values of children that are a
            ``ModuleDict``. Backbones shard each block separately. Other networks must be called
            (not used through their weights) to gather their shards.
        ranks: Device mesh of the ranks.
    """
    for child in task.children():
        for network in child.children() if isinstance(child, nn.ModuleDict) else [child]:
            if isinstance(network, FSDPModule):
                continue
            if isinstance(network, SensorTokens):
                network.shard(ranks)
            elif any(True for _ in network.parameters()):
                fully_shard(network, mesh=ranks, reshard_after_forward=True)


@torch.no_grad()
def hand_out(whole: nn.Module | None, task: LightningModule) -> None:
    """Distribute the weights and buffers of a task on rank 0 to the shards of all ranks.

    Args:
        whole: The task with its weights, on rank 0; None on other ranks.
        task: The same task, sharded, with networks on the meta device. They are moved to the rank's
            device.
    """
    strategy = task.trainer.strategy
    device = strategy.root_device
    state = task.state_dict()
    names = {name for name, buffer in task.named_buffers() if buffer.is_meta or name in state}
    for child in task.children():
        if any(parameter.is_meta for parameter in child.parameters()):
            child.to_empty(device=device)
    given = {} if whole is None else dict(whole.named_parameters())
    for name, own in task.named_parameters():
        assert isinstance(own, DTensor)
        if given:
            tensor = given[name].to(device)
        else:
            tensor = torch.empty(own.shape, dtype=own.dtype, device=device)
        own.copy_(distribute_tensor(tensor, own.device_mesh, own.placements))
    buffers = {} if whole is None else dict(whole.named_buffers())
    buffers = strategy.broadcast({name: buffers[name] for name in names if name in buffers})
    for name, buffer in task.named_buffers():
        if name in names:
            buffer.copy_(buffers[name])


def _sharded(value: Tensor, like: Any) -> Tensor:
    """Return this rank's shard of a tensor that every rank has."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _sharded_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Shard the state of an optimiser like its parameters."""
    numbers = chain.from_iterable(group['params'] for group in state['param_groups'])
    parameters = chain.from_iterable(group['params'] for group in optimizer.param_groups)
    of_number = dict(zip(numbers, parameters, strict=True))
    return {
        **state,
        'state': {
            number: {key: _sharded(value, of_number[number]) for key, value in values.items()}
            for number, values in state['state'].items()
        },
    }


if 'fsdp2' not in StrategyRegistry:
    StrategyRegistry.register('fsdp2', FullyShardedStrategy, FullyShardedStrategy.__doc__)
