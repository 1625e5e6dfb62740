"""Run a ViT's block on crops of several sizes as one packed sequence of tokens.

Linear layers process the tokens of all crops as rows of one matrix. Attention stays within each
crop. DINOv2 (Oquab et al., 2023, section 5) calls this sequence packing.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from geofm.device import to_device
from geofm.models.packed_attention import Groups, attend

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Indices of the sequences of each group that a branch runs on; None: all sequences.
_Subsets = list[Tensor] | None


class Kept(NamedTuple):
    """Selected tokens, whose output is computed.

    Attributes:
        sequences: Index of each token's sequence, counted over all groups, int64 of shape (M,).
        tokens: Index of each token in its sequence, int64 of shape (M,).
    """

    sequences: Tensor
    tokens: Tensor


def lay_out(crops: Sequence[Tensor], drop: bool) -> tuple[tuple[Tensor, ...], Groups]:
    """Arrange the tokens of crops for :func:`run_block`.

    Args:
        crops: Tokens of the crops of each size, of shape (B, L, D).
        drop: Whether blocks skip crops (stochastic depth). If so, each size stays a separate
            tensor; otherwise all tokens are packed once.

    Returns:
        The crops, or all tokens as one tensor (1, T, D); and the groups of sequences.
    """
    groups = tuple((crop.shape[0], crop.shape[1]) for crop in crops)
    if drop or len(crops) == 1:
        return tuple(crops), groups
    return (torch.cat([crop.flatten(0, 1) for crop in crops])[None],), groups


def take_out(crops: Sequence[Tensor], groups: Groups) -> list[Tensor]:
    """Undo :func:`lay_out`.

    Args:
        crops: The crops, or all tokens as one tensor.
        groups: The groups of sequences.

    Returns:
        Tokens of the crops of each size, of shape (B, L, D).
    """
    if len(crops) == len(groups):
        return list(crops)
    parts = crops[0][0].split([count * length for count, length in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


def is_plain(block: nn.Module) -> bool:
    """Return whether the weights of a block may be used directly, without calling its modules.

    Adapters such as LoRA, hooks and replaced ``forward`` methods act when a module is called. A
    block with any of them must be called as a whole.

    Args:
        block: The block.

    Returns:
        True if it is a :class:`PackedBlock`, its layers have timm's classes, and neither the block
        nor a module in it has hooks, except the hooks of sharding.
    """
    if not isinstance(block, PackedBlock) or _is_altered(block, own_hooks=block.sharded):
        return False
    attn: Any = block.attn
    mlp: Any = block.mlp
    linear: tuple[tuple[Any, str], ...] = ((attn, 'qkv'), (attn, 'proj'))
    if type(mlp) is Mlp:
        linear += ((mlp, 'fc1'), (mlp, 'fc2'))
    drops = ('drop_path1', 'drop_path2')
    return (
        type(attn) is Attention
        and type(mlp) in (Mlp, GluMlp, SwiGLU)
        and all(type(parent._modules[name]) is nn.Linear for parent, name in linear)
        and all(type(block._modules[name]) in (DropPath, nn.Identity) for name in drops)
    )


def _is_altered(module: nn.Module, own_hooks: bool = False) -> bool:
    """Return whether a module or one of its submodules has hooks or a replaced ``forward``.

    Args:
        module: The module.
        own_hooks: Whether to ignore one forward hook and one forward pre-hook of the module.

    Returns:
        True if calling the module does more than its class defines.
    """
    # This runs for every block in every step, and attribute access of nn.Module is slow.
    modules: list[Any] = [module]
    allowed = int(own_hooks)
    while modules:
        own = modules.pop().__dict__
        if (
            len(own['_forward_hooks']) > allowed
            or len(own['_forward_pre_hooks']) > allowed
            or own['_backward_hooks']
            or own['_backward_pre_hooks']
            or 'forward' in own
        ):
            return True
        modules += [child for child in own['_modules'].values() if child is not None]
        allowed = 0
    return False


def _call_block(block: nn.Module, groups: Groups, crops: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Call a block on the crops of each size, and keep their layout."""
    results = [block(crop) for crop in take_out(crops, groups)]
    return lay_out(results, drop=len(crops) == len(groups))[0]


