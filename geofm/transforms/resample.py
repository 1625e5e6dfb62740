"""Cropping, resizing, flipping and blurring as products with two small matrices per crop."""

import torch
from torch import Tensor

from geofm.device import full_precision, to_device

# Cubic convolution with Keys' a = -0.5, as in antialiased resizing of PyTorch and Pillow.
CUBIC_A = -0.5
CUBIC_SUPPORT = 2.0

#: Gaussian weights below this are set to 0. They are below the precision of float32, and denormal
#: numbers slow down a matrix product tenfold.
SMALLEST_WEIGHT = 1e-6


def crop_and_resize(
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    size: int,
    sigma: Tensor | None = None,
    out: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """Crop boxes from images, resize them to squares, and flip and blur them.

    Resizing is antialiased bicubic and does not use pixels outside the box. For boxes of whole
    pixels, the result is that of torchvision's ``resized_crop`` with ``BICUBIC`` and
    ``antialias=True``. All operations are linear and separable, and are computed as rows @ image @
    columns. Flips and blur are included in the two matrices at almost no cost.

    Args:
        images: Images, shape (B, C, H, W), floating point and finite, since 0 * NaN is NaN.
        boxes: x0, y0, x1, y1 of each crop in pixels, with 0 <= x0 < x1 <= W and likewise for y,
            shape (nB, 4). Crop ``k * B + b`` is from image b, unless *source* is given.
        flips: Whether to flip a crop horizontally and vertically, bool, shape (nB, 2).
        size: Side of the output S, in pixels.
        sigma: Standard deviation of the Gaussian blur of each crop, in pixels of the output, shape
            (nB,); 0 or None for no blur. Should be on the CPU to avoid synchronisation.
        out: Output tensor, shape (nB, C, S, S), e.g. some channels of a larger tensor.
        source: Index of the image of each crop, int64, shape (number of crops,).

    Returns:
        Crops, shape (nB, C, S, S), dtype and device of *images*.
    """
    channels, height, width = images.shape[1:]
    if out is None:
        out = images.new_empty(len(boxes), channels, size, size)
    # The precision of float16, bfloat16 and TF32 is lower than that of the data.
    with full_precision(images.device):
        rows = resize_matrices(boxes[:, 1], boxes[:, 3], flips[:, 1], height, size)
        columns = resize_matrices(boxes[:, 0], boxes[:, 2], flips[:, 0], width, size)
        if sigma is not None:
            blurred = sigma.nonzero().squeeze(1)
            blur = blur_matrices(to_device(sigma[blurred], rows.device), size)
            blurred = to_device(blurred, rows.device)
            rows[blurred] = blur @ rows[blurred]
            columns[blurred] = blur @ columns[blurred]
        rows, columns = rows.to(images.dtype), columns.to(images.dtype)
        # On the CPU, multiplying only the boxes halves the arithmetic. On an accelerator, reading
        # boxes would make the host wait, and few large products are faster than many small ones.
        if boxes.is_cpu:
            _apply_to_boxes(images, boxes, rows, columns, out, source)
        else:
            _apply_to_images(images, rows, columns, out, source)
    return out


def resize_matrices(start: Tensor, stop: Tensor, flip: Tensor, length: int, size: int) -> Tensor:
    """Return matrices that resize the interval [start, stop) of an axis to *size* pixels.

    Args:
        start: Start of each interval, in pixels, shape (N,).
        stop: End of each interval, in pixels, shape (N,).
        flip: Whether to reverse the interval, bool, shape (N,).
        length: Number of pixels of the axis.
        size: Number of pixels of the output axis.

    Returns:
        Weights, float32, shape (N, size, length). Each row sums to 1 and is 0 outside the interval.
    """
    start = start.to(torch.float32).view(-1, 1, 1)
    stop = stop.to(torch.float32).view(-1, 1, 1)
    scale = (stop - start) / size
    # The filter is widened for downsampling, so that it covers all pixels, but not narrowed for
    # upsampling.
    filter_scale = scale.clamp(min=1)
    # An upper bound that does not depend on the boxes, so that shapes are constant.
    n_taps = min(length, int(2 * CUBIC_SUPPORT * max(1.0, length / size)) + 2)
    output = torch.arange(size, device=start.device).view(1, -1, 1)
    output = torch.where(flip.view(-1, 1, 1), size - 1 - output, output)
    # Relative to the start of the interval, for the precision of float32.
    centre = (output + 0.5) * scale
    first = (start + centre - CUBIC_SUPPORT * filter_scale).floor().clamp(0, length - n_taps)
    tap = first + torch.arange(n_taps, device=start.device)
    weights = _cubic((tap - start + 0.5 - centre) / filter_scale)
    weights = weights * ((tap + 0.5 > start) & (tap + 0.5 < stop))
    weights = weights / weights.sum(-1, keepdim=True)
    matrices = weights.new_zeros(len(start), size, length)
    return matrices.scatter_(2, tap.long(), weights)


def blur_matrices(sigma: Tensor, size: int) -> Tensor:
    """Return matrices that blur an axis by a Gaussian, cut off and renormalised at the ends.

    Args:
        sigma: Standard deviation in pixels, positive, shape (N,).
        size: Number of pixels of the axis.

    Returns:
        Weights, shape (N, size, size); each row sums to 1.
    """
    position = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    distance = position - position.view(-1, 1)
    # Weights only depend on the distance: compute few exponentials, and look them up.
    profile = torch.exp(-0.5 * (position / sigma.view(-1, 1)) ** 2)
    profile = torch.where(profile > SMALLEST_WEIGHT, profile, 0.0)
    weights = profile[:, distance.abs().long()]
    return weights / weights.sum(-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Evaluate Keys' cubic convolution kernel (IEEE TASSP 1981)."""
    x = x.abs()
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC_A - 4 * CUBIC_A
    return torch.where(x < 1, near, torch.where(x < CUBIC_SUPPORT, far, 0.0))


def _apply_to_images(
    images: Tensor, rows: Tensor, columns: Tensor, out: Tensor, source: Tensor | None = None
) -> None:
    """Compute rows @ image @ columns for whole images, with B crops at a time."""
    B, C, H, W = images.shape
    lines = images.reshape(B, C * H, W)
    for k in range(0, len(out), B):
        batch = lines if source is None else lines[source[k : k + B]]
        resized = torch.bmm(batch, columns[k : k + B].mT).view(len(batch), C, H, -1)
        out[k : k + B] = rows[k : k + B, None] @ resized


def _apply_to_boxes(
    images: Tensor,
    boxes: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
    source: Tensor | None = None,
) -> None:
    """Compute rows @ box @ columns, without the pixels outside the boxes."""
    B, C = images.shape[:2]
    of_image = [k % B for k in range(len(boxes))] if source is None else source.tolist()
    corners = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).long()
    for k, (left, top, right, bottom) in enumerate(corners.tolist()):
        box = images[of_image[k], :, top:bottom, left:right]
        resized = torch.bmm(rows[k, :, top:bottom].expand(C, -1, -1), box)
        torch.matmul(resized, columns[k, :, left:right].mT, out=out[k])
