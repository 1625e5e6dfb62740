"""Turn images of several sensors into the input of each ViT's first block."""

from dataclasses import dataclass

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geofm.models.dates import NO_DATE, DayOfYear
from geofm.models.fusion import Inputs
from geofm.models.packed import embed_patches
from geofm.models.segments import join
from geofm.sensors import SENSORS, BandError, check_channels


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Crops of one size, and which of their tokens to return.

    Attributes:
        image: Normalised crops of shape (B, C, H, W).
        dates: As in :meth:`MultiSensorViT.forward_features`.
        masks: As in :meth:`MultiSensorViT.forward_features`.
        present: As in :meth:`MultiSensorViT.forward_features`.
        patches: Patches whose tokens are returned in addition to CLS. Indices into the patches of
            all crops, (B x N,), or into the visible patches, (B x V,); int64 of shape (M,). None:
            no patches.
        visible: Patches of each crop that the model sees, in all sensors. The other patches are
            left out of the sequence, as in MAE. Indices from 0 to N - 1, int64 of shape (B, V).
            None: all patches.
    """

    image: Tensor
    dates: Tensor | None = None
    masks: Tensor | None = None
    present: Tensor | None = None
    patches: Tensor | None = None
    visible: Tensor | None = None


class SensorInputs(nn.Module):
    """ViTs of a model, and the computation of their input from images, dates and masks.

    Attributes:
        sensors: Keys of the sensors, in canonical order.
        bands: Names of the input channels.
        patch_size: Side of a patch in pixels.
        num_prefix_tokens: Number of CLS and register tokens.
        depth: Number of blocks of each ViT.
        inputs: For the key of each ViT, the sensors of each of its patch embeddings.
        encoders: A timm ``VisionTransformer`` for each key of *inputs*.
        encoder_bands: Names of the channels of each patch embedding, in canonical order. The keys
            are those of the sensors; with early fusion the only key is 'vit'. A sensor that is
            not in the input has all of its bands.
        patch_embed_names: Name of the module of each patch embedding, for ``get_submodule``. The
            keys are those of *encoder_bands*.
        mask_token: Mask token of each ViT, which replaces masked patches, shape (E, D).
        sensor_embed: Learned embedding of each sensor, shape (S, D), if one ViT has tokens of
            several sensors; otherwise None.
        stand_in: Missing-sensor tokens of each sensor: CLS, registers, a patch. Only models with a
            fusion module have them.
        date_sensors: Sensors of the columns of a ``dates`` tensor:
            :func:`geofm.sensors.date_columns` of the sensors in the input.
    """

    sensors: tuple[str, ...]
    bands: tuple[str, ...]
    patch_size: int
    num_prefix_tokens: int
    depth: int
    inputs: Inputs
    encoders: nn.ModuleDict
    encoder_bands: dict[str, tuple[str, ...]]
    patch_embed_names: dict[str, str]
    day_of_year: DayOfYear
    mask_token: nn.Parameter
    sensor_embed: nn.Parameter | None
    stand_in: nn.Parameter
    date_sensors: tuple[str, ...]
    #: Input channels of each sensor in the input, in the order of its encoder.
    _channels: dict[str, list[int]]

    def encoder_of(self, key: str) -> str:
        """Return the key of the ViT that a patch embedding belongs to.

        Args:
            key: A key of :attr:`encoder_bands`.

        Returns:
            The key in :attr:`encoders`.

        Raises:
            KeyError: If there is no such patch embedding.
        """
        if key not in self.encoder_bands:
            raise KeyError(f'{key!r} is not one of {list(self.encoder_bands)}')
        return key if key in self.encoders else next(iter(self.encoders))

    @property
    def substitute(self) -> str:
        """Description of what replaces a missing sensor, for messages."""
        if any(self._is_joint(key) for key in self.inputs):
            return 'nothing'
        return 'its mean' if len(self.encoder_bands) == 1 else "the model's missing-sensor tokens"

    def of_all_sensors(self, present: Tensor) -> Tensor:
        """Extend the presence of the sensors in the input to all sensors of the model.

        Args:
            present: Whether each sensor of the input is present, bool of shape (B, S'), with
                columns in canonical order, as in the samples of data sets.

        Returns:
            Presence of :attr:`sensors`, bool of shape (B, S). Sensors that are not in the input
            count as present, because they are replaced in any case.

        Raises:
            ValueError: If *present* does not have one column per sensor of the input.
        """
        at_hand = [sensor for sensor in self.sensors if sensor in self._channels]
        if present.ndim != 2 or present.shape[1] != len(at_hand):
            raise ValueError(
                f'present of shape {tuple(present.shape)} must have a column for each of {at_hand}'
            )
        if len(at_hand) == len(self.sensors):
            return present
        columns = {sensor: present[:, i] for i, sensor in enumerate(at_hand)}
        others = torch.ones_like(present[:, 0])
        return torch.stack([columns.get(sensor, others) for sensor in self.sensors], dim=1)

    def _check_dates(self, dates: Tensor | None) -> None:
        """Check that dates have one column for each of :attr:`date_sensors`."""
        if dates is not None and dates.shape[1:] != (len(self.date_sensors),):
            raise ValueError(
                f'dates of shape {tuple(dates.shape)} must have a column for each of '
                f'{list(self.date_sensors)}'
            )

    def _encoder(self, key: str) -> VisionTransformer:
        encoder = self.encoders[key]
        assert isinstance(encoder, VisionTransformer)
        return encoder

    def _is_joint(self, key: str) -> bool:
        """Return whether a ViT runs on the tokens of several sensors together."""
        return len(self.inputs[key]) > 1

    def _runs(self, key: str) -> bool:
        """Return whether there is input for a ViT."""
        return any(sensor in self._channels for part in self.inputs[key] for sensor in part)

    def _at_hand(self, key: str) -> list[str]:
        """Return the sensors of a joint ViT that are in the input."""
        return [sensor for (sensor,) in self.inputs[key] if sensor in self._channels]

    def _presence(self, key: str, view: View) -> Tensor:
        """Return whether each sensor of :meth:`_at_hand` is present, bool of shape (B, S)."""
        at_hand = self._at_hand(key)
        if view.present is None:
            size = (view.image.shape[0], len(at_hand))
            return torch.ones(size, dtype=torch.bool, device=view.image.device)
        return view.present[:, [self.sensors.index(sensor) for sensor in at_hand]]

    def _embed(self, key: str, view: View) -> Tensor:
        """Compute the input of the first block of a ViT."""
        if self._is_joint(key):
            return self._embed_jointly(key, view)
        encoder = self._encoder(key)
        (sensors,) = self.inputs[key]
        tokens = embed_patches(encoder.patch_embed, self._pixels(sensors, view))
        tokens = self._mask_patches(tokens, key, sensors, view.masks)
        tokens = encoder.norm_pre(encoder._pos_embed(tokens))
        if view.dates is not None:
            encoding = self._encode_dates(sensors, view.dates, view.present)
            tokens = tokens + encoding[:, None].to(tokens.dtype)
        return self._take_visible(tokens, view)

    def _embed_jointly(self, key: str, view: View) -> Tensor:
        """Compute the input of the first block of a joint ViT."""
        assert self.sensor_embed is not None
        encoder = self._encoder(key)
        parts = []
        for sensor in self._at_hand(key):
            pixels = self._pixels((sensor,), view, blank=True)
            embed = self.get_submodule(self.patch_embed_names[sensor])
            tokens = self._mask_patches(embed_patches(embed, pixels), key, (sensor,), view.masks)
            added = self.sensor_embed[self.sensors.index(sensor)]
            if view.dates is not None:
                # CLS and registers belong to no sensor, so only patches get dates.
                encoding = self._encode_dates((sensor,), view.dates, view.present)
                added = (added + encoding)[:, None, None]
            parts.append(tokens + added.to(tokens.dtype))
        # As one batch, so that timm adds the positions to the patches of each sensor.
        size = (len(parts), view.image.shape[0])
        placed = encoder._pos_embed(torch.cat(parts)).unflatten(0, size).unbind()
        seen = [self._take_visible(part, view) for part in placed]
        tokens = encoder.norm_pre(join(seen, self.num_prefix_tokens))
        assert isinstance(tokens, Tensor)
        return tokens

    def _mask_patches(
        self, tokens: Tensor, key: str, sensors: tuple[str, ...], masks: Tensor | None
    ) -> Tensor:
        """Replace masked patches by the mask token; tokens have shape (B, H/p, W/p, D)."""
        if masks is None:
            return tokens
        if len(sensors) > 1 and masks.ndim != 2:
            raise ValueError(
                'early fusion cannot mask a patch in one sensor only: masks must be of shape '
                f'(B, N), not {tuple(masks.shape)}'
            )
        hidden = masks if masks.ndim == 2 else masks[:, self.sensors.index(sensors[0])]
        token = self.mask_token[list(self.encoders).index(key)].to(tokens.dtype)
        return torch.where(hidden.reshape(*tokens.shape[:3], 1), token, tokens)

    def _take_visible(self, tokens: Tensor, view: View) -> Tensor:
        """Select the visible patches of a view, from tokens of shape (B, P + N, D)."""
        if view.visible is None:
            return tokens
        prefix = self.num_prefix_tokens
        places = view.visible[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.expand(len(places), -1, -1)
        return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, places)], dim=1)

    def _pixels(self, sensors: tuple[str, ...], view: View, blank: bool = False) -> Tensor:
        """Return the input of a patch embedding.

        Args:
            sensors: Sensors of the patch embedding.
            view: The crops.
            blank: Whether to set missing sensors to zero, the mean of normalised bands. For several
                sensors this is always done.
        """
        if len(sensors) == 1 and not blank:
            return _take_channels(view.image, self._channels[sensors[0]])
        parts = []
        for sensor in sensors:
            if sensor not in self._channels:
                count = len(SENSORS[sensor].bands)
                parts.append(
                    view.image.new_zeros(view.image.shape[0], count, *view.image.shape[2:])
                )
                continue
            part = _take_channels(view.image, self._channels[sensor])
            if view.present is not None:
                present = view.present[:, self.sensors.index(sensor), None, None, None]
                part = torch.where(present, part, 0)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _encode_dates(
        self, sensors: tuple[str, ...], dates: Tensor, present: Tensor | None
    ) -> Tensor:
        """Encode the dates of a patch embedding's sensors, shape (B, D).

        For several sensors it is the sum over those present.
        """
        if len(sensors) == 1:
            return self.day_of_year(dates[:, self.date_sensors.index(sensors[0])])
        encodings = []
        for sensor in sensors:
            if sensor not in self._channels:
                continue
            days = dates[:, self.date_sensors.index(sensor)]
            if present is not None:
                days = torch.where(present[:, self.sensors.index(sensor)], days, NO_DATE)
            encodings.append(self.day_of_year(days))
        return torch.stack(encodings).sum(dim=0)

    def _check_channels(self, image: Tensor) -> None:
        """Check that the channels of images are the model's bands, and that these are known."""
        if not self.bands:
            raise BandError(
                'the bands of the channels are unknown: name them with bands=[...], or load a '
                'checkpoint, which names them'
            )
        check_channels(image, self.bands)

    def _missing_tokens(self, key: str, view: View) -> Tensor:
        """Return missing-sensor tokens, (1, L, D), or (B, L, D) if patches are left out."""
        encoder = self._encoder(key)
        grid = self._grid(view.image)
        token = self.stand_in[self.sensors.index(key)]
        prefix = 0 if encoder.no_embed_class else self.num_prefix_tokens
        positions = resample_abs_pos_embed(
            encoder.pos_embed,
            new_size=list(grid),
            old_size=list(encoder.patch_embed.grid_size),
            num_prefix_tokens=prefix,
        )[:, prefix:]
        # Patches keep their positions, because queries of cross-attention must differ.
        tokens = torch.cat([token[None, :-1], token[-1] + positions], dim=1)
        return self._take_visible(tokens, view)

    def _patches_seen(self, view: View) -> int:
        """Return the number of patches per crop and sensor in a ViT's sequence."""
        if view.visible is not None:
            return view.visible.shape[1]
        height, width = self._grid(view.image)
        return height * width

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Return the number of rows and columns of patches."""
        return x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size


def _take_channels(image: Tensor, channels: list[int]) -> Tensor:
    """Select channels of an image; consecutive channels as a view, others as a copy."""
    first, last = channels[0], channels[-1]
    is_run = channels == list(range(first, last + 1))
    return image[:, first : last + 1] if is_run else image[:, channels]
