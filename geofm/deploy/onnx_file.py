"""Write programs to ONNX files."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from geofm.atomic import atomic_file
from geofm.deploy.network import Network
from geofm.deploy.program import compare
from geofm.models.checkpoints import METADATA

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 - needed by PyTorch's exporter
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"ONNX files need the library {missing.name}: pip install 'geofm[onnx]'"
    ) from missing

#: Largest size of weights in one file, in bytes. ONNX uses protobuf, which is limited to 2 GiB.
LARGEST = 2**31 - 2**26


def write_onnx(network: Network, program: ExportedProgram, path: Path) -> float:
    """Write a program, and compare its outputs with PyTorch.

    Weights above :data:`LARGEST` go to a second file, ``NAME.onnx.data``.

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
    with _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            verbose=False,
        )
    assert made is not None
    made.model.metadata_props[METADATA] = json.dumps(network.metadata())
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    with atomic_file(path) as part:
        made.save(part, external_data=size > LARGEST)
        difference = _compared(network, part, path)
        if size > LARGEST:
            # Rename the weights first, so that the final file never exists without its weights.
            path.unlink(missing_ok=True)
            data = path.with_name(f'{path.name}.data')
            part.with_name(f'{part.name}.data').replace(data)
            _move_weights(part, data.name)
    return difference


def _compared(network: Network, part: Path, path: Path) -> float:
    """Return the difference between ONNX Runtime and PyTorch, if it is small enough."""
    options = onnxruntime.SessionOptions()
    # Log nothing: failures are raised as well.
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(part, options, providers=['CPUExecutionProvider'])

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        outputs: Any = session.run(list(network.outputs), arrays)
        tensors = [torch.from_numpy(output) for output in outputs]
        return dict(zip(network.outputs, tensors, strict=True))

    return compare(network, run, path)


def _move_weights(path: Path, name: str) -> None:
    """Set the name of the file with a model's weights."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == 'location':
                entry.value = name
    onnx.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages about nodes that the ONNX optimiser skips."""
    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
