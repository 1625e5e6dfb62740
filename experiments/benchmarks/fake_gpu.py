"""Simulated GPU that counts what a step copies to it and where the host waits for it.

Tensors on ``cuda`` are PyTorch's fake tensors, which have a shape and a device but no values, so
that a step of any size runs anywhere. Tensors on the CPU are real. Operators that mix devices fail
as they would on a GPU.
"""

import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch

# Imported before torch.Tensor is patched, because it checks the signatures.
import torch._dynamo.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from geofm.device import to_device

aten = torch.ops.aten

#: Operators with a result whose size or value the host waits for.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
    aten.is_nonzero.default,
}
#: Operators that wait if an index is a mask.
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
#: Operators that copy their input, or write to their first argument what the second holds.
COPIES = {aten._to_copy.default, aten.copy_.default}

_LIBRARIES = Path(sysconfig.get_paths()['purelib'])
_PACKAGES = ('geofm', 'lightning', 'torchgeo', 'lightly', 'torchmetrics', 'timm')


@dataclass
class Traffic:
    """Counts of copies and waits.

    Attributes:
        waits: How often the host waited for the device, by place in the code.
        copied: Bytes copied to the device, by place in the code.
        pageable: Bytes of these that came from memory that is not pinned.
    """

    waits: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)


class FakeGPU(FakeTensorMode):
    """While it is active, ``cuda`` is a fake device; see :func:`fake_gpu`.

    Attributes:
        traffic: What was counted since it was last replaced.
    """

    def __init__(self) -> None:
        """Initialize a new FakeGPU instance."""
        super().__init__(allow_non_fake_inputs=True)
        self.traffic = Traffic()
        self._pinned: dict[int, Tensor] = {}

    def pin(self, tensor: Tensor) -> Tensor:
        """Pin a tensor; here this only marks its memory.

        Args:
            tensor: A tensor on the CPU.

        Returns:
            The same values.
        """
        if not self.is_pinned(tensor):
            # A copy, as pinning is one; kept, so that no other tensor gets its memory.
            tensor = tensor.clone()
            self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in pinned memory.

        Args:
            tensor: A tensor on the CPU.

        Returns:
            True if it does.
        """
        return tensor.untyped_storage().data_ptr() in self._pinned

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator: unchanged on the CPU, faked and counted on the device.

        Args:
            func: The operator.
            types: Accepted for torch.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            Its result. Values that come from the device are 0, or True.
        """
        kwargs = dict(kwargs or {})
        device = None if kwargs.get('device') is None else torch.device(kwargs['device'])
        # The autograd engine takes fake tensors for those of the device meta, see fake_gpu.
        if device is not None and device.type == 'meta':
            device = kwargs['device'] = torch.device('cuda', 0)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not on_device and (device is None or device.type == 'cpu'):
            return func(*args, **kwargs)
        if func in COPIES:
            target = args[0] if func is aten.copy_.default else None
            source = args[0] if target is None else args[1]
            if not isinstance(source, FakeTensor):
                blocking = not (args[2] if len(args) > 2 else kwargs.get('non_blocking'))
                self._count_copy(source, blocking)
            elif device is not None and device.type == 'cpu':
                self.traffic.waits[_place()] += 1
                return _values_like(source, kwargs.get('dtype'))
            elif target is not None and not isinstance(target, FakeTensor):
                self.traffic.waits[_place()] += 1
                return target.copy_(_values_like(source, target.dtype))
        elif func in WAITING or (func in BY_INDEX and _by_mask(args[1])):
            self.traffic.waits[_place()] += 1
            if func is aten._local_scalar_dense.default:
                return _values_like(args[0], None).item()
            raise NotImplementedError(f'{func} on the device: the host does not know its size')
        if func is aten._efficient_attention_backward.default:
            args, kwargs = tree_map(self._on_device, (args, kwargs))
        return super().dispatch(func, types, args, kwargs)

    def _on_device(self, value: Any) -> Any:
        """Return the state of the random numbers, which the kernel accepts on either device."""
        if not isinstance(value, Tensor) or value.device.type == 'cuda' or value.numel() > 1:
            return value
        with self:
            return torch.empty(value.shape, dtype=value.dtype, device='cuda')

    def _count_copy(self, source: Tensor, blocking: bool) -> None:
        place = _place()
        size = source.numel() * source.element_size()
        self.traffic.copied[place] += size
        if not self.is_pinned(source):
            self.traffic.pageable[place] += size
        if blocking:
            self.traffic.waits[place] += 1


def _by_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _values_like(source: FakeTensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype or source.dtype
    if source.constant is not None:
        return source.constant.to(dtype)
    make: Callable[..., Tensor] = torch.ones if dtype == torch.bool else torch.zeros
    return make(tuple(source.shape), dtype=dtype, device='cpu')


def _place() -> str:
    """Return module and function of the innermost caller outside of PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get('__name__', ''))
        if name.split('.')[0] in _PACKAGES and name != 'geofm.device':
            return f'{name}.{frame.f_code.co_qualname}'
        frame = frame.f_back
    return 'elsewhere'


@contextmanager
def fake_gpu(attention: str = 'varlen') -> Iterator[FakeGPU]:
    """Make ``cuda`` a fake device.

    Autocast does not know fake tensors of this kind: everything is in float32.

    Args:
        attention: How packed attention is computed: 'sdpa', 'varlen' or 'xformers'.

    Yields:
        The device, with what was counted.
    """
    gpu = FakeGPU()
    make_subclass = Tensor._make_subclass

    def without_device(cls: Any, elem: Any, requires_grad: bool = False, **kwargs: Any) -> Any:
        # To C++ the tensor lies on meta, so that the autograd engine asks no driver for a stream.
        kwargs.pop('dispatch_device', None)
        return make_subclass(cls, elem, requires_grad, **kwargs)

    patches: dict[str, Any] = {
        'torch.Tensor._make_subclass': staticmethod(without_device),
        # One copy, as on a GPU, and not one for each number.
        'torch._subclasses.fake_tensor.FakeTensor.tolist': lambda tensor: tensor.cpu().tolist(),
        'torch.Tensor.pin_memory': lambda tensor, *args: gpu.pin(tensor),
        'torch.Tensor.is_pinned': lambda tensor, *args: gpu.is_pinned(tensor),
        'geofm.models.packed_attention.choose_attention': lambda *args: (attention, 'asked for'),
        'torch.cuda.get_device_capability': lambda *args: (9, 0),
        'torch.cuda.get_rng_state': lambda *args: torch.empty(0),
        'torch.cuda.set_rng_state': lambda *args: None,
        'geofm.datamodules.hooks.copy_beside': lambda copy, device: copy(),
    }
    if attention == 'xformers':
        patches['xformers.ops.fmha.common._built_with_cuda'] = True
        patches['xformers.ops.fmha.attn_bias._to_device_tensor'] = lambda seq, dtype, device: (
            to_device(torch.tensor(seq, dtype=dtype), device)
        )
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(gpu)
        yield gpu