def drops_paths(blocks: Iterable[nn.Module]) -> bool:
    """Return whether blocks of timm's ViT skip some of their input at random.

    Args:
        blocks: The blocks.

    Returns:
        True if any block has stochastic depth and is in training mode.
    """
    branches = ('drop_path1', 'drop_path2')
    return any(_drop_rate(getattr(block, name, None)) for block in blocks for name in branches)


class PackedBlock(Block):
    """Block of timm's ViT that can also run on packed crops of several sizes.

    Its forward method is timm's. The methods for packed crops use the weights directly. For blocks
    that may have adapters or hooks, call :func:`run_block` and :func:`run_last_block` instead.

    Attributes:
        sharded: Whether the weights are sharded over the ranks.
        compiled: Whether to compile operations on single tokens with ``torch.compile``. The number
            of tokens is dynamic, so that other crops, masks or missing sensors cause no
            recompilation. Attention and stochastic depth are not compiled.
        nested_graphs: See *nested* of :func:`geofm.models.packed_attention.attend`.
    """

    sharded = False
    compiled = False
    nested_graphs = True

    def shard(self, mesh: 'DeviceMesh') -> None:
        """Shard the weights over ranks with FSDP2. All forward methods gather them.

        Args:
            mesh: Device mesh of the ranks.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        for name in ('forward_packed', 'forward_wanted'):
            register_fsdp_forward_method(self, name)
        self.sharded = True

    def forward_packed(self, groups: Groups, *crops: Tensor) -> tuple[Tensor, ...]:
        """Run the block on the packed tokens of all crops.

        Args:
            groups: The groups of sequences.
            crops: Tokens of the crops, as returned by :func:`lay_out`.

        Returns:
            One tensor per input, of the same shape.
        """

        def attention(x: Tensor, groups: Groups) -> Tensor:
            return self._run(_project, self._attend(x, groups), x)

        def mlp(x: Tensor, groups: Groups) -> Tensor:
            return self._run(_mlp, x)

        attended = _add_branch(crops, groups, attention, self.drop_path1)
        return _add_branch(attended, groups, mlp, self.drop_path2)

    def forward_wanted(self, groups: Groups, kept: Kept, *crops: Tensor) -> Tensor:
        """Run the block with all tokens as keys and values, but output selected tokens only.

        Args:
            groups: The groups of sequences.
            kept: The selected tokens.
            crops: Tokens of the crops, as returned by :func:`lay_out`.

        Returns:
            The selected tokens, of shape (M, D).
        """
        before = _pack(crops)[_rows(groups, kept)]
        chosen = _draw_subsets(groups, _drop_rate(self.drop_path1), before.device)
        x, wanted = _pack(crops, chosen), _rows(groups, kept, chosen)
        attended = self._attend(x, _chosen_of(groups, chosen))[wanted]
        # Only gates of attention need the input rows, and few models have them.
        gated = x if self.attn.gate is None else x[wanted]
        rows = before + _scale(groups, kept, chosen) * self._run(_project, attended, gated)
        # Skipping rows is not worth it for so few; dropped ones are multiplied by zero.
        chosen = _draw_subsets(groups, _drop_rate(self.drop_path2), before.device)
        return rows + _scale(groups, kept, chosen) * self._run(_mlp, rows)

    def _attend(self, x: Tensor, groups: Groups) -> Tensor:
        """Compute attention of packed tokens (T, D), without the projection."""
        attn: Any = self.attn
        dropout = attn.attn_drop.p if attn.training else 0.0
        return attend(self._run(_queries, x), groups, dropout, nested=self.nested_graphs)

    def _run(self, function: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
        """Run a function that processes each token independently, compiled if enabled."""
        return (_compiled(function) if self.compiled else function)(self, *tokens)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function once for all blocks."""
    return torch.compile(function, dynamic=True)


def run_block(block: nn.Module, groups: Groups, *crops: Tensor) -> tuple[Tensor, ...]:
    """Run a block of timm's ViT on crops of several sizes.

    With stochastic depth in training, each of the two branches runs on a random subset of the crops
    of each size, as in DINOv2, so that dropped crops take no time. A block that is not plain, see
    :func:`is_plain`, is called on the crops of each size.

    Args:
        block: The block.
        groups: The groups of sequences.
        crops: Tokens of the crops, as returned by :func:`lay_out`.

    Returns:
        One tensor per input, of the same shape.
    """
    if not is_plain(block):
        return _call_block(block, groups, crops)
    blk: Any = block
    packed: tuple[Tensor, ...] = blk.forward_packed(groups, *crops)
    return packed


