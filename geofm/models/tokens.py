"""From images of several sensors to one sequence of tokens, whole or of packed crops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geofm.models.dates import NO_DATE, DayOfYear
from geofm.models.fusion import CrossAttentionFusion, LinearFusion
from geofm.models.packed import (
    Kept,
    drops_paths,
    embed_patches,
    lay_out,
    run_block,
    run_last_block,
    take_out,
)
from geofm.models.packed_attention import Groups
from geofm.sensors import SENSORS, BandError, check_channels

#: Columns of a `dates` tensor.
_DATE_COLUMN = {key: i for i, key in enumerate(SENSORS)}

#: Key of the one encoder of early fusion, which sees the bands of all sensors.
EARLY = 'vit'


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Crops of one size, and what of their tokens is wanted.

    Attributes:
        image: Normalised crops of shape (B, C, H, W).
        dates: See :meth:`MultiSensorViT.forward_features`.
        masks: The same.
        present: The same.
        patches: Patches whose tokens are wanted beside CLS, counted through all crops: indices
            into (B x N,), int64 of shape (M,). None: no patches.
    """

    image: Tensor
    dates: Tensor | None = None
    masks: Tensor | None = None
    present: Tensor | None = None
    patches: Tensor | None = None


class ViewTokens(NamedTuple):
    """Fused tokens of a view.

    Attributes:
        cls: CLS tokens of shape (B, D).
        patches: Tokens of the patches that were wanted, of shape (M, D).
    """

    cls: Tensor
    patches: Tensor


