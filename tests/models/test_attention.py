"""Attention that a model shows against softmax(q k^T / sqrt(d)), head by head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geofm.models import MultiSensorViT
from geofm.models.attention import rollout_step, watch_attention

GRID = (4, 6)
CLOSE: dict[str, Any] = {'atol': 1e-5, 'rtol': 1e-5}


def build(gain: float = 3, dtype: torch.dtype = torch.float64, **kwargs: Any) -> MultiSensorViT:
    # LayerScale of 1: at its initial 1e-5 a block changes almost nothing and a test could not fail.
    layout: dict[str, Any] = {'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'patch_size': 8}
    model = MultiSensorViT(**{**layout, 'init_values': 1.0, **kwargs}).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # Or all attention is next to uniform. It amplifies rounding, too: hence float64.
            parameter.data.mul_(gain)
    return model


def image(model: MultiSensorViT) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.randn(2, len(model.bands), 8 * GRID[0], 8 * GRID[1], dtype=dtype)


def softmax_of_products(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Weights (B, heads, L, M) of queries and keys (B, L or M, D), by the formula."""
    size = q.shape[-1] // heads
    weights = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.einsum('bld,bmd->blm', q[..., part], k[..., part]) / size**0.5
        exp = scores.exp()
        weights.append(exp / exp.sum(dim=-1, keepdim=True))
    return torch.stack(weights, dim=1)


def plain(model: MultiSensorViT, x: Tensor) -> dict[str, list[Tensor]]:
    """Weights of every block of every sensor, from the inputs of the blocks in the fused path."""
    found: dict[str, list[Tensor]] = {}
    for key, channels in (('s1', slice(0, 2)), ('s2', slice(2, 15))):
        encoder: Any = model.encoders[key]
        tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(x[:, channels])))
        found[key] = []
        for block in encoder.blocks:
            assert block.attn.fused_attn
            q, k, _ = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
            found[key].append(softmax_of_products(q, k, block.attn.num_heads))
            tokens = block(tokens)
    return found


def plain_fusion(model: MultiSensorViT, x: Tensor) -> Tensor:
    """Weights of the last layer of cross-attention."""
    fusion: Any = model.fusion
    tokens = [model.encoders[key].forward_features(x[:, c])  # type: ignore[operator]
              for key, c in (('s1', slice(0, 2)), ('s2', slice(2, 15)))]  # fmt: skip
    query, context = tokens[fusion.query], tokens[1 - fusion.query]
    *earlier, last = fusion._layers()
    for layer in earlier:
        query = layer(query, context)
    (wq, wk, _), (bq, bk, _) = (
        part.chunk(3) for part in (last.attn.in_proj_weight, last.attn.in_proj_bias)
    )
    return softmax_of_products(query @ wq.T + bq, context @ wk.T + bk, last.attn.num_heads)


@pytest.mark.parametrize('registers', [0, 4])
@pytest.mark.parametrize('fusion', ['linear', 'xattn'])
@pytest.mark.parametrize('block', [0, 1, -1])
def test_attention_of_cls_and_of_patches(registers: int, fusion: str, block: int) -> None:
    model = build(reg_tokens=registers, fusion=fusion)
    x, prefix = image(model), 1 + registers
    expected = {key: blocks[block] for key, blocks in plain(model, x).items()}
    if fusion == 'xattn':
        expected['fusion'] = plain_fusion(model, x)
    of_cls = model.cls_attention(x, block=block)
    query = torch.tensor([7, 23])
    of_patch = model.patch_attention(x, query, block=block)
    assert set(of_cls) == set(of_patch) == set(expected)
    for source, weights in expected.items():
        assert weights.shape[-1] == prefix + 24
        rows = weights[:, :, 0, prefix:].unflatten(-1, GRID)
        torch.testing.assert_close(of_cls[source], rows, **CLOSE)
        rows = torch.stack([weights[i, :, prefix + p, prefix:] for i, p in enumerate([7, 23])])
        torch.testing.assert_close(of_patch[source], rows.unflatten(-1, GRID), **CLOSE)
        # The rows differ by far more than the tolerance, so another row would not pass.
        assert (of_patch[source] - of_cls[source]).abs().max() > 1e-3


