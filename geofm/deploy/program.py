"""Trace a network, write it as a ``torch.export`` program, and compare written programs with it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from geofm.atomic import atomic_file
from geofm.deploy.network import DATES, PRESENT, Network
from geofm.models import NO_DATE, CheckpointError
from geofm.models.checkpoints import METADATA
from geofm.printing import counted, one_line

#: Largest difference between a written file and PyTorch, see :func:`compare`.
TOLERANCE = 1e-4

#: Range of random dates in days since 1970-01-01: 1960 to 2030.
_DAYS = (-3652, 21915)

#: Batch size, and height and width in multiples of the smallest size, of the compared inputs. They
#: differ from the traced input.
_COMPARED = ((1, 1, 1), (3, 3, 2))


def trace(network: Network, checkpoint: Path) -> ExportedProgram:
    """Trace a network for any batch size, height and width.

    Args:
        network: The network, in evaluation mode.
        checkpoint: The file of the network, for messages.

    Returns:
        The program. It contains no paths of this machine.

    Raises:
        CheckpointError: If the network cannot be traced.
    """
    inputs = random_inputs(network, 2, 2, 3)
    least = network.smallest // network.multiple
    batch, rows, columns = Dim('batch'), Dim('rows', min=least), Dim('columns', min=least)
    pixels = {0: batch, 2: network.multiple * rows, 3: network.multiple * columns}
    shapes = {name: pixels if value.ndim == 4 else {0: batch} for name, value in inputs.items()}
    try:
        with torch.no_grad():
            program = torch.export.export(network, (inputs,), dynamic_shapes=(shapes,))
    except Exception as error:
        # Models and the tracer may raise anything.
        raise CheckpointError(
            f'{checkpoint}: the network cannot be traced for images of any size: {one_line(error)}'
        ) from error
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, 'graph', None), 'nodes', ()):
            # Stack traces contain paths of this machine.
            node.meta.pop('stack_trace', None)
    return program


def random_inputs(network: Network, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
    """Generate random inputs in the range of real ones.

    In the first sample, the first sensor is missing if the network has the input 'present', and a
    date is unknown if it has the input 'dates'. In the last sample, a pixel is nodata.

    Args:
        network: The network.
        batch: Batch size.
        rows: Height in multiples of the smallest size.
        columns: Width in multiples of the smallest size.

    Returns:
        The inputs by name.
    """
    image = network.image
    size = (rows * network.smallest, columns * network.smallest)
    count = sum(len(bands) for bands in image.bands.values())
    raw = image.normalize.denormalize(torch.randn(batch, count, *size))
    raw[-1, -1, 0, 0] = torch.nan
    parts = raw.split([len(bands) for bands in image.bands.values()], dim=1)
    inputs = dict(zip(image.bands, parts, strict=True))
    if PRESENT in network.inputs:
        inputs[PRESENT] = torch.ones(batch, len(image.bands), dtype=torch.bool)
        inputs[PRESENT][0, 0] = False
    if DATES in network.inputs:
        inputs[DATES] = torch.randint(*_DAYS, (batch, len(network.inputs[DATES])))
        inputs[DATES][0, -1] = NO_DATE
    return inputs


def compare(
    network: Network, run: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], path: Path
) -> float:
    """Compare a written program with the network, on random inputs of two sizes.

    Args:
        network: The network.
        run: Function that runs the program: inputs by name to outputs by name.
        path: The file, for messages.

    Returns:
        The largest difference of an output's values, divided by the output's largest magnitude if
        that is above 1.

    Raises:
        ValueError: If the program does not run, or the difference is above :data:`TOLERANCE`.
    """
    largest = 0.0
    for batch, rows, columns in _COMPARED:
        inputs = random_inputs(network, batch, rows, columns)
        with torch.no_grad():
            wanted = network(inputs)
        try:
            found = run(inputs)
        except Exception as error:
            # Runtimes may raise anything for operations that only work at the traced size.
            height, width = rows * network.smallest, columns * network.smallest
            raise ValueError(
                f'{path}: not written, because the traced network does not run on '
                f'{counted(batch, "image")} of {height} x {width} px: {one_line(error)}'
            ) from error
        largest = max(largest, *(_difference(wanted[name], found[name]) for name in wanted))
    if largest > TOLERANCE:
        raise ValueError(
            f'{path}: not written, because its outputs differ from those of PyTorch by '
            f'{largest:.1e}, more than {TOLERANCE:g}'
        )
    return largest


def _difference(wanted: Tensor, found: Tensor) -> float:
    """Return the difference of an output; infinity for non-finite values or another shape."""
    if found.shape != wanted.shape or not found.isfinite().all():
        return float('inf')
    return float((found.detach() - wanted).abs().max() / wanted.abs().max().clamp_min(1))


#: Name of the metadata among the extra files.
EXTRA = f'{METADATA}.json'


def write_pt2(network: Network, program: ExportedProgram, path: Path) -> float:
    """Write a program, and compare its outputs with PyTorch.

    Args:
        network: The network.
        program: The network, traced by :func:`~geofm.deploy.program.trace`.
        path: The file.

    Returns:
        The largest difference.

    Raises:
        ValueError: If the difference is too large, or the program does not run at another size. No
            file is written then.
    """
    with atomic_file(path) as part:
        torch.export.save(program, part, extra_files={EXTRA: json.dumps(network.metadata())})
        written = torch.export.load(part).module()
        return compare(network, written, path)
