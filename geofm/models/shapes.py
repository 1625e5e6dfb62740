"""Models without weights, for their shapes."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, override

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Methods with which weights are initialised.
_FILLING = frozenset(
    {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}
)


class _NoValues(TorchFunctionMode):
    """Skip the initialisation of tensors on the meta device, which have no values.

    PyTorch runs each operation on them in Python, which takes most of the time of building a model.
    """

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # With gradients, an operation would also be recorded.
        if func in _FILLING and args[0].is_meta and not torch.is_grad_enabled():
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context in which models are built on the meta device: shapes without weights.

    It is several times as fast as ``torch.device('meta')`` alone.

    Yields:
        Nothing.
    """
    with torch.device('meta'), _NoValues():
        yield
