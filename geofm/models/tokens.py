"""Compute one sequence of tokens from images of several sensors, or from packed crops."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from geofm.models import segments
from geofm.models.fusion import Fusion
from geofm.models.inputs import SensorInputs, View
from geofm.models.packed import (
    Kept,
    PackedBlock,
    drops_paths,
    lay_out,
    run_block,
    run_last_block,
    take_out,
)
from geofm.models.packed_attention import Groups
from geofm.models.recompute import Recompute, kept_operators

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ('SensorTokens', 'View', 'ViewTokens', 'is_distributed')


class ViewTokens(NamedTuple):
    """Fused tokens of a view.

    Attributes:
        cls: CLS tokens of shape (B, D).
        patches: Tokens of the patches that the view asked for, of shape (M, D).
    """

    cls: Tensor
    patches: Tensor


class SensorTokens(SensorInputs):
    """ViTs of a model and the fusion of their tokens.

    This base class implements the computations of :class:`geofm.models.MultiSensorViT`. The
    subclass builds the modules and implements timm's interface.

    Attributes:
        fusion: Module that fuses the sequences of several ViTs into one; None with one ViT.
        absent: Keys of sensors that count as missing if *present* is not given. Tasks that pass
            only images to the model use this.
    """

    fusion: Fusion | None
    absent: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing: Recompute = False

    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """Recompute each block's activations in the backward pass, to save memory.

        Args:
            enable: Whether to recompute, or the operations not to recompute, see
                :data:`Recompute`.
        """
        self.grad_checkpointing = enable
        for block in self._packed_blocks():
            block.nested_graphs = isinstance(enable, bool)

    def compile_blocks(self) -> None:
        """Compile the blocks for :meth:`forward_views` with ``torch.compile``.

        See :class:`geofm.models.packed.PackedBlock`.
        """
        for block in self._packed_blocks():
            block.compiled = True

    def _packed_blocks(self) -> Iterator[PackedBlock]:
        for key in self.encoders:
            for block in self._encoder(key).blocks:
                if isinstance(block, PackedBlock):
                    yield block

    def shard(self, mesh: 'DeviceMesh') -> None:
        """Shard the weights over ranks with FSDP2, each block separately.

        Args:
            mesh: Device mesh of the ranks.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for block in self._packed_blocks():
            block.shard(mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        # FSDP2 warns of returned views, which must not be changed in place; nothing does.
        warnings.filterwarnings('ignore', r'FSDP2-wrapped module .* returned a view tensor')
        for name in ('forward_views', 'forward_features', 'forward_intermediates', 'observe'):
            register_fsdp_forward_method(self, name)

    def _run(
        self,
        x: Tensor,
        take: Sequence[int],
        dates: Tensor | None,
        masks: Tensor | None,
        present: Tensor | None,
    ) -> list[list[Tensor]]:
        """Compute the normalised tokens of every encoder after each block in *take*."""
        self._check_channels(x)
        self._check_dates(dates)
        taken: list[list[Tensor]] = [[] for _ in take]
        if present is None and self.absent:
            here = [key not in self.absent for key in self.sensors]
            present = torch.tensor([here], device=x.device).expand(len(x), -1)
        view = View(x, dates, masks, present)
        for key in self.encoders:
            encoder = self._encoder(key)
            if not self._runs(key):
                absent = self._missing_tokens(key, view).expand(x.shape[0], -1, -1).to(x.dtype)
                for tokens_at in taken:
                    tokens_at.append(absent)
                continue
            tokens = self._embed(key, view)
            mask = self._attention_mask(key, view)
            for depth, block in enumerate(encoder.blocks[: max(take) + 1]):
                tokens = self._checkpointed(block, tokens, *mask)
                if depth in take:
                    normalised = self._handle_missing(key, encoder.norm(tokens), view)
                    taken[list(take).index(depth)].append(normalised)
        return taken

    def _attention_mask(self, key: str, view: View) -> tuple[Tensor, ...]:
        """Return additional arguments of a block: a mask of missing sensors, if needed."""
        if view.present is None or not self._is_joint(key):
            return ()
        present = self._presence(key, view)
        patches = self._patches_seen(view)
        return (segments.attention_mask(present, self.num_prefix_tokens, patches),)

    def _handle_missing(self, key: str, tokens: Tensor, view: View) -> Tensor:
        """Handle missing sensors in the output of a ViT.

        In a joint ViT, patch tokens are averaged over the sensors present. With one ViT per sensor,
        the tokens of a missing sensor are replaced by missing-sensor tokens.
        """
        if self._is_joint(key):
            present = self._presence(key, view)
            patches = self._patches_seen(view)
            return segments.average(tokens, self.num_prefix_tokens, patches, present)
        return self._replace_absent(key, tokens, view)

    def _fuse(self, tokens: list[Tensor]) -> Tensor:
        return self.fusion(tokens) if self.fusion is not None else tokens[0]

    def forward_features(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        masks: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Compute the fused tokens of a batch.

        Args:
            x: Normalised images of shape (B, C, H, W), with channels as in :attr:`bands`. H and W
                must be multiples of the patch size.
            dates: Days since 1970-01-01 of the sensors of :attr:`date_sensors`, int64 of shape
                (B, len(date_sensors)); :data:`geofm.models.NO_DATE` where unknown.
                None: all are unknown.
            masks: True where a patch is masked, bool of shape (B, N); or of shape (B, S, N) with
                one mask per sensor of :attr:`sensors`, which early fusion does not support.
            present: Whether each of :attr:`sensors` is present in a sample, bool of shape
                (B, S). None: all are. For a missing sensor, linear fusion and cross-attention use
                its learned missing-sensor tokens, and early fusion uses zeros, the mean of
                normalised bands. In a joint ViT no token attends to tokens of a missing sensor. If
                no sensor is present, patch tokens are zero.

        Returns:
            Fused tokens of shape (B, 1 + registers + N, D): CLS, registers, patches row by row.

        Raises:
            BandError: If the images do not have one channel per band.
            ValueError: If *masks* are per sensor with early fusion, or *dates* do not have one
                column for each of :attr:`date_sensors`.
        """
        (tokens,) = self._run(x, [self.depth - 1], dates, masks, present)
        fused = self._fuse(tokens)
        return self._keep_in_graph(fused) if is_distributed() else fused

    def forward_views(self, views: Sequence[View]) -> list[ViewTokens]:
        """Compute selected tokens of crops of several sizes, for training.

        All crops run as one packed sequence. In the last block, the projection, the MLP and all
        later layers run for CLS and the selected patches only, unless the fusion needs every token.
        In a joint ViT, the tokens of missing sensors are left out of the sequence. This copies
        *present* from a GPU to the CPU.

        Args:
            views: Views with crops of one size each.

        Returns:
            Selected tokens of each view, equal to those of :meth:`forward_features` up to rounding.
            With stochastic depth, each branch skips a random subset of the crops of each view.

        Raises:
            BandError: If the images do not have one channel per band.
        """
        for view in views:
            self._check_channels(view.image)
            self._check_dates(view.dates)
        kept = [self._kept(view) for view in views]
        if self.fusion is not None and self.fusion.needs_every_token:
            every = [self._run_views(key, views) for key in self.encoders]
            rows = [
                self._fuse(list(tokens))[part.sequences, part.tokens]
                for part, *tokens in zip(kept, *every, strict=True)
            ]
        else:
            wanted = [self._run_wanted(key, views, kept) for key in self.encoders]
            rows = list(self._fuse(wanted).split([len(part.tokens) for part in kept]))
        rows[0] = self._keep_in_graph(rows[0])
        return [
            ViewTokens(part[: len(view.image)], part[len(view.image) :])
            for view, part in zip(views, rows, strict=True)
        ]

    def _kept(self, view: View) -> Kept:
        """Return the positions of the CLS tokens and the selected patches of a view."""
        crops = torch.arange(len(view.image), device=view.image.device)
        patches = crops.new_empty(0) if view.patches is None else view.patches
        count = self._patches_seen(view)
        return Kept(
            torch.cat([crops, patches // count]),
            torch.cat([crops * 0, self.num_prefix_tokens + patches % count]),
        )

    def _run_views(self, key: str, views: Sequence[View]) -> list[Tensor]:
        """Compute all normalised tokens of one ViT for each view."""
        if not self._runs(key):
            return [
                self._missing_tokens(key, view).expand(len(view.image), -1, -1) for view in views
            ]
        if self._is_joint(key):
            return self._run_joint_views(key, views)
        crops, groups = self._run_blocks(key, [self._embed(key, v) for v in views], self.depth)
        return [
            self._replace_absent(key, self._encoder(key).norm(tokens), view)
            for tokens, view in zip(take_out(crops, groups), views, strict=True)
        ]

    def _run_wanted(self, key: str, views: Sequence[View], kept: Sequence[Kept]) -> Tensor:
        """Compute the selected normalised tokens of one ViT, of shape (M, D)."""
        if not self._runs(key):
            return torch.cat(
                [
                    self._missing_token_rows(key, view, part)
                    for view, part in zip(views, kept, strict=True)
                ]
            )
        if self._is_joint(key):
            return self._run_joint_wanted(key, views, kept)
        sequences = [self._embed(key, view) for view in views]
        rows = self._run_to_rows(key, sequences, [len(view.image) for view in views], kept)
        return torch.cat(
            [
                self._replace_absent(key, tokens, view, part)
                for tokens, view, part in zip(rows, views, kept, strict=True)
            ]
        )

    def _split_joint(
        self, key: str, views: Sequence[View]
    ) -> tuple[list[Tensor], list[list[segments.Group]]]:
        """Compute the input of a joint ViT, with the crops of each view grouped by presence."""
        sequences, grouped = [], []
        for view in views:
            tokens, present = self._embed(key, view), self._presence(key, view)
            if view.present is None:
                crops = torch.arange(len(tokens), device=tokens.device)
                grouped.append([segments.Group(crops, tuple(range(present.shape[1])))])
            else:
                grouped.append(segments.group(present))
            sequences += [
                segments.take_group(tokens, self.num_prefix_tokens, present.shape[1], part)
                for part in grouped[-1]
            ]
        return sequences, grouped

    def _run_joint_views(self, key: str, views: Sequence[View]) -> list[Tensor]:
        """Compute all normalised tokens of a joint ViT, averaged over the sensors present."""
        sequences, grouped = self._split_joint(key, views)
        crops, groups = self._run_blocks(key, sequences, self.depth)
        done = iter(take_out(crops, groups))
        results = []
        for view, parts in zip(views, grouped, strict=True):
            averaged = [
                segments.average(
                    self._encoder(key).norm(next(done)),
                    self.num_prefix_tokens,
                    self._patches_seen(view),
                    part.crops.new_ones(len(part.crops), len(part.sensors), dtype=torch.bool),
                )
                for part in parts
            ]
            order = torch.cat([part.crops for part in parts])
            results.append(torch.cat(averaged)[order.argsort()])
        return results

    def _run_joint_wanted(self, key: str, views: Sequence[View], kept: Sequence[Kept]) -> Tensor:
        """Compute the selected tokens of a joint ViT, averaged over sensors, of shape (M, D)."""
        sequences, grouped = self._split_joint(key, views)
        presence = [self._presence(key, view) for view in views]
        wanted = []
        for view, part, parts, present in zip(views, kept, grouped, presence, strict=True):
            count = self._patches_seen(view)
            wanted.append(segments.wanted_rows(part, parts, present, self.num_prefix_tokens, count))
        rows = self._run_to_rows(key, sequences, [len(view.image) for view in views], wanted)
        return torch.cat(
            [
                segments.average_rows(tokens, part, present)
                for tokens, part, present in zip(rows, kept, presence, strict=True)
            ]
        )

    def _run_to_rows(
        self, key: str, sequences: Sequence[Tensor], crops: Sequence[int], kept: Sequence[Kept]
    ) -> Sequence[Tensor]:
        """Compute the selected normalised tokens of each view.

        Args:
            key: Key of the ViT.
            sequences: Input of the first block, for all views.
            crops: Number of crops of each view.
            kept: Selected tokens of each view.

        Returns:
            Tokens of each view, of shape (M, D).
        """
        encoder = self._encoder(key)
        packed, groups = self._run_blocks(key, sequences, self.depth - 1)
        # Indices of sequences count through all views.
        first = [0, *accumulate(crops)]
        together = Kept(
            torch.cat([part.sequences + first[i] for i, part in enumerate(kept)]),
            torch.cat([part.tokens for part in kept]),
        )
        last = self._checkpointed(run_last_block, encoder.blocks[-1], groups, together, *packed)
        rows: Tensor = encoder.norm(last)
        return rows.split([len(part.tokens) for part in kept])

    def _run_blocks(
        self, key: str, sequences: Sequence[Tensor], count: int
    ) -> tuple[tuple[Tensor, ...], Groups]:
        """Run the first *count* blocks of a ViT; return the tokens and their layout."""
        blocks = self._encoder(key).blocks
        crops, groups = lay_out(sequences, drops_paths(blocks))
        for block in blocks[:count]:
            crops = self._checkpointed(run_block, block, groups, *crops)
        return crops, groups

    def _checkpointed(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a block, with activation checkpointing if it is enabled."""
        if not (self.grad_checkpointing and self.training):
            return run(*args)
        if self.grad_checkpointing is True:
            return checkpoint(run, *args, use_reentrant=False)
        kept = partial(
            create_selective_checkpoint_contexts, kept_operators(self.grad_checkpointing)
        )
        return checkpoint(run, *args, use_reentrant=False, context_fn=kept)

    def _replace_absent(
        self, key: str, tokens: Tensor, view: View, kept: Kept | None = None
    ) -> Tensor:
        """Replace the tokens of crops in which a sensor is missing by missing-sensor tokens."""
        if view.present is None or self.fusion is None:
            return tokens
        present = view.present[:, self.sensors.index(key)]
        if kept is None:
            missing = self._missing_tokens(key, view).to(tokens.dtype)
            return torch.where(present[:, None, None], tokens, missing)
        missing = self._missing_token_rows(key, view, kept).to(tokens.dtype)
        return torch.where(present[kept.sequences, None], tokens, missing)

    def _missing_token_rows(self, key: str, view: View, kept: Kept) -> Tensor:
        """Return the missing-sensor tokens for the selected tokens of a view, (M, D)."""
        tokens = self._missing_tokens(key, view)
        return tokens[0 if len(tokens) == 1 else kept.sequences, kept.tokens]

    def _keep_in_graph(self, tokens: Tensor, blocks: int | None = None) -> Tensor:
        """Give unused parameters a gradient of zero in training.

        For example, the date encoding is unused without dates, and the mask token without masks.
        Distributed training waits for the gradients of all parameters. Searching the graph for
        unused ones in every step would be slow.

        Args:
            tokens: Tokens that the loss will depend on.
            blocks: Number of blocks that ran; None: all.

        Returns:
            The same tokens.
        """
        if not (self.training and torch.is_grad_enabled()):
            return tokens
        idle = [self.mask_token, *self.day_of_year.parameters()]
        if self.fusion is not None:
            idle.append(self.stand_in)
        for key in self.encoders:
            encoder = self._encoder(key)
            left_out = encoder.blocks[blocks or self.depth :] if self._runs(key) else encoder
            idle += left_out.parameters()
        idle = [parameter for parameter in idle if parameter.requires_grad]
        kept_tokens: Tensor = _KeepInGraph.apply(tokens, *idle) if idle else tokens
        return kept_tokens


def is_distributed() -> bool:
    """Return whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


class _KeepInGraph(torch.autograd.Function):
    """Identity function of tokens that gives additional parameters a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
