"""Training that shards its state over the ranks: ``--trainer.strategy fsdp2``."""

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
from geofm.losses.ranks import gathered
from geofm.models.checkpoints.sharded import is_sharded, load_shards, read_rest
from geofm.models.tokens import SensorTokens


class FullyShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2): each rank keeps a shard of all weights.

    Gradients and the state of the optimizer are sharded likewise. The task shards itself in
    ``configure_model``, as :class:`geofm.tasks.PretrainingTask` does. Every rank gets a batch of
    its own, as under DDP, and the numbers are those of DDP but for rounding.

    A checkpoint is a folder with a file of each rank; its final name never holds half of one. Any
    number of ranks and any other strategy can resume from it. Checkpoints of other strategies can
    be resumed from, too.

    ``--trainer.strategy fsdp2`` in short; or, as ``trainer.strategy`` in YAML, ``class_path:
    geofm.strategies.FullyShardedStrategy``.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        """Initialize a new FullyShardedStrategy instance.

        Args:
            save_distributed_checkpoint: Whether each rank saves its shards. Otherwise rank 0
                gathers all and saves one file.
            kwargs: ``process_group_backend`` and ``timeout`` of Lightning's
                ``ModelParallelStrategy``.
        """
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    @override
    def setup_environment(self) -> None:
        """Start the processes, all of which share out the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """State of the task.

        Returns:
            Shards of this rank; or, if a checkpoint is to be one file, whole tensors on the CPU on
            rank 0, and nothing on the others.
        """
        assert self.lightning_module is not None
        # PyTorch's get_model_state_dict knows of parameters and buffers only: a backbone in a task
        # carries what it is built of, too.
        state: dict[str, Any] = self.lightning_module.state_dict()
        if self._save_distributed_checkpoint:
            return state
        whole: dict[str, Any] = {}
        for key, value in state.items():
            # One by one, since a GPU may not hold them all.
            tensor = gathered(value)
            if self.is_global_zero:
                # A copy: what it is a view of may be larger.
                whole[key] = tensor.to('cpu', copy=True)
        return whole

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save a checkpoint; all ranks take part.

        Args:
            checkpoint: What to save.
            filepath: Final name.
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
            # Of rank 0, whose name is broadcast.
            super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the weights, and the state of the optimizers.

        Args:
            checkpoint_path: A folder that this strategy saved, with any number of ranks, or a file
                of any strategy.
            weights_only: Not used: what is loaded is plain.

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
        # There are no optimizers in validation.
        found_states = content.pop('optimizer_states', ())
        for optimizer, found in zip(self.optimizers, found_states, strict=False):
            optimizer.load_state_dict(_sharded_state(found, optimizer))
        return content


def shard_networks(task: nn.Module, ranks: DeviceMesh) -> None:
    """Shard the networks of a task over ranks, those that are not sharded yet.

    Args:
        task: The task. Its networks are its children and the values of those that are a
            ``ModuleDict``: backbones, which shard each block on its own, and heads, which work as
            long as they are called.
        ranks: The ranks.
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
    """Give each rank its shards of a task on rank 0, and its buffers.

    Args:
        whole: The task with its weights, on rank 0; None on others.
        task: The same task, sharded, its networks on the meta device. They get memory on the rank's
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
    """The shard of this rank of a tensor that every rank has whole."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _sharded_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """State of an optimizer in shards like those of its parameters."""
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
