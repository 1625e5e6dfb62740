"""Activation checkpointing: what of a block is kept, and what is computed again."""

from functools import cache
from typing import Any, Literal

#: What is computed again of a block: nothing (False), everything (True); all but attention; or all
#: but attention and the linear layers with a bias, which leaves what costs little.
type Recompute = bool | Literal['attention', 'matmul']

#: Attention by what :func:`geofm.models.packed_attention.choose_attention` may choose.
_ATTENTION = (
    'aten::_scaled_dot_product_flash_attention',
    'aten::_scaled_dot_product_efficient_attention',
    'aten::_scaled_dot_product_cudnn_attention',
    'aten::_scaled_dot_product_flash_attention_for_cpu',
    'aten::_flash_attention_forward',
    'aten::_efficient_attention_forward',
    'torch_attn::_varlen_attn',
)
#: Not mm: on a CPU its result gets the bias in place, which what is kept must not.
_MATMUL = ('aten::addmm',)


@cache
def kept_operators(keep: Literal['attention', 'matmul']) -> list[Any]:
    """Operators whose results are kept.

    Args:
        keep: What not to compute again.

    Returns:
        Operators for :func:`torch.utils.checkpoint.create_selective_checkpoint_contexts`.

    Raises:
        ValueError: If *keep* is unknown.
    """
    if keep not in ('attention', 'matmul'):
        raise ValueError(f"grad_checkpointing must be True, False, 'attention' or 'matmul': {keep}")
    # Registers its operator.
    import torch.nn.attention.varlen

    names = _ATTENTION if keep == 'attention' else _ATTENTION + _MATMUL
    operators = []
    for name in names:
        namespace, operator = name.split('::')
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            operators.append(packet.default)
    return operators
