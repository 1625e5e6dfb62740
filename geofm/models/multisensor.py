"""The backbone: one ViT a sensor, their tokens fused into one sequence; or one ViT of all."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from timm.layers.drop import DropPath
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geofm.models.attention import Observation, block_index, observe_blocks, take_rows
from geofm.models.by_name import BuiltByName
from geofm.models.dates import DayOfYear
from geofm.models.fusion import CrossAttentionFusion, LinearFusion
from geofm.models.tokens import EARLY, SensorTokens, is_distributed
from geofm.sensors import RGB_BANDS, SENSORS, BandError, band_indices, sensor_channels
from geofm.transforms.statistics import InputStatistics


class UnnamedBandsError(BandError):
    """The number of channels does not tell which bands they are."""


def _default_bands(sensors: Sequence[str], in_chans: int) -> tuple[str, ...]:
    """Bands of an input of which only the number of channels is known."""
    every = tuple(band for key in sensors for band in SENSORS[key].band_names)
    choices = [every, *(SENSORS[key].band_names for key in sensors)]
    if 's2' in sensors:
        choices.append(RGB_BANDS)
    for bands in choices:
        if len(bands) == in_chans:
            return bands
    raise UnnamedBandsError(
        f'in_chans={in_chans} does not tell which bands they are: it is neither all '
        f'{len(every)} of {list(sensors)} nor those of one sensor, nor 3 for '
        'B04, B03, B02. Name them with bands=[...], which for an encoder of '
        'segmentation-models-pytorch is an argument of geofm.models.register_encoder, or load a '
        'checkpoint, which names them'
    )


class MultiSensorViT(BuiltByName, SensorTokens):
    """Vision transformers, one a sensor, fused into one sequence of tokens.

    Each sensor has a timm ``VisionTransformer`` with register tokens (Darcet et al., 2024) and
    LayerScale. Its normalised tokens, CLS, registers and patches, are fused one by one with those
    of the other sensor, which show the same ground. With a single sensor there is no fusion and
    the tokens are those of the timm model.

    A sensor that is not among the *bands*, or not *present* in a sample, is replaced by learned
    stand-in tokens.

    With early fusion there is one ViT, over the bands of all sensors. In place of an absent sensor
    it sees zeros, the mean of normalised bands; patches are hidden in all bands at once.

    The class follows timm's model interface, so that timm, TorchGeo and
    segmentation-models-pytorch can use it by name.

    Args:
        img_size: Side, in pixels, for which positions are stored; other sizes are interpolated.
        patch_size: Side of a patch in pixels.
        in_chans: Number of input channels.
        num_classes: Number of classes of the head; 0: no head.
        global_pool: How tokens are pooled for the head: the CLS token, or the mean of patches.
        sensors: Keys of the sensors, of :data:`geofm.sensors.SENSORS`.
        bands: Names of the input channels, in their order. Default: all bands of all sensors if
            *in_chans* is their number, or all of one sensor, or B04, B03, B02 if it is 3.
        fusion: How two sensors are fused: their tokens, linearly or by cross-attention, or, early,
            their bands.
        query: Cross-attention: the sensor that asks; the other answers.
        nhead: Cross-attention: number of heads.
        nlayer: Cross-attention: number of layers.
        dropout: Cross-attention: dropout.
        shared: Cross-attention: one set of weights for all layers.
        embed_dim: Width of the tokens.
        depth: Number of blocks of each ViT.
        num_heads: Number of attention heads of each ViT.
        reg_tokens: Number of register tokens.
        init_values: Initial LayerScale.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth, the same in all blocks, as in DINOv2.
        vit_args: Further arguments of timm's ``VisionTransformer``.

    Attributes:
        statistics: How its input was normalised in training, as its checkpoint says; None: by the
            built-in statistics.

    Raises:
        BandError: If the bands are unknown or given twice, do not match *in_chans*, or belong to
            a sensor that the model does not have.
        ValueError: If there are not one or two sensors, the *query* is not one of them, or *fusion*
            is unknown.
    """

    statistics: InputStatistics | None = None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 15,
        num_classes: int = 0,
        global_pool: Literal['token', 'avg'] = 'token',
        sensors: Sequence[str] = ('s1', 's2'),
        bands: Sequence[str] | None = None,
        fusion: Literal['linear', 'xattn', 'early'] = 'linear',
        query: str = 's1',
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
        if not 1 <= len(sensors) <= 2 or not set(sensors) <= set(SENSORS):
            raise ValueError(f'sensors must be one or two of {list(SENSORS)}, not {list(sensors)}')
        if global_pool not in ('token', 'avg'):
            raise ValueError(f"global_pool must be 'token' or 'avg', not '{global_pool}'")
        self.sensors = tuple(key for key in SENSORS if key in sensors)
        self.bands = tuple(bands or _default_bands(self.sensors, in_chans))
        if len(self.bands) != in_chans:
            raise BandError(f'in_chans={in_chans}, but {len(self.bands)} bands: {list(self.bands)}')
        given = sensor_channels(self.bands)
        if foreign := set(given) - set(self.sensors):
            raise BandError(f'bands of {sorted(foreign)}, but the model has {list(self.sensors)}')

        # Encoders see the bands of their sensor in canonical order, whatever the input's order.
        by_sensor = {
            key: tuple(b for b in SENSORS[key].band_names if b in self.bands or key not in given)
            for key in self.sensors
        }
        self._channels = {key: band_indices(by_sensor[key], self.bands) for key in given}
        early = fusion == 'early' and len(self.sensors) == 2
        every = tuple(band for bands in by_sensor.values() for band in bands)
        self.encoder_bands = {EARLY: every} if early else by_sensor

        self.patch_size = patch_size
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = 1 + reg_tokens
        self.has_class_token = True
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.depth = depth
        vit_args = {'no_embed_class': True, **vit_args}
        self.encoders = nn.ModuleDict(
            {
                key: VisionTransformer(
                    img_size=img_size,
                    patch_size=patch_size,
                    in_chans=len(names),
                    num_classes=0,
                    embed_dim=embed_dim,
                    depth=depth,
                    num_heads=num_heads,
                    reg_tokens=reg_tokens,
                    init_values=init_values,
                    dynamic_img_size=True,
                    **vit_args,
                )
                for key, names in self.encoder_bands.items()
            }
        )
        for key in self.encoders:
            # Without input it cannot learn: it stays what it is.
            self._encoder(key).requires_grad_(self._runs(key))
        if drop_path_rate:
            for key in self.encoders:
                for block in self._encoder(key).blocks:
                    block.drop_path1 = DropPath(drop_path_rate)
                    block.drop_path2 = DropPath(drop_path_rate)
        self.day_of_year = DayOfYear(embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(len(self.encoders), embed_dim))
        self.fusion = None
        if len(self.encoders) == 2:
            if fusion == 'linear':
                self.fusion = LinearFusion(embed_dim)
            elif fusion == 'xattn':
                if query not in self.sensors:
                    raise ValueError(f"query must be one of {list(self.sensors)}, not '{query}'")
                index = self.sensors.index(query)
                self.fusion = CrossAttentionFusion(embed_dim, index, nhead, nlayer, dropout, shared)  # type: ignore[arg-type]
            else:
                raise ValueError(f"fusion must be 'linear', 'xattn' or 'early', not '{fusion}'")
            # A stand-in for CLS, each register, and a patch, of each sensor.
            self.stand_in = nn.Parameter(torch.empty(2, self.num_prefix_tokens + 1, embed_dim))
            nn.init.trunc_normal_(self.stand_in, std=0.02)
        self.head_drop = nn.Dropout(drop_rate)
        # TorchGeo takes the last child for the head, and the first leaf for the patch embedding.
        self.head: nn.Module
        self.reset_classifier(num_classes)

    # -- timm's model interface -----------------------------------------------------------------

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and stride of the map after each block."""
        if self._told_depth is None:
            self._told_depth = self.depth
        return [
            {'module': f'blocks.{i}', 'num_chs': self.embed_dim, 'reduction': self.patch_size}
            for i in range(self.depth)
        ]

    @property
    def fc_norm(self) -> nn.Module:
        """Norm between pooling and head: none, tokens are normalised already."""
        return nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay, beside biases and norms."""
        tokens = {'mask_token', 'stand_in'}
        of_vit = {'pos_embed', 'cls_token', 'reg_token'}
        return tokens | {f'encoders.{key}.{name}' for key in self.encoders for name in of_vit}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters into layers.

        Args:
            coarse: Accepted for timm; there is one granularity.

        Returns:
            Patterns of the stem and of the blocks.
        """
        return {
            'stem': (
                r'^mask_token|^day_of_year'
                r'|^encoders\.\w+\.(cls_token|reg_token|pos_embed|patch_embed|norm_pre)'
            ),
            'blocks': [
                (r'^encoders\.\w+\.blocks\.(\d+)', None),
                (r'^encoders\.\w+\.norm|^fusion|^stand_in', (99999,)),
            ],
        }

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head.

        Args:
            num_classes: Number of classes; 0: no head.
            global_pool: New pooling, 'token' or 'avg'; None: as it was.
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
        """Fused tokens after several blocks, as timm's ViTs give them.

        Args:
            x: As in :meth:`forward_features`.
            indices: Blocks to take: a list, the last n if an int, all if None.
            return_prefix_tokens: Return CLS and registers beside the patches.
            norm: Accepted for timm: fusion needs normalised tokens, so they always are.
            stop_early: Accepted for timm: blocks beyond the last one taken are never run when
                *intermediates_only*.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Leave out the final tokens.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.

        Returns:
            The final tokens and a list of features, or the list alone; a feature is of shape
            (B, D, H/p, W/p) or (B, N, D), in a tuple with the prefix tokens if these are asked for.

        Raises:
            ValueError: If *output_fmt* is neither.
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
            fused[-1] = self._let_all_take_part(fused[-1], max(*take, *last) + 1)

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
        """Blocks to take, from 0.

        Decoders choose blocks when they are built. If the weights that were loaded afterwards are
        of a model of another depth, those at the same fraction of its depth are taken.
        """
        told = self._told_depth
        if told in (None, self.depth) or not isinstance(indices, list | tuple):
            take, _ = feature_take_indices(self.depth, indices)
            return list(take)
        chosen, _ = feature_take_indices(told, indices)
        return [-(-(index + 1) * self.depth // told) - 1 for index in chosen]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and apply the head.

        Args:
            x: Tokens of shape (B, L, D).
            pre_logits: Stop before the head.

        Returns:
            Logits of shape (B, num_classes), or features of shape (B, D).
        """
        x = x[:, 0] if self.global_pool == 'token' else x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(
        self, x: Tensor, dates: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """Logits, or features of a model without a head.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.

        Returns:
            Tensor of shape (B, num_classes), or (B, D) without a head.
        """
        return self.forward_head(self.forward_features(x, dates, present=present))

    # -- what it attends to ---------------------------------------------------------------------

    def observe(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        present: Tensor | None = None,
        *,
        block: int | None = None,
        query: Tensor | None = None,
        rollout: bool = False,
    ) -> Observation:
        """Tokens and attention of a batch, in one forward pass.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.
            block: Block of the ViTs whose attention to return, negative from the end; None: no
                attention.
            query: Patch of each sample whose attention to return, row by row from 0, int64 of
                shape (B,). None: the CLS token's.
            rollout: Whether to return attention rollout, one map a sensor.

        Returns:
            Tokens; attention of each sensor at hand by its key, or of early fusion's one ViT under
            'vit', and under 'fusion' that of the last layer of cross-attention, from the query
            sensor's token to the other sensor's patches; attention rollout likewise.

        Raises:
            IndexError: If there is no such block.
        """
        grid = self._grid(x)
        index = None if block is None else block_index(block, self.depth)
        asking = None if query is None else self.num_prefix_tokens + query
        with ExitStack() as stack:
            seen = {
                key: stack.enter_context(
                    observe_blocks(list(self._encoder(key).blocks), index, asking, rollout)
                )
                for key in self.encoders
                if self._runs(key)
            }
            (tokens,) = self._run(x, [self.depth - 1], dates, None, present)

        def on_patches(weights: Tensor) -> Tensor:
            return weights[..., self.num_prefix_tokens :].unflatten(-1, grid)

        attention = {k: on_patches(s.rows) for k, s in seen.items() if s.rows is not None}
        if block is not None and isinstance(self.fusion, CrossAttentionFusion):
            attention['fusion'] = on_patches(take_rows(self.fusion.attention(tokens), asking))
        rolled = {k: s.product for k, s in seen.items() if s.product is not None}
        return Observation(
            self._fuse(tokens),
            attention,
            {key: on_patches(product[:, 0]) for key, product in rolled.items()},
        )

    def cls_attention(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        block: int = -1,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Attention of the CLS token to the patches.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            block: Block of the ViTs; negative counts from the last.
            present: As in :meth:`forward_features`.

        Returns:
            For each sensor at hand by its key ('vit' with early fusion), and 'fusion' for the last
            layer of cross-attention, weights of shape (B, heads, H/p, W/p). The softmax is over all
            tokens, so that a map sums to what the CLS token does not give to itself and the
            registers.

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
        """Attention of chosen patches to the patches.

        Args:
            x: As in :meth:`forward_features`.
            query: Patch that asks in each sample, row by row from 0, int64 of shape (B,).
            dates: As in :meth:`forward_features`.
            block: Block of the ViTs; negative counts from the last.
            present: As in :meth:`forward_features`.

        Returns:
            Maps as from :meth:`cls_attention`.

        Raises:
            IndexError: If there is no such block.
        """
        return self.observe(x, dates, present, block=block, query=query).attention

    def attention_rollout(
        self, x: Tensor, dates: Tensor | None = None, present: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Attention rollout (Abnar & Zuidema, 2020) from the CLS token to the patches.

        The blocks of a sensor's ViT are rolled out; fusion comes after them and is left out.
        Registers take part in the product of the blocks' matrices, and are left out of the result:
        a map sums to what the CLS token does not draw from itself and the registers.

        Args:
            x: As in :meth:`forward_features`.
            dates: As in :meth:`forward_features`.
            present: As in :meth:`forward_features`.

        Returns:
            For each sensor at hand by its key ('vit' with early fusion), a map of shape
            (B, H/p, W/p).
        """
        return self.observe(x, dates, present, rollout=True).rollout
