"""Multi-crop augmentation of multi-sensor images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kornia.augmentation.random_generator import ResizedCropGenerator
from torch import Tensor, nn

from geofm.device import to_device
from geofm.printing import counted
from geofm.sensors import SENSORS, BandError, Range, check_bands, sensor_channels
from geofm.transforms.masks import block_masks
from geofm.transforms.photometry import Photometry, PhotometryArgs, blur_sigma
from geofm.transforms.resample import crop_and_resize

#: Number of global crops, which both student and teacher see, as in DINO and DINOv2.
N_GLOBAL = 2

#: Probabilities of blurring the first and second global crop, and local crops, as in DINOv2.
GLOBAL_BLUR_PROBABILITIES = (1.0, 0.1)
LOCAL_BLUR_PROBABILITY = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """Crops of a batch of B images. Row ``k * B + b`` is crop k of image b.

    Attributes:
        globals: Global crops, shape (2B, C, G, G).
        locals: Local crops, shape (nB, C, L, L).
        masks: Masks of the patch tokens of the global crops, bool, shape (2B, N).
        masked: Indices of masked tokens in the flattened masks, int64, shape (M,).
        anchors: The global crops at another size and without photometric changes, shape
            (2B, C, A, A), or None.
        global_dates: Acquisition dates of each global crop, int64, shape (2B, S); None if the batch
            has no dates.
        local_dates: Acquisition dates of each local crop, shape (nB, S), or None.
        global_present: Whether each sensor is present in each global crop, bool, shape (2B, S);
            None if all sensors are present.
        local_present: The same for each local crop, shape (nB, S), or None.
        global_boxes: x0, y0, x1, y1 of each global crop in pixels of the image, int64, shape
            (2B, 4).
        local_boxes: The same for each local crop, shape (nB, 4).
        global_flips: Whether each global crop is flipped horizontally and vertically, bool, shape
            (2B, 2).
        local_flips: The same for each local crop, shape (nB, 2).
        global_valid_share: Fraction of valid pixels in each global crop, shape (2B,).
        local_valid_share: Fraction of valid pixels in each local crop, shape (nB,).
        anchors_valid: Which pixels of the anchors are valid, bool, shape (2B, A, A); None if the
            batch does not say.
    """

    globals: Tensor
    locals: Tensor
    masks: Tensor
    masked: Tensor
    anchors: Tensor | None
    global_dates: Tensor | None
    local_dates: Tensor | None
    global_present: Tensor | None
    local_present: Tensor | None
    global_boxes: Tensor
    local_boxes: Tensor
    global_flips: Tensor
    local_flips: Tensor
    global_valid_share: Tensor
    local_valid_share: Tensor
    anchors_valid: Tensor | None = None


class MultiCrop(nn.Module):
    """Two global crops, n local crops and masks of the global crops, as in DINOv2.

    The box and flips of a crop are the same for all bands, so that a pixel shows the same place in
    all sensors. Boxes are drawn by Kornia. Crops are flipped horizontally and vertically, since
    images from above have no preferred orientation. Then photometric changes are applied to each
    sensor.

    If images have several dates, the global crops use the dates in turn, and each local crop uses a
    random date. Features then do not need to encode seasonal changes. This follows Manas et al.,
    `SeCo <https://arxiv.org/abs/2103.16607>`_.

    Images are processed in batches on their device. Random numbers are drawn on the CPU from the
    generator of PyTorch, so that a seed gives the same crops on all devices.

    From Caron et al., `SwAV <https://arxiv.org/abs/2006.09882>`_, and Oquab et al.,
    `DINOv2 <https://arxiv.org/abs/2304.07193>`_.
    """

    def __init__(
        self,
        bands: Sequence[str],
        global_size: int = 224,
        local_size: int = 96,
        n_local: int = 8,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        patch_size: int = 16,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        min_valid: float = 0.5,
        max_tries: int = 10,
        photometry: bool | PhotometryArgs = True,
        anchor_size: int | None = None,
    ) -> None:
        """Initialize a new MultiCrop instance.

        Args:
            bands: Names of the channels of the images, in their order.
            global_size: Side of the global crops G, in pixels.
            local_size: Side of the local crops L, in pixels.
            n_local: Number of local crops per image.
            global_scale: Range of the area of a global crop, as a fraction of the image.
            local_scale: Range of the area of a local crop, as a fraction of the image.
            ratio: Range of the aspect ratio (width / height) of a crop.
            patch_size: Side of a patch token, in pixels.
            mask_probability: Fraction of the global crops to mask.
            mask_ratio: Lowest and highest fraction of the tokens of a masked crop to mask.
            min_valid: Minimum fraction of valid pixels. Crops with less are drawn again.
            max_tries: Maximum number of draws of a crop. Then the draw with the largest fraction of
                valid pixels is used.
            photometry: Whether to apply photometric changes (blur, gain, haze and speckle); or
                overrides for sensors that measure reflectance: those of :class:`Photometry`, and
                ``blur``, the range of the standard deviation of the blur in pixels of a crop. Other
                sensors are augmented as their definition says, see
                :class:`geofm.sensors.SensorPhotometry`.
            anchor_size: Side A of the anchors in pixels, for Gram anchoring or a frozen teacher,
                which may have another patch size; None for no anchors.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If a crop size is not a positive multiple of the patch size, *n_local* is
                negative, *min_valid* is not within 0 and 1, or *max_tries* is below 1.
        """
        super().__init__()
        for name, size in (('global_size', global_size), ('local_size', local_size)):
            if size <= 0 or size % patch_size:
                raise ValueError(f'{name} {size} must be a positive multiple of {patch_size}')
        if n_local < 0 or max_tries < 1:
            raise ValueError(
                f'n_local must be at least 0 and max_tries at least 1, got {n_local}, {max_tries}'
            )
        if not 0 <= min_valid <= 1:
            raise ValueError(f'min_valid must lie within 0 and 1, got {min_valid}')
        self.bands = check_bands(bands)
        self.global_size, self.local_size, self.n_local = global_size, local_size, n_local
        self.global_scale, self.local_scale, self.ratio = global_scale, local_scale, ratio
        self.grid = (global_size // patch_size, global_size // patch_size)
        self.mask_probability, self.mask_ratio = mask_probability, mask_ratio
        self.min_valid, self.max_tries = min_valid, max_tries
        changes: PhotometryArgs = {} if isinstance(photometry, bool) else {**photometry}
        self.blur = _blur_of(self.bands, changes.pop('blur', None))
        self.photometry = None if photometry is False else Photometry(self.bands, changes)
        self.anchor_size = anchor_size

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> Crops:
        """Crop a batch.

        Args:
            batch: Dictionary with 'image' (B, C, H, W), normalised and finite (see
                :class:`~geofm.transforms.Normalize`), and optionally 'valid' bool (B, H, W), which
                is False for nodata and padding, 'dates' (B, S), and 'present' bool (B, S), which is
                False for missing sensors. If images have k dates, the shapes are (B, k, C, H, W),
                (B, k, H, W), (B, k, S), and (B, S) or (B, k, S).

        Returns:
            The crops, with the device and dtype of the image.

        Raises:
            BandError: If the image does not have one channel per band.
        """
        images: Tensor = batch['image']
        if images.ndim not in (4, 5) or images.shape[-3] != len(self.bands):
            raise BandError(
                f'image of shape {tuple(images.shape)} given for {counted(len(self.bands), "band")}'
                f' {list(self.bands)}: expected (B, {len(self.bands)}, H, W), or '
                f'(B, dates, {len(self.bands)}, H, W)'
            )
        valid, dates, present = batch.get('valid'), batch.get('dates'), batch.get('present')
        # Global crops first, then local crops.
        sources = self._draw_sources(images)
        several_dates = images.ndim == 5
        if several_dates:
            if present is not None and present.ndim == 2:
                present = present[:, None].expand(-1, images.shape[1], -1)
            present = None if present is None else present.flatten(0, 1)
            images = images.flatten(0, 1)
            valid = None if valid is None else valid.flatten(0, 1)
            dates = None if dates is None else dates.flatten(0, 1)
        counts = None if valid is None else integral_image(valid)
        scales = self.global_scale, self.local_scale
        drawn = [self._draw_boxes(images, counts, *of) for of in zip(sources, scales, strict=True)]
        boxes, shares = zip(*drawn, strict=True)
        flips = [_draw_flips(len(part), images.device) for part in boxes]
        # One probability per crop, repeated for all images.
        blur = (
            torch.tensor(GLOBAL_BLUR_PROBABILITIES).repeat_interleave(len(boxes[0]) // N_GLOBAL),
            torch.full((len(boxes[1]),), LOCAL_BLUR_PROBABILITY),
        )
        # Crops in the order of the images do not need an index.
        indices = sources if several_dates else (None, None)
        sizes = self.global_size, self.local_size
        crops = [
            self._crop(images, *how) for how in zip(boxes, flips, sizes, blur, indices, strict=True)
        ]
        anchors = anchors_valid = None
        if self.anchor_size is not None:
            where = (boxes[0], flips[0], self.anchor_size)
            anchors = crop_and_resize(images, *where, source=indices[0])
            if valid is not None:
                known = crop_and_resize(valid[:, None].to(images.dtype), *where, source=indices[0])
                anchors_valid = known[:, 0] > 0.5
        masks = block_masks(len(crops[0]), self.grid, self.mask_probability, self.mask_ratio)
        # On the CPU, since the host would have to wait for an accelerator.
        masked = masks.flatten().nonzero().squeeze(1)
        dates, present = (
            (None, None) if values is None else [values[source] for source in sources]
            for values in (dates, present)
        )
        return Crops(
            globals=crops[0],
            locals=crops[1],
            masks=to_device(masks, images.device),
            masked=to_device(masked, images.device),
            anchors=anchors,
            global_dates=dates[0],
            local_dates=dates[1],
            global_present=present[0],
            local_present=present[1],
            global_boxes=boxes[0],
            local_boxes=boxes[1],
            global_flips=flips[0],
            local_flips=flips[1],
            global_valid_share=shares[0],
            local_valid_share=shares[1],
            anchors_valid=anchors_valid,
        )

    def _draw_sources(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the image and date of each global crop (2B,) and local crop (nB,), as one index."""
        n_images = len(images)
        image = torch.arange(n_images, device=images.device)
        global_source, local_source = image.repeat(N_GLOBAL), image.repeat(self.n_local)
        if images.ndim == 4:
            return global_source, local_source
        n_dates = images.shape[1]
        global_date = torch.arange(len(global_source), device=images.device) // n_images % n_dates
        local_date = torch.zeros(len(local_source), dtype=torch.long)
        if n_dates > 1:
            local_date = torch.randint(n_dates, local_date.shape)
        local_date = to_device(local_date, images.device)
        return global_source * n_dates + global_date, local_source * n_dates + local_date

    def _draw_boxes(
        self, images: Tensor, counts: Tensor | None, source: Tensor, scale: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Draw boxes (nB, 4) of crops. Also return their fractions of valid pixels (nB,)."""
        tries = 1 if counts is None else self.max_tries
        n_boxes = len(source)
        # Not an attribute, since it would be moved to the device of this module.
        generator = ResizedCropGenerator((1, 1), scale, self.ratio)
        corners = generator(torch.Size((tries * n_boxes, *images.shape[1:])))['src']
        # Kornia returns the centres of corner pixels, but boxes end after the last pixel.
        boxes = torch.cat([corners[:, 0], corners[:, 2] + 1], dim=1).long()
        boxes = to_device(boxes.view(tries, n_boxes, 4), images.device)
        if counts is None:
            return boxes[0], boxes.new_ones(n_boxes, dtype=torch.float32)
        # All tries at once, since the host would have to wait to redraw only some crops.
        share = valid_share(counts, boxes, source)
        enough = share >= self.min_valid
        chosen = torch.where(enough.any(0), enough.int().argmax(0), share.argmax(0))
        box = torch.arange(n_boxes, device=images.device)
        return boxes[chosen, box], share[chosen, box]

    def _crop(
        self,
        images: Tensor,
        boxes: Tensor,
        flips: Tensor,
        size: int,
        blur_probability: Tensor,
        source: Tensor | None,
    ) -> Tensor:
        """Cut crops (nB, C, size, size), and apply photometric changes."""
        if self.photometry is None:
            return crop_and_resize(images, boxes, flips, size, source=source)
        crops = images.new_empty(len(boxes), images.shape[1], size, size)
        for sensor, channels in sensor_channels(self.bands).items():
            sigma = blur_sigma(blur_probability, self.blur[sensor])
            first, last = channels[0], channels[-1] + 1
            if last - first == len(channels):
                out = crops[:, first:last]
                crop_and_resize(images[:, first:last], boxes, flips, size, sigma, out, source)
            else:  # The bands of several sensors are mixed, and must be copied.
                crops[:, channels] = crop_and_resize(
                    images[:, channels], boxes, flips, size, sigma, source=source
                )
        return self.photometry(crops)


def _blur_of(bands: Sequence[str], of_reflectance: Range | None) -> dict[str, Range]:
    """Return the range of the standard deviation of the blur by sensor, in pixels of a crop."""
    blur: dict[str, Range] = {}
    for key in sensor_channels(bands):
        changes = of_reflectance if SENSORS[key].quantity == 'reflectance' else None
        blur[key] = changes or SENSORS[key].photometry.blur or (0.0, 0.0)
    return blur


def integral_image(valid: Tensor) -> Tensor:
    """Count the valid pixels above and to the left of each pixel corner.

    Args:
        valid: Which pixels are valid, bool, shape (B, H, W).

    Returns:
        Counts, int32, shape (B, H + 1, W + 1).
    """
    counts = valid.cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32)
    return nn.functional.pad(counts, (1, 0, 1, 0))


def valid_share(counts: Tensor, boxes: Tensor, source: Tensor) -> Tensor:
    """Return the fraction of valid pixels in boxes.

    Args:
        counts: Integral image of the valid pixels, shape (B, H + 1, W + 1).
        boxes: x0, y0, x1, y1 in whole pixels, int64, shape (..., nB, 4).
        source: Index of the image of each box, int64, shape (nB,).

    Returns:
        Fractions, 0 to 1, float32, shape (..., nB).
    """
    left, top, right, bottom = boxes.unbind(-1)
    inside = (
        counts[source, bottom, right]
        - counts[source, top, right]
        - counts[source, bottom, left]
        + counts[source, top, left]
    )
    return inside / ((right - left) * (bottom - top))


def _draw_flips(n_crops: int, device: torch.device) -> Tensor:
    """Draw horizontal and vertical flips, each with probability 0.5, bool, shape (n_crops, 2)."""
    return to_device(torch.rand(n_crops, 2) < 0.5, device)
