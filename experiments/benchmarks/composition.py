"""DINOv2 composed of timm and lightly: references for the speed of a training step.

:class:`Composition` is a typical implementation: one forward pass for global and one for local
crops, all tokens go through every block, and stochastic depth multiplies dropped samples by zero.
:class:`PackedComposition` adds the two ideas of DINOv2's method that save time:
all crops run as one packed sequence, and stochastic depth skips dropped samples.
"""

from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import update_momentum
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from geofm.models.fusion import LinearFusion
from geofm.transforms import Crops


class Encoders(nn.Module):
    """One masked ViT per sensor, fused like geofm's linear fusion.

    Args:
        vit: Arguments of ``timm.create_model``.
        channels: Number of channels of each sensor.
        drop_path: Rate of stochastic depth, the same in all blocks, as in DINOv2.
    """

    def __init__(self, vit: dict[str, Any], channels: Sequence[int], drop_path: float) -> None:
        super().__init__()
        self.channels = list(channels)
        vits = nn.ModuleList(
            MaskedVisionTransformerTIMM(
                timm.create_model(in_chans=n, num_classes=0, dynamic_img_size=True, **vit),
                weight_initialization='skip',
                pos_embed_initialization='skip',
            )
            for n in channels
        )
        self.vits = cast(Sequence[MaskedVisionTransformerTIMM], vits)
        for block in (block for vit in self.vits for block in vit.vit.blocks):
            block.drop_path1, block.drop_path2 = (
                DropPath(drop_path) if drop_path else nn.Identity() for _ in range(2)
            )
        self.drop_path = drop_path
        self.width = self.vits[0].vit.embed_dim
        self.prefix = self.vits[0].vit.num_prefix_tokens
        self.fusion = LinearFusion(self.width) if len(channels) > 1 else None

    def forward(self, crops: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return all tokens of crops (B, C, H, W), masked where masks (B, N) are True."""
        masks = self._with_prefix(masks)
        images = crops.split(self.channels, dim=1)
        tokens = [
            vit.encode(image, mask=masks) for vit, image in zip(self.vits, images, strict=True)
        ]
        return tokens[0] if self.fusion is None else self.fusion(tokens)

    def forward_packed(self, crops: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """Return all tokens of masked crops of several sizes, run as one packed sequence."""
        sizes = [
            (images.split(self.channels, dim=1), self._with_prefix(masks))
            for images, masks in crops
        ]
        by_sensor = []
        for i, vit in enumerate(self.vits):
            groups = [vit.preprocess(images=images[i], mask=masks) for images, masks in sizes]
            for block in vit.vit.blocks:
                groups = _run_packed(block, groups, self.drop_path if self.training else 0.0)
            by_sensor.append([vit.vit.norm(group) for group in groups])
        if self.fusion is None:
            return by_sensor[0]
        return [self.fusion(list(tokens)) for tokens in zip(*by_sensor, strict=True)]

    def _with_prefix(self, masks: Tensor | None) -> Tensor | None:
        """Extend masks to all tokens: CLS and registers are never masked."""
        return None if masks is None else nn.functional.pad(masks, (self.prefix, 0))


def _run_packed(block: Block, groups: list[Tensor], drop_path: float) -> list[Tensor]:
    """Run one block on groups of sequences (B, L, D) of different lengths.

    Each residual branch runs on a random subset of the sequences only, scaled so that its
    expectation is that of all of them.
    """
    for branch in (_attention, _mlp):
        if not drop_path:
            added = branch(block, groups)
            groups = [x + y for x, y in zip(groups, added, strict=True)]
            continue
        kept = [
            torch.randperm(len(x), device=x.device)[: max(1, int(len(x) * (1 - drop_path)))]
            for x in groups
        ]
        added = branch(block, [x[rows] for x, rows in zip(groups, kept, strict=True)])
        groups = [
            x.index_add(0, rows, y.to(x.dtype), alpha=len(x) / len(rows))
            for x, rows, y in zip(groups, kept, added, strict=True)
        ]
    return groups


def _pack(groups: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(0, 1) for x in groups])


def _unpack(packed: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
    parts = packed.split([len(x) * x.shape[1] for x in groups])
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(parts, groups, strict=True)]


def _attention(block: Block, groups: Sequence[Tensor]) -> list[Tensor]:
    attention = block.attn
    assert isinstance(attention, Attention)
    qkv = _unpack(attention.qkv(block.norm1(_pack(groups))), groups)
    mixed = []
    for x in qkv:
        q, k, v = x.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return _unpack(block.ls1(attention.proj(_pack(mixed))), groups)


def _mlp(block: Block, groups: Sequence[Tensor]) -> list[Tensor]:
    return _unpack(block.ls2(block.mlp(block.norm2(_pack(groups)))), groups)


class Composition(nn.Module):
    """Training step of DINOv2.

    Args:
        vit: Arguments of ``timm.create_model``.
        channels: Number of channels of each sensor.
        prototypes: Prototypes of the one head.
        drop_path: Rate of stochastic depth of the student.
    """

    def __init__(
        self, vit: dict[str, Any], channels: Sequence[int], prototypes: int, drop_path: float
    ) -> None:
        super().__init__()
        self.student = Encoders(vit, channels, drop_path)
        self.teacher = Encoders(vit, channels, 0.0)
        width = self.student.width
        self.head = DINOv2ProjectionHead(width, output_dim=prototypes)
        self.teacher_head = DINOv2ProjectionHead(width, output_dim=prototypes)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.teacher.eval().requires_grad_(False)
        self.teacher_head.eval().requires_grad_(False)
        self.dino_loss = DINOLoss(output_dim=prototypes)
        self.ibot_loss = IBOTPatchLoss(output_dim=prototypes)
        self.koleo_loss = KoLeoLoss()

    def student_tokens(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """Return the tokens of the student for the global and local crops."""
        return self.student(crops.globals, crops.masks), self.student(crops.locals)

    def losses(self, crops: Crops, temperature: float) -> dict[str, Tensor]:
        """Return the losses of a batch of B images.

        Args:
            crops: Its crops.
            temperature: Teacher temperature.

        Returns:
            The three losses by name.
        """
        images, prefix = len(crops.globals) // 2, self.student.prefix
        side = int(crops.masks.shape[1] ** 0.5)
        with torch.no_grad():
            teacher = self.teacher(crops.globals)
            teacher_cls = self.teacher_head(teacher[:, 0])
            teacher_patches = self.teacher_head(teacher[:, prefix:][crops.masks])
        student, local = self.student_tokens(crops)
        patches = self.head(student[:, prefix:][crops.masks])
        features = student[:, 0]
        cls = torch.cat([self.head(features), self.head(local[:, 0])])
        return {
            'dino': self.dino_loss(
                list(teacher_cls.split(images)), list(cls.split(images)), temperature
            ),
            'ibot': self.ibot_loss(
                teacher_patches, patches, crops.masks.unflatten(1, (side, side)), temperature
            ),
            'koleo': torch.stack([self.koleo_loss(view) for view in features.split(images)]).sum(),
        }

    def move_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student.

        Args:
            momentum: Fraction of the teacher that is kept.
        """
        update_momentum(self.student, self.teacher, momentum)
        update_momentum(self.head, self.teacher_head, momentum)


class PackedComposition(Composition):
    """The same step with packed crops, and with dropped samples skipped."""

    def student_tokens(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """Return the tokens of the student for the global and local crops."""
        groups = self.student.forward_packed([(crops.globals, crops.masks), (crops.locals, None)])
        return groups[0], groups[1]