def run_last_block(block: nn.Module, groups: Groups, kept: Kept, *crops: Tensor) -> Tensor:
    """Run the last block of a ViT, and compute the output of selected tokens only.

    All tokens are keys and values. Projection and MLP run for the selected tokens only.

    Args:
        block: The block.
        groups: The groups of sequences.
        kept: The selected tokens.
        crops: Tokens of the crops, as returned by :func:`lay_out`.

    Returns:
        The selected tokens, of shape (M, D).
    """
    if not is_plain(block):
        return _pack(_call_block(block, groups, crops))[_rows(groups, kept)]
    blk: Any = block
    wanted: Tensor = blk.forward_wanted(groups, kept, *crops)
    return wanted


def draw_subset(count: int, rate: float) -> Tensor:
    """Draw the sequences of a batch that stochastic depth keeps.

    Args:
        count: Number of sequences B.
        rate: Fraction to drop.

    Returns:
        Indices of max(1, floor((1 - rate) B)) sequences, int64, on the CPU.
    """
    return torch.randperm(count)[: max(1, int(count * (1 - rate)))]


def embed_patches(embed: nn.Module, images: Tensor) -> Tensor:
    """Apply timm's patch embedding.

    A convolution whose stride is the kernel size is computed faster as a matrix product.

    Args:
        embed: The patch embedding.
        images: Images of shape (B, C, H, W).

    Returns:
        Tokens of shape (B, H/p, W/p, D).
    """
    patch_embed: Any = embed
    plain = type(embed) is PatchEmbed and type(patch_embed.proj) is nn.Conv2d
    if not plain or _is_altered(embed):
        return patch_embed(images)
    height, width = patch_embed.patch_size
    if images.shape[-2] % height or images.shape[-1] % width:
        # timm raises the error.
        return patch_embed(images)
    patches = images.unflatten(2, (-1, height)).unflatten(4, (-1, width)).permute(0, 2, 4, 1, 3, 5)
    projection = patch_embed.proj
    flat = patches.reshape(-1, projection.weight[0].numel())
    rows = _product(flat, projection.weight.flatten(1), projection.bias)
    return patch_embed.norm(rows.unflatten(0, patches.shape[:3]))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to rows.

    On a CPU, PyTorch copies the bias to the result before it adds the product, which takes 20 %
    more time than adding the bias in place. A GPU does both in one operation.
    """
    if bias is None or not x.is_cpu or torch.is_autocast_enabled('cpu'):
        return nn.functional.linear(x, weight, bias)
    return torch.mm(x, weight.T).add_(bias)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _product(x, layer.weight, layer.bias)


def _scaled_linear(layer: nn.Linear, scale: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer followed by LayerScale as one layer.

    Scaling the weights takes hardly any time, and the output of the layer is not kept for the
    gradient of the scales. In float16, weights scaled by 1e-5 would underflow.
    """
    if type(scale) is not LayerScale or _in_float16(x.device.type):
        return scale(_linear(layer, x))
    bias = None if layer.bias is None else layer.bias * scale.gamma
    return _product(x, layer.weight * scale.gamma[:, None], bias)


def _in_float16(device_type: str) -> bool:
    on = torch.is_autocast_enabled(device_type)
    return on and torch.get_autocast_dtype(device_type) == torch.float16


def _queries(block: Any, x: Tensor) -> Tensor:
    """Compute queries, keys and values of tokens (T, D), shape (T, 3, heads, d)."""
    attn = block.attn
    qkv: Tensor = _linear(attn.qkv, block.norm1(x)).unflatten(1, (3, attn.num_heads, attn.head_dim))
    if isinstance(attn.q_norm, nn.Identity):
        return qkv
    query, key, value = qkv.unbind(1)
    return torch.stack([attn.q_norm(query), attn.k_norm(key), value], dim=1)


def _project(block: Any, attended: Tensor, x: Tensor) -> Tensor:
    """Apply the layers after attention. Gates use *x*, the input of the branch."""
    attn = block.attn
    attended = attn.norm(attended)
    if attn.gate is not None:
        attended = attended * attn.gate(block.norm1(x)).sigmoid()
    return attn.proj_drop(_scaled_linear(attn.proj, block.ls1, attended))


