"""Crop, flip, blur and resize in one linear map a crop: two small matrices, one an axis."""

import torch
from torch import Tensor

from geofm.device import full_precision, to_device

# Cubic convolution with Keys' a = -0.5, as PyTorch and Pillow use for antialiased resizing.
CUBIC_A = -0.5
CUBIC_SUPPORT = 2.0

#: Gaussian weights below this are left out. They change nothing that float32 resolves, and the
#: denormal numbers among them slow a matrix product down tenfold.
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
    """Crop boxes out of images, resize them to squares, and flip and blur them.

    Resizing is antialiased bicubic and looks at no pixel outside the box: for boxes of whole
    pixels, the result is that of torchvision's ``resized_crop`` with ``BICUBIC`` and
    ``antialias=True``. All of it is linear and separable, so it is done as rows @ image @ columns,
    with flip and blur folded into the two matrices, where they cost next to nothing.

    Args:
        images: Images, shape (B, C, H, W), floating point and finite (0 x NaN is NaN).
        boxes: x0, y0, x1, y1 of each crop in pixels, with 0 <= x0 < x1 <= W, likewise for y,
            shape (nB, 4). Crop ``k * B + b`` is cut from image b, unless *source* says otherwise.
        flips: Whether to flip a crop horizontally and vertically, bool, shape (nB, 2).
        size: Side of the output S, in pixels.
        sigma: Standard deviation of a Gaussian blur of each crop, in pixels of the output, shape
            (nB,); 0 leaves the crop as it is. Best on the CPU, where finding the crops to blur
            makes nobody wait. None: no blur.
        out: Where to write the crops, shape (nB, C, S, S), e.g. some channels of a larger tensor.
        source: Image that each crop is cut from, int64, shape (number of crops,).

    Returns:
        Crops, shape (nB, C, S, S), dtype and device of *images*.
    """
    channels, height, width = images.shape[1:]
    if out is None:
        out = images.new_empty(len(boxes), channels, size, size)
    # Half precision and TF32 are coarser than the data.
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
        # Reading the boxes costs nothing on the CPU and there halves the arithmetic; on an
        # accelerator it would make the host wait, and many small products lose to a few big ones.
        if boxes.is_cpu:
            _apply_to_boxes(images, boxes, rows, columns, out, source)
        else:
            _apply_to_images(images, rows, columns, out, source)
    return out


def resize_matrices(start: Tensor, stop: Tensor, flip: Tensor, length: int, size: int) -> Tensor:
    """Matrices that resize the stretch [start, stop) of an axis to *size* pixels.

    Args:
        start: Where each stretch starts, in pixels, shape (N,).
        stop: Where it stops, shape (N,).
        flip: Whether to turn it round, bool, shape (N,).
        length: Pixels along the whole axis.
        size: Pixels along the output axis.

    Returns:
        Weights, float32, shape (N, size, length); each row sums to 1 and is 0 outside the stretch.
    """
    start = start.to(torch.float32).view(-1, 1, 1)
    stop = stop.to(torch.float32).view(-1, 1, 1)
    scale = (stop - start) / size
    # Shrinking widens the filter, so that every input pixel counts; enlarging does not narrow it.
    filter_scale = scale.clamp(min=1)
    # A bound on the taps that does not depend on the boxes, so that no shape does.
    n_taps = min(length, int(2 * CUBIC_SUPPORT * max(1.0, length / size)) + 2)
    output = torch.arange(size, device=start.device).view(1, -1, 1)
    output = torch.where(flip.view(-1, 1, 1), size - 1 - output, output)
    # Measured from the start of the stretch, where float32 is finest.
    centre = (output + 0.5) * scale
    first = (start + centre - CUBIC_SUPPORT * filter_scale).floor().clamp(0, length - n_taps)
    tap = first + torch.arange(n_taps, device=start.device)
    weights = _cubic((tap - start + 0.5 - centre) / filter_scale)
    weights = weights * ((tap + 0.5 > start) & (tap + 0.5 < stop))
    weights = weights / weights.sum(-1, keepdim=True)
    matrices = weights.new_zeros(len(start), size, length)
    return matrices.scatter_(2, tap.long(), weights)


def blur_matrices(sigma: Tensor, size: int) -> Tensor:
    """Matrices that blur an axis by a Gaussian, cut off and renormalised at its ends.

    Args:
        sigma: Standard deviation in pixels, positive, shape (N,).
        size: Pixels along the axis.

    Returns:
        Weights, shape (N, size, size); each row sums to 1.
    """
    position = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    distance = position - position.view(-1, 1)
    # The weights depend on the distance alone: few exponentials, then a look-up.
    profile = torch.exp(-0.5 * (position / sigma.view(-1, 1)) ** 2)
    profile = torch.where(profile > SMALLEST_WEIGHT, profile, 0.0)
    weights = profile[:, distance.abs().long()]
    return weights / weights.sum(-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel (IEEE TASSP 1981)."""
    x = x.abs()
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC_A - 4 * CUBIC_A
    return torch.where(x < 1, near, torch.where(x < CUBIC_SUPPORT, far, 0.0))


def _apply_to_images(
    images: Tensor, rows: Tensor, columns: Tensor, out: Tensor, source: Tensor | None = None
) -> None:
    """Rows @ image @ columns for whole images, as many crops at a time as there are images."""
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
    """Rows @ box @ columns, leaving out the pixels whose weights are zero."""
    B, C = images.shape[:2]
    of_image = [k % B for k in range(len(boxes))] if source is None else source.tolist()
    corners = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).long()
    for k, (left, top, right, bottom) in enumerate(corners.tolist()):
        box = images[of_image[k], :, top:bottom, left:right]
        resized = torch.bmm(rows[k, :, top:bottom].expand(C, -1, -1), box)
        torch.matmul(resized, columns[k, :, left:right].mT, out=out[k])