@pytest.mark.parametrize('fusion', ['linear', 'xattn'])
def test_attention_in_single_precision(fusion: str) -> None:
    model = build(gain=1, dtype=torch.float32, fusion=fusion)
    x = image(model)
    expected = {key: blocks[-1] for key, blocks in plain(model, x).items()}
    if fusion == 'xattn':
        expected['fusion'] = plain_fusion(model, x)
    for source, maps in model.cls_attention(x).items():
        rows = expected[source][:, :, 0, model.num_prefix_tokens :].unflatten(-1, GRID)
        torch.testing.assert_close(maps, rows, **CLOSE)


@pytest.mark.parametrize('query', ['s1', 's2'])
@pytest.mark.parametrize('shared', [True, False])
def test_cross_attention_goes_from_the_query_sensor_to_the_other(query: str, shared: bool) -> None:
    model = build(fusion='xattn', query=query, shared=shared, nlayer=2)
    x = image(model)
    weights = plain_fusion(model, x)[:, :, 0, model.num_prefix_tokens :]
    torch.testing.assert_close(
        model.cls_attention(x)['fusion'], weights.unflatten(-1, GRID), **CLOSE
    )


@pytest.mark.parametrize('registers', [0, 4])
def test_rollout_is_the_product_of_the_blocks(registers: int) -> None:
    model = build(reg_tokens=registers, fusion='xattn')
    x = image(model)
    maps = model.attention_rollout(x)
    assert set(maps) == {'s1', 's2'}
    for key, blocks in plain(model, x).items():
        identity = torch.eye(blocks[0].shape[-1], dtype=torch.float64)
        product = identity.expand(2, -1, -1)
        for weights in blocks:
            mixed = 0.5 * weights.mean(dim=1) + 0.5 * identity
            mixed = mixed / mixed.sum(dim=-1, keepdim=True)
            product = mixed @ product
        expected = product[:, 0, 1 + registers :].unflatten(-1, GRID)
        torch.testing.assert_close(maps[key], expected, **CLOSE)
        # CLS keeps a share of itself, and registers have one.
        assert (maps[key].sum(dim=(1, 2)) < 1).all()


def test_rollout_of_uniform_attention() -> None:
    """Half of what is left goes to each token alike, again and again: known in closed form."""
    length, blocks = 5, 4
    weights = torch.full((1, 3, length, length), 1 / length)
    product = None
    for _ in range(blocks):
        product = rollout_step(product, weights)
    assert product is not None
    expected = torch.full((length, length), (1 - 0.5**blocks) / length)
    expected += 0.5**blocks * torch.eye(length)
    torch.testing.assert_close(product[0], expected)


@pytest.mark.parametrize('fusion', ['linear', 'xattn', 'early'])
def test_one_pass_gives_it_all(fusion: str) -> None:
    model = build(fusion=fusion)
    x, dates = image(model), torch.tensor([[17000, 17003], [17500, 17501]])
    present = torch.tensor([[True, True], [False, True]])
    seen = model.observe(x, dates, present, block=1, rollout=True)
    torch.testing.assert_close(
        seen.tokens, model.forward_features(x, dates, present=present), **CLOSE
    )
    for found, wanted in (
        (seen.attention, model.cls_attention(x, dates, 1, present)),
        (seen.rollout, model.attention_rollout(x, dates, present)),
    ):
        assert set(found) == set(wanted)
        for key, maps in wanted.items():
            torch.testing.assert_close(found[key], maps)
    assert model.observe(x).attention == {}
    assert model.observe(x).rollout == {}
    with pytest.raises(IndexError, match='block 3: the model has 3 blocks'):
        model.observe(x, block=3)


def test_a_model_is_left_as_it_was() -> None:
    model = build()
    attention: Any = model.encoders['s1'].blocks[0].attn  # type: ignore[union-attr, index]
    see: Callable[[int, Tensor], None] = lambda number, weights: None  # noqa: E731

    def stop() -> None:
        with watch_attention({0: attention}, see):
            assert not attention.fused_attn
            raise RuntimeError('stopped')

    with pytest.raises(RuntimeError, match='stopped'):
        stop()
    assert attention.fused_attn
    assert not attention.attn_drop._forward_pre_hooks
    with (
        pytest.raises(ValueError, match='Linear does not expose'),
        watch_attention({0: torch.nn.Linear(2, 2)}, see),
    ):
        pass