def _mlp(block: Any, x: Tensor) -> Tensor:
    layers, x = block.mlp, block.norm2(x)
    if type(block.mlp) is not Mlp:
        return block.ls2(layers(x))
    hidden = layers.norm(layers.drop1(layers.act(_linear(layers.fc1, x))))
    return layers.drop2(_scaled_linear(layers.fc2, block.ls2, hidden))


def _drop_rate(drop: nn.Module | None) -> float:
    return float(drop.drop_prob or 0.0) if isinstance(drop, DropPath) and drop.training else 0.0


def _draw_subsets(groups: Groups, rate: float, device: torch.device) -> _Subsets:
    if not rate:
        return None
    subsets = [draw_subset(count, rate) for count, _ in groups]
    # One copy for all groups.
    return list(to_device(torch.cat(subsets), device).split([len(subset) for subset in subsets]))


def _chosen_of(groups: Groups, chosen: _Subsets) -> Groups:
    if chosen is None:
        return groups
    return tuple(
        (len(indices), length) for indices, (_, length) in zip(chosen, groups, strict=True)
    )


def _pack(crops: Sequence[Tensor], chosen: _Subsets = None) -> Tensor:
    """Concatenate the tokens of the chosen sequences as rows."""
    if chosen is not None:
        crops = [_select(crop, indices) for crop, indices in zip(crops, chosen, strict=True)]
    rows = [crop.flatten(0, 1) for crop in crops]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _add_branch(
    crops: Sequence[Tensor],
    groups: Groups,
    branch: Callable[[Tensor, Groups], Tensor],
    drop: nn.Module,
) -> tuple[Tensor, ...]:
    """Add a residual branch, which runs on all crops or on a random subset."""
    chosen = _draw_subsets(groups, _drop_rate(drop), crops[0].device)
    if chosen is None:
        rows = branch(_pack(crops), groups)
        parts = rows.split([crop.shape[0] * crop.shape[1] for crop in crops])
        return tuple(crop + part.view_as(crop) for crop, part in zip(crops, parts, strict=True))
    taken = [_Take.apply(crop, indices) for crop, indices in zip(crops, chosen, strict=True)]
    some = _chosen_of(groups, chosen)
    rows = branch(_pack([subset for _, subset in taken]), some)
    parts = rows.split([count * length for count, length in some])
    return tuple(
        crop.flatten(1)
        .index_add(
            0, indices, part.view(len(indices), -1).to(crop.dtype), alpha=len(crop) / len(indices)
        )
        .view_as(crop)
        for (crop, _), indices, part in zip(taken, chosen, parts, strict=True)
    )


class _Take(torch.autograd.Function):
    """Return a batch and some of its sequences.

    As two separate operations, the backward pass would write the gradient of the subset into a
    tensor of zeros, then add it.
    """

    @staticmethod
    def forward(ctx: Any, crop: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return crop.view_as(crop), _select(crop, indices)

    @staticmethod
    def backward(ctx: Any, of_crop: Tensor, of_subset: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return of_crop.flatten(1).index_add(0, indices, of_subset.flatten(1)).view_as(of_crop), None


def _select(crop: Tensor, indices: Tensor) -> Tensor:
    # With each sequence as one row: copying few long rows is much faster than many short ones.
    return crop.flatten(1).index_select(0, indices).view(len(indices), *crop.shape[1:])


def _rows(groups: Groups, kept: Kept, chosen: _Subsets = None) -> Tensor:
    """Return the rows of the selected tokens in the packed tensor of the chosen sequences.

    Rows of tokens in other sequences are valid indices without meaning.
    """
    starts, row = [], 0
    for i, (count, length) in enumerate(groups):
        every = torch.arange(count, device=kept.tokens.device)
        indices = every if chosen is None else chosen[i]
        # A sequence that was not chosen starts at row 0, so that its rows are valid indices.
        first = row + length * every[: len(indices)]
        starts.append(torch.zeros_like(every).index_copy(0, indices, first))
        row += len(indices) * length
    return torch.cat(starts)[kept.sequences] + kept.tokens


def _scale(groups: Groups, kept: Kept, chosen: _Subsets) -> Tensor | float:
    """Return the factor of a branch for each selected token: 0 in sequences not chosen."""
    if chosen is None:
        return 1.0
    scales = [
        torch.zeros(count, device=indices.device).index_fill(0, indices, count / len(indices))
        for indices, (count, _) in zip(chosen, groups, strict=True)
    ]
    return torch.cat(scales)[kept.sequences, None]
