"""Activation checkpointing: which results of a block are kept, and which are recomputed."""

from functools import cache
from typing import Any, Literal

#: What to recompute in a block: nothing (False), everything (True), everything except attention
#: ('attention'), or everything except attention and linear layers with a bias ('matmul').
type Recompute = bool | Literal['attention', 'matmul']

#: Operators of attention that :func:`geofm.models.choose_attention` may choose.
_ATTENTION = (
    'aten::_scaled_dot_product_flash_attention',
    'aten::_scaled_dot_product_efficient_attention',
    'aten::_scaled_dot_product_cudnn_attention',
    'aten::_scaled_dot_product_flash_attention_for_cpu',
    'aten::_flash_attention_forward',
    'aten::_efficient_attention_forward',
    'torch_attn::_varlen_attn',
)
#: Without mm: on a CPU the bias is added to its result in place, and kept results must not change.
_MATMUL = ('aten::addmm',)


@cache
def kept_operators(keep: Literal['attention', 'matmul']) -> list[Any]:
    """Return the operators whose results are kept.

    Args:
        keep: Operations that are not recomputed.

    Returns:
        Operators for :func:`torch.utils.checkpoint.create_selective_checkpoint_contexts`.

    Raises:
        ValueError: If *keep* is unknown.
    """
    if keep not in ('attention', 'matmul'):
        raise ValueError(
            f"grad_checkpointing must be True, False, 'attention' or 'matmul', not {keep}"
        )
    # The import registers its operator.
    import torch.nn.attention.varlen

    names = _ATTENTION if keep == 'attention' else _ATTENTION + _MATMUL
    operators = []
    for name in names:
        namespace, operator = name.split('::')
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            operators.append(packet.default)
    return operators