class SensorTokens(nn.Module):
    """One ViT a sensor, or one of all, and what makes one sequence of their tokens.

    What :class:`geofm.models.MultiSensorViT` computes; that class builds it and speaks timm's
    language.

    Attributes:
        sensors: Keys of the sensors.
        bands: Names of the input channels.
        patch_size: Side of a patch in pixels.
        num_prefix_tokens: CLS and registers.
        depth: Number of blocks of each ViT.
        encoders: A timm ``VisionTransformer`` for each sensor, by its key; of early fusion one,
            under 'vit'.
        encoder_bands: Names of the channels of each encoder, in canonical order, whatever the
            input's: all that a sensor has if it is absent from the input.
        mask_token: Token in place of a hidden patch, of each encoder, shape (E, D).
        stand_in: Tokens in place of an absent sensor: CLS, registers, a patch; of each sensor.
        fusion: What makes one sequence of two; None with one encoder.
    """

    sensors: tuple[str, ...]
    bands: tuple[str, ...]
    patch_size: int
    num_prefix_tokens: int
    depth: int
    encoders: nn.ModuleDict
    encoder_bands: dict[str, tuple[str, ...]]
    day_of_year: DayOfYear
    mask_token: nn.Parameter
    stand_in: nn.Parameter
    fusion: LinearFusion | CrossAttentionFusion | None
    #: Input channels of each sensor at hand, in the order of the encoder.
    _channels: dict[str, list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self._run_block: Callable[..., Any] = run_block
        self._run_last_block: Callable[..., Any] = run_last_block

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, to save memory.

        Args:
            enable: Whether to.
        """
        self.grad_checkpointing = enable

    def compile_blocks(self) -> None:
        """Compile the blocks as :meth:`forward_views` runs them, with ``torch.compile``."""
        self._run_block = torch.compile(run_block)
        self._run_last_block = torch.compile(run_last_block)

    def _encoder(self, key: str) -> VisionTransformer:
        encoder = self.encoders[key]
        assert isinstance(encoder, VisionTransformer)
        return encoder

    def _embed(self, key: str, view: View) -> Tensor:
        """Input of the first block of one sensor's ViT."""
        encoder = self._encoder(key)
        tokens = embed_patches(encoder.patch_embed, self._pixels(key, view))
        if view.masks is not None:
            index = list(self.encoders).index(key)
            if key == EARLY and view.masks.ndim != 2:
                raise ValueError(
                    'early fusion hides a patch in all sensors or in none: masks must be of shape '
                    f'(B, N), not {tuple(view.masks.shape)}'
                )
            hidden = view.masks if view.masks.ndim == 2 else view.masks[:, index]
            token = self.mask_token[index].to(tokens.dtype)
            tokens = torch.where(hidden.reshape(*tokens.shape[:3], 1), token, tokens)
        tokens = encoder.norm_pre(encoder._pos_embed(tokens))
        if view.dates is not None:
            encoding = self._encode_dates(key, view.dates, view.present)
            tokens = tokens + encoding[:, None].to(tokens.dtype)
        return tokens

    def _pixels(self, key: str, view: View) -> Tensor:
        """Input of one encoder; of early fusion, zeros for a sensor that is absent: its mean."""
        if key != EARLY:
            return _take_channels(view.image, self._channels[key])
        parts = []
        for index, sensor in enumerate(self.sensors):
            if sensor not in self._channels:
                count = len(SENSORS[sensor].bands)
                parts.append(view.image.new_zeros(len(view.image), count, *view.image.shape[2:]))
                continue
            part = _take_channels(view.image, self._channels[sensor])
            if view.present is not None:
                part = torch.where(view.present[:, index, None, None, None], part, 0)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _encode_dates(self, key: str, dates: Tensor, present: Tensor | None) -> Tensor:
        """Encoding of a sensor's dates, (B, D); of early fusion, the sum over those present."""
        if key != EARLY:
            return self.day_of_year(dates[:, _DATE_COLUMN[key]])
        encodings = []
        for index, sensor in enumerate(self.sensors):
            if sensor not in self._channels:
                continue
            days = dates[:, _DATE_COLUMN[sensor]]
            if present is not None:
                days = torch.where(present[:, index], days, NO_DATE)
            encodings.append(self.day_of_year(days))
        return torch.stack(encodings).sum(dim=0)

    def _runs(self, key: str) -> bool:
        """Whether there is input for an encoder."""
        return key == EARLY or key in self._channels

    def _check_channels(self, image: Tensor) -> None:
        """Refuse images whose channels are not the model's bands, and any if they are unknown."""
        if not self.bands:
            raise BandError(
                'which bands are the channels? Their number does not tell: name them with '
                'bands=[...], or load a checkpoint, which names them'
            )
        check_channels(image, self.bands)

    def _stand_in(self, key: str, grid: tuple[int, int]) -> Tensor:
        """Tokens in place of an absent sensor's, of shape (1, L, D)."""
        encoder = self._encoder(key)
        token = self.stand_in[self.sensors.index(key)]
        prefix = 0 if encoder.no_embed_class else self.num_prefix_tokens
        positions = resample_abs_pos_embed(
            encoder.pos_embed,
            new_size=list(grid),
            old_size=list(encoder.patch_embed.grid_size),
            num_prefix_tokens=prefix,
        )[:, prefix:]
        # Patches keep their positions: as the query of cross-attention they must differ.
        return torch.cat([token[None, :-1], token[-1] + positions], dim=1)

    def _run(
        self,
        x: Tensor,
        take: Sequence[int],
        dates: Tensor | None,
        masks: Tensor | None,
        present: Tensor | None,
    ) -> list[list[Tensor]]:
        """Normalised tokens of every encoder after each of the blocks in *take*."""
        self._check_channels(x)
        taken: list[list[Tensor]] = [[] for _ in take]
        view = View(x, dates, masks, present)
        for key in self.encoders:
            encoder = self._encoder(key)
            if not self._runs(key):
                absent = self._stand_in(key, self._grid(x)).expand(len(x), -1, -1).to(x.dtype)
                for tokens_at in taken:
                    tokens_at.append(absent)
                continue
            tokens = self._embed(key, view)
            for depth, block in enumerate(encoder.blocks[: max(take) + 1]):
                tokens = self._checkpointed(block, tokens)
                if depth in take:
                    normalised = self._replace_absent(key, encoder.norm(tokens), view)
                    taken[list(take).index(depth)].append(normalised)
        return taken

    def _fuse(self, tokens: list[Tensor]) -> Tensor:
        return self.fusion(tokens) if self.fusion is not None else tokens[0]

    def forward_features(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        masks: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Tokens of a batch.

        Args:
            x: Normalised images of shape (B, C, H, W), channels as in :attr:`bands`; H and W
                multiples of the patch size.
            dates: Days since 1970-01-01 of each sensor of :data:`geofm.sensors.SENSORS`, int64 of
                shape (B, 2); :data:`geofm.models.dates.NO_DATE` where unknown. None: unknown.
            masks: True where a patch is hidden, bool of shape (B, N), or (B, S, N) where not
                all of :attr:`sensors` hide the same, which early fusion cannot.
            present: Whether each of :attr:`sensors` is present in a sample, bool of shape
                (B, S). None: all are. Early fusion sees zeros, the mean of normalised bands, in
                place of an absent sensor.

        Returns:
            Fused tokens of shape (B, 1 + registers + N, D): CLS, registers, patches row by row.

        Raises:
            BandError: If the images do not have one channel a band.
            ValueError: If the model fuses early and *masks* differ between sensors.
        """
        (tokens,) = self._run(x, [self.depth - 1], dates, masks, present)
        fused = self._fuse(tokens)
        return self._let_all_take_part(fused) if is_distributed() else fused

    def forward_views(self, views: Sequence[View]) -> list[ViewTokens]:
        """Tokens of crops of several sizes, of which few are wanted: how to train.

        All crops run as one packed sequence. In the last block, projection, MLP and what follows
        run for CLS and the wanted patches alone, unless the fusion needs every token.

        Args:
            views: Crops of one size each.

        Returns:
            What is wanted of each view: as from :meth:`forward_features`, but for rounding.
            Stochastic depth leaves out a random subset of each view's crops in each branch.

        Raises:
            BandError: If the images do not have one channel a band.
        """
        for view in views:
            self._check_channels(view.image)
        kept = [self._kept(view) for view in views]
        if isinstance(self.fusion, CrossAttentionFusion):
            # Every token of the other sensor is a key, so none can be left out before.
            every = [self._run_views(key, views) for key in self.sensors]
            rows = [
                self._fuse(list(tokens))[part.sequences, part.tokens]
                for part, *tokens in zip(kept, *every, strict=True)
            ]
        else:
            wanted = [self._run_wanted(key, views, kept) for key in self.encoders]
            rows = list(self._fuse(wanted).split([len(part.tokens) for part in kept]))
        rows[0] = self._let_all_take_part(rows[0])
        return [
            ViewTokens(part[: len(view.image)], part[len(view.image) :])
            for view, part in zip(views, rows, strict=True)
        ]

    def _kept(self, view: View) -> Kept:
        """Where the CLS tokens and the wanted patches of a view are."""
        crops = torch.arange(len(view.image), device=view.image.device)
        patches = crops.new_empty(0) if view.patches is None else view.patches
        height, width = self._grid(view.image)
        return Kept(
            torch.cat([crops, patches // (height * width)]),
            torch.cat([crops * 0, self.num_prefix_tokens + patches % (height * width)]),
        )

    def _run_views(self, key: str, views: Sequence[View]) -> list[Tensor]:
        """All normalised tokens of one sensor's crops."""
        if not self._runs(key):
            return [
                self._stand_in(key, self._grid(view.image)).expand(len(view.image), -1, -1)
                for view in views
            ]
        crops, groups = self._run_blocks(key, views, self.depth)
        return [
            self._replace_absent(key, self._encoder(key).norm(tokens), view)
            for tokens, view in zip(take_out(crops, groups), views, strict=True)
        ]

    def _run_wanted(self, key: str, views: Sequence[View], kept: Sequence[Kept]) -> Tensor:
        """Normalised tokens of one sensor, those that are wanted, of shape (M, D)."""
        if not self._runs(key):
            return torch.cat(
                [
                    self._stand_in(key, self._grid(view.image))[0, part.tokens]
                    for view, part in zip(views, kept, strict=True)
                ]
            )
        encoder = self._encoder(key)
        crops, groups = self._run_blocks(key, views, self.depth - 1)
        # Crops are counted through all views.
        first = [0, *accumulate(len(view.image) for view in views)]
        together = Kept(
            torch.cat([part.sequences + first[i] for i, part in enumerate(kept)]),
            torch.cat([part.tokens for part in kept]),
        )
        last = self._checkpointed(
            self._run_last_block, encoder.blocks[-1], groups, together, *crops
        )
        rows = encoder.norm(last)
        return torch.cat(
            [
                self._replace_absent(key, tokens, view, part)
                for tokens, view, part in zip(
                    rows.split([len(part.tokens) for part in kept]), views, kept, strict=True
                )
            ]
        )

    def _run_blocks(
        self, key: str, views: Sequence[View], count: int
    ) -> tuple[tuple[Tensor, ...], Groups]:
        """Tokens of one sensor's crops after the first blocks of its ViT, and their layout."""
        blocks = self._encoder(key).blocks
        crops, groups = lay_out([self._embed(key, view) for view in views], drops_paths(blocks))
        for block in blocks[:count]:
            crops = self._checkpointed(self._run_block, block, groups, *crops)
        return crops, groups

    def _checkpointed(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a block, and if so asked again in the backward pass."""
        if self.grad_checkpointing and self.training:
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)

    def _replace_absent(
        self, key: str, tokens: Tensor, view: View, kept: Kept | None = None
    ) -> Tensor:
        """Put the stand-in's tokens where a sensor is not present in a crop."""
        if view.present is None or self.fusion is None:
            return tokens
        stand_in = self._stand_in(key, self._grid(view.image)).to(tokens.dtype)
        present = view.present[:, self.sensors.index(key)]
        if kept is None:
            return torch.where(present[:, None, None], tokens, stand_in)
        return torch.where(present[kept.sequences, None], tokens, stand_in[0, kept.tokens])

    def _let_all_take_part(self, tokens: Tensor, blocks: int | None = None) -> Tensor:
        """Give parameters that the input did not need a gradient of zero while training.

        Without dates their encoding is idle, without masks the mask token, and so on. Distributed
        training waits for all gradients; finding out which will not come takes a search through
        the graph in every step.

        Args:
            tokens: Tokens that the loss will depend on.
            blocks: Number of blocks that ran; None: all of them.

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
        takes_part: Tensor = _TakePart.apply(tokens, *idle) if idle else tokens
        return takes_part

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Patches down and across."""
        return x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


class _TakePart(torch.autograd.Function):
    """Tokens as they are, which depend on further parameters in name only."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _take_channels(image: Tensor, channels: list[int]) -> Tensor:
    """Channels of an image: a run of them as a view, others gathered."""
    first, last = channels[0], channels[-1]
    is_run = channels == list(range(first, last + 1))
    return image[:, first : last + 1] if is_run else image[:, channels]
