"""The backbone: vision transformers for one or several sensors."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, cast

import torch
from timm.layers.drop import DropPath
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geofm.models.attention import TokensAndAttention, block_index, observe_blocks, take_rows
from geofm.models.by_name import BuiltByName
from geofm.models.dates import DayOfYear
from geofm.models.fusion import FUSIONS, Fusion, FusionArgs, one_vit_per_sensor
from geofm.models.inputs import View
from geofm.models.packed import PackedBlock
from geofm.models.segments import SensorPatchEmbed, sensor_weights, split
from geofm.models.tokens import SensorTokens, is_distributed
from geofm.sensors import (
    DEFAULT_SENSORS,
    RGB_BANDS,
    SENSORS,
    BandError,
    band_indices,
    check_bands,
    date_columns,
    sensor_channels,
)
from geofm.transforms import InputStatistics


class UnnamedBandsError(BandError):
    """Raised when the bands of the channels are unknown."""


def _default_bands(sensors: Sequence[str], in_chans: int) -> tuple[str, ...]:
    """Return the bands of an input with a given number of channels."""
    every = tuple(band for key in sensors for band in SENSORS[key].band_names)
    choices = [every, *(SENSORS[key].band_names for key in sensors)]
    if set(RGB_BANDS) <= set(every):
        choices.append(RGB_BANDS)
    for bands in choices:
        if len(bands) == in_chans:
            return bands
    raise UnnamedBandsError(
        f'the bands of the {in_chans} channels (in_chans) are unknown: the number is neither that '
        f'of all {len(every)} bands of {list(sensors)}, nor of one sensor, nor 3 for B04, B03, '
        'B02. Name them with bands=[...], which for an encoder of segmentation-models-pytorch is '
        'an argument of geofm.models.register_encoder, or load a checkpoint, which names them'
    )


class MultiSensorViT(BuiltByName, SensorTokens):
    """Vision transformer for any number of sensors, with one output sequence of tokens.

    With a single sensor the tokens are those of a timm ``VisionTransformer`` with register tokens
    (Darcet et al., 2024) and LayerScale. Several sensors, which show the same ground, are combined
    in one of these ways (*fusion*):

    * ``'linear'``: one ViT per sensor. Tokens of the same position, including CLS and registers,
      are concatenated and projected.
    * ``'xattn'``: one ViT per sensor. The tokens of the *query* sensor attend to the tokens of all
      other sensors.
    * ``'early'``: one ViT over the stacked bands of all sensors.
    * ``'joint'``: one ViT over the tokens of all sensors. Each sensor has a patch embedding and a
      sensor embedding; CLS and registers occur once. Patch tokens are averaged over the sensors.

    Any proper subset of the sensors may be missing: absent from the *bands*, or not *present* in a
    sample. With 'linear' and 'xattn', learned missing-sensor tokens replace the tokens of a missing
    sensor. With 'early', its bands are zero. With 'joint', its tokens are left out. With 'early', a
    masked patch is masked in all bands.

    The class implements timm's model interface, so that timm, TorchGeo and
    segmentation-models-pytorch can use it by name.

    Args:
        img_size: Image side in pixels for which positions are stored. Positions are interpolated
            for other sizes.
        patch_size: Side of a patch in pixels.
        in_chans: Number of input channels.
        num_classes: Number of classes of the head; 0: no head.
        global_pool: Pooling for the head: 'token' for the CLS token, 'avg' for the mean of patches.
        sensors: Keys of one or more sensors of :data:`geofm.sensors.SENSORS`.
        bands: Names of the input channels, in their order. Default, depending on *in_chans*: all
            bands of all sensors, all bands of one sensor, or B04, B03, B02 for 3 channels.
        fusion: Fusion of several sensors: a key of :data:`geofm.models.fusion.FUSIONS`.
        query: For cross-attention, key of the query sensor.
        nhead: For cross-attention, number of heads.
        nlayer: For cross-attention, number of layers.
        dropout: For cross-attention, dropout probability.
        shared: For cross-attention, whether all layers share their weights.
        embed_dim: Width of the tokens.
        depth: Number of blocks of each ViT.
        num_heads: Number of attention heads of each ViT.
        reg_tokens: Number of register tokens.
        init_values: Initial value of LayerScale.
        drop_rate: Dropout probability before the head.
        drop_path_rate: Rate of stochastic depth, equal for all blocks as in DINOv2.
        vit_args: Further arguments of timm's ``VisionTransformer``.

    Attributes:
        statistics: Statistics of the input in training, from the checkpoint. None: the built-in
            statistics.

    Raises:
        BandError: If the bands are unknown or given twice, do not match *in_chans*, or belong to
            a sensor that the model does not have.
        ValueError: If a sensor is unknown, the *query* is not one of the sensors, or *fusion* is
            unknown.
    """

    statistics: InputStatistics | None = None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 15,
        num_classes: int = 0,
        global_pool: Literal['token', 'avg'] = 'token',
        sensors: Sequence[str] = DEFAULT_SENSORS,
        bands: Sequence[str] | None = None,
        fusion: str = 'linear',
        query: str = DEFAULT_SENSORS[0],
        nhead: int = 4,
        nlayer: int = 6,
        dropout: float = 0.0,
        shared: bool = True,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        reg_tokens: int = 4,
        init_values: float | None = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **vit_args: Any,
    ) -> None:
        super().__init__()
        if isinstance(sensors, str) or not sensors or not set(sensors) <= set(SENSORS):
            raise ValueError(f'sensors must be some of {list(SENSORS)}, not {sensors!r}')
        if global_pool not in ('token', 'avg'):
            raise ValueError(f"global_pool must be 'token' or 'avg', not '{global_pool}'")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {list(FUSIONS)}, not '{fusion}'")
        self.sensors = tuple(key for key in SENSORS if key in sensors)
        self.bands = check_bands(bands) if bands else _default_bands(self.sensors, in_chans)
        by_sensor = self._assign_bands(in_chans)
        self.date_sensors = date_columns(list(self._channels))
        arrange = FUSIONS[fusion].arrange if len(self.sensors) > 1 else one_vit_per_sensor
        self.inputs = arrange(self.sensors)
        self.encoder_bands = {
            key if len(parts) == 1 else part[0]: tuple(
                b for sensor in part for b in by_sensor[sensor]
            )
            for key, parts in self.inputs.items()
            for part in parts
        }

        self.patch_embed_names = {
            key if len(parts) == 1 else part[0]: f'encoders.{key}.patch_embed'
            + ('' if len(parts) == 1 else f'.{part[0]}')
            for key, parts in self.inputs.items()
            for part in parts
        }
        self.patch_size = patch_size
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = 1 + reg_tokens
        self.has_class_token = True
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.depth = depth
        self.encoders = nn.ModuleDict(
            {
                key: VisionTransformer(
                    **self._patch_embedding(key),
                    img_size=img_size,
                    patch_size=patch_size,
                    num_classes=0,
                    embed_dim=embed_dim,
                    depth=depth,
                    num_heads=num_heads,
                    reg_tokens=reg_tokens,
                    init_values=init_values,
                    dynamic_img_size=True,
                    **{'no_embed_class': True, 'block_fn': PackedBlock, **vit_args},
                )
                for key in self.inputs
            }
        )
        for key in self.encoders:
            # A ViT without input is never trained.
            self._encoder(key).requires_grad_(self._runs(key))
        for key in self.encoder_bands:
            if key in self.sensors and key not in self._channels:
                self.get_submodule(self.patch_embed_names[key]).requires_grad_(False)
        if drop_path_rate:
            self._set_drop_path(drop_path_rate)
        self.day_of_year = DayOfYear(embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(len(self.encoders), embed_dim))
        self.sensor_embed = self.fusion = None
        if any(self._is_joint(key) for key in self.encoders):
            self.sensor_embed = nn.Parameter(torch.empty(len(self.sensors), embed_dim))
            nn.init.trunc_normal_(self.sensor_embed, std=0.02)
        if len(self.encoders) > 1:
            build = FUSIONS[fusion].build
            assert build is not None, f'fusion {fusion!r} has several ViTs and no module'
            args = FusionArgs(embed_dim, self.sensors, query, nhead, nlayer, dropout, shared)
            self.fusion = cast(Fusion, build(args))
            # Missing-sensor tokens per sensor: for CLS, for each register, and for patches.
            size = (len(self.sensors), self.num_prefix_tokens + 1, embed_dim)
            self.stand_in = nn.Parameter(torch.empty(size))
            nn.init.trunc_normal_(self.stand_in, std=0.02)
        self.head_drop = nn.Dropout(drop_rate)
        # TorchGeo assumes that the last child is the head and the first leaf the patch embedding.
        self.head: nn.Module
        self.reset_classifier(num_classes)

    def _assign_bands(self, in_chans: int) -> dict[str, tuple[str, ...]]:
        """Find the input channels of each sensor.

        Returns:
            The bands of each sensor that are in the input, in canonical order; all bands of a
            sensor that is not in the input.
        """
        if len(self.bands) != in_chans:
            raise BandError(
                f'in_chans={in_chans}, but {len(self.bands)} bands are given: {list(self.bands)}'
            )
        given = sensor_channels(self.bands)
        if foreign := set(given) - set(self.sensors):
            raise BandError(
                f'bands of {sorted(foreign)} are given, but the model has {list(self.sensors)}'
            )
        by_sensor = {
            key: tuple(b for b in SENSORS[key].band_names if b in self.bands or key not in given)
            for key in self.sensors
        }
        self._channels = {key: band_indices(by_sensor[key], self.bands) for key in given}
        return by_sensor

    def _patch_embedding(self, key: str) -> dict[str, Any]:
        """Return the arguments of timm's ViT for its patch embedding or embeddings."""
        parts = self.inputs[key]
        if len(parts) == 1:
            return {'in_chans': len(self.encoder_bands[key])}
        channels = {sensor: len(self.encoder_bands[sensor]) for (sensor,) in parts}
        embed_layer = partial(SensorPatchEmbed, channels)
        return {'in_chans': sum(channels.values()), 'embed_layer': embed_layer}

    def _set_drop_path(self, rate: float) -> None:
        """Set the same rate of stochastic depth in all blocks."""
        for key in self.encoders:
            for block in self._encoder(key).blocks:
                block.drop_path1 = DropPath(rate)
                block.drop_path2 = DropPath(rate)

    # -- timm's model interface -----------------------------------------------------------------

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and stride of the feature map after each block."""
        if self._reported_depth is None:
            self._reported_depth = self.depth
        return [
            {'module': f'blocks.{i}', 'num_chs': self.embed_dim, 'reduction': self.patch_size}
            for i in range(self.depth)
        ]

    @property
    def fc_norm(self) -> nn.Module:
        """Norm between pooling and head: the identity, because tokens are already normalised."""
        return nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and norms."""
        tokens = {'mask_token', 'stand_in', 'sensor_embed'}
        of_vit = {'pos_embed', 'cls_token', 'reg_token'}
        return tokens | {f'encoders.{key}.{name}' for key in self.encoders for name in of_vit}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups parameters into layers.

        Args:
            coarse: Not used; there is one granularity.

        Returns:
            Patterns of the stem and of the blocks.
        """
        return {
            'stem': (
                r'^mask_token|^sensor_embed|^day_of_year'
                r'|^encoders\.\w+\.(cls_token|reg_token|pos_embed|patch_embed|norm_pre)'
            ),
            'blocks': [
                (r'^encoders\.\w+\.blocks\.(\d+)', None),
                (r'^encoders\.\w+\.norm|^fusion|^stand_in', (99999,)),
            ],
        }

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head.

        Args:
            num_classes: Number of classes; 0: no head.
            global_pool: New pooling, 'token' or 'avg'; None: keep the pooling.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool  # type: ignore[assignment]
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        dates: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Any:
        """Compute fused tokens after several blocks, with the interface of timm's ViTs.

        Args:
            x: As in :meth:`forward_features`.
            indices: Blocks to return: a list of indices, an int for the last n, None for all.
            return_prefix_tokens: Whether to return CLS and registers with the patches.
            norm: Not used: tokens are always normalised, as fusion needs it.
            stop_early: Not used: with *intermediates_only*, blocks after the last returned one are
                never run.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Whether to return no final tokens.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.

        Returns:
            The final tokens and a list of features, or only the list. A feature has shape
            (B, D, H/p, W/p) or (B, N, D). With *return_prefix_tokens* it is a tuple with the prefix
            tokens.

        Raises:
            ValueError: If *output_fmt* is neither 'NCHW' nor 'NLC'.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', not '{output_fmt}'")
        wanted = self._blocks(indices)
        take = sorted(set(wanted))
        last = [] if intermediates_only or self.depth - 1 in take else [self.depth - 1]
        fused = [
            self._fuse(tokens) for tokens in self._run(x, [*take, *last], dates, None, present)
        ]

        if is_distributed():
            fused[-1] = self._keep_in_graph(fused[-1], max(*take, *last) + 1)

        height, width = self._grid(x)
        features: list[Any] = []
        for block in wanted:
            tokens = fused[take.index(block)]
            prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
            if output_fmt == 'NCHW':
                patches = patches.mT.unflatten(2, (height, width)).contiguous()
            features.append((patches, prefix) if return_prefix_tokens else patches)
        return features if intermediates_only else (fused[-1], features)

    def _blocks(self, indices: int | list[int] | None) -> list[int]:
        """Return the indices of the blocks to return, from 0.

        Decoders choose blocks when they are built. If weights of a model with another depth are
        loaded afterwards, the blocks at the same fraction of the depth are used.
        """
        reported = self._reported_depth
        if reported in (None, self.depth) or not isinstance(indices, list | tuple):
            take, _ = feature_take_indices(self.depth, indices)
            return list(take)
        chosen, _ = feature_take_indices(reported, indices)
        return [-(-(index + 1) * self.depth // reported) - 1 for index in chosen]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and apply the head.

        Args:
            x: Tokens of shape (B, L, D).
            pre_logits: Whether to return features without applying the head.

        Returns:
            Logits of shape (B, num_classes), or features of shape (B, D).
        """
        x = x[:, 0] if self.global_pool == 'token' else x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(
        self, x: Tensor, dates: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """Compute logits, or features if the model has no head.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.

        Returns:
            Tensor of shape (B, num_classes), or (B, D) without a head.
        """
        return self.forward_head(self.forward_features(x, dates, present=present))

    # -- attention maps -------------------------------------------------------------------------

    def observe(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        present: Tensor | None = None,
        *,
        block: int | None = None,
        query: Tensor | None = None,
        rollout: bool = False,
    ) -> TokensAndAttention:
        """Compute tokens and attention of a batch in one forward pass.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.
            block: Index of the block whose attention is returned; negative indices count from the
                end. None: no attention.
            query: Index of the query patch of each sample, row by row from 0, int64 of shape (B,).
                None: the query is the CLS token.
            rollout: Whether to return attention rollout, one map per sensor.

        Returns:
            Tokens, attention and rollout. Attention has one entry per sensor in the input, under
            its key (with early fusion, one entry 'vit'). Cross-attention adds the attention of its
            last layer from the query sensor's token to the patches of the other sensor, under
            'fusion'; or under 'fusion_KEY' for each of several other sensors. Rollout has the same
            entries without fusion. In a joint ViT, the attention of a query patch is averaged over
            its tokens of the sensors present, and the maps of all sensors share one softmax.

        Raises:
            IndexError: If there is no such block.
        """
        grid = self._grid(x)
        view = View(x, dates, None, present)
        index = None if block is None else block_index(block, self.depth)
        queries = None if query is None else self.num_prefix_tokens + query
        with ExitStack() as stack:
            seen = {
                key: stack.enter_context(
                    observe_blocks(
                        list(self._encoder(key).blocks), index, self._rows(key, queries, x), rollout
                    )
                )
                for key in self.encoders
                if self._runs(key)
            }
            (tokens,) = self._run(x, [self.depth - 1], dates, None, present)

        attention: dict[str, Tensor] = {}
        rolled: dict[str, Tensor] = {}
        for key, found in seen.items():
            if found.rows is not None:
                attention |= self._by_source(key, self._one_row(key, found.rows, view), grid)
            if found.product is not None:
                rolled |= self._by_source(key, found.product[:, 0], grid)
        if block is not None and self.fusion is not None:
            seen_by_fusion = self.fusion.attention(tokens)
            for sequence, weights in seen_by_fusion.items():
                name = 'fusion' if len(seen_by_fusion) == 1 else f'fusion_{self.sensors[sequence]}'
                rows = take_rows(weights, queries)[..., self.num_prefix_tokens :]
                attention[name] = rows.unflatten(-1, grid)
        return TokensAndAttention(self._fuse(tokens), attention, rolled)

    def _rows(self, key: str, queries: Tensor | None, x: Tensor) -> Tensor | None:
        """Return the indices of query tokens. In a joint ViT, a patch has one per sensor."""
        if queries is None or not self._is_joint(key):
            return queries
        height, width = self._grid(x)
        sensors = torch.arange(len(self._at_hand(key)), device=queries.device)
        return queries[:, None] + height * width * sensors

    def _one_row(self, key: str, rows: Tensor, view: View) -> Tensor:
        """Reduce attention to shape (B, heads, L); for a patch, average over present sensors."""
        if rows.ndim == 3:
            return rows
        weights = sensor_weights(self._presence(key, view)).to(rows.dtype)
        return (rows * weights[:, :, None, None]).sum(dim=1)

    def _by_source(self, key: str, weights: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Split weights of the patches by sensor, if a ViT has tokens of several sensors."""
        sources = self._at_hand(key) if self._is_joint(key) else [key]
        parts = split(weights, self.num_prefix_tokens, len(sources))
        return {
            source: part.unflatten(-1, grid) for source, part in zip(sources, parts, strict=True)
        }

    def cls_attention(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        block: int = -1,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the attention of the CLS token to the patches.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            block: Index of the block; negative indices count from the end.
            present: As in :meth:`forward_features`.

        Returns:
            Weights of shape (B, heads, H/p, W/p) for each source, see :meth:`observe`. The softmax
            is over all tokens. A map (in a joint ViT, the maps of all sensors) therefore sums to 1
            minus the attention to CLS and registers.

        Raises:
            IndexError: If there is no such block.
        """
        return self.observe(x, dates, present, block=block).attention

    def patch_attention(
        self,
        x: Tensor,
        query: Tensor,
        dates: Tensor | None = None,
        block: int = -1,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the attention of one patch per sample to all patches.

        Args:
            x: As in :meth:`forward_features`.
            query: Index of the query patch of each sample, row by row from 0, int64 of shape (B,).
            dates: As in :meth:`forward_features`.
            block: Index of the block; negative indices count from the end.
            present: As in :meth:`forward_features`.

        Returns:
            Maps as returned by :meth:`cls_attention`.

        Raises:
            IndexError: If there is no such block.
        """
        return self.observe(x, dates, present, block=block, query=query).attention

    def attention_rollout(
        self, x: Tensor, dates: Tensor | None = None, present: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute attention rollout (Abnar & Zuidema, 2020) from the CLS token to the patches.

        The rollout covers the blocks of each ViT, without fusion. The result has no values for CLS
        and registers, so a map sums to less than 1.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.

        Returns:
            A map of shape (B, H/p, W/p) for each sensor in the input, by its key ('vit' with early
            fusion).
        """
        return self.observe(x, dates, present, rollout=True).rollout
