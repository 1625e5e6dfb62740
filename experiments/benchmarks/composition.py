"""DINOv2 put together from timm and lightly, as their users would: the reference for speed.

Global and local crops take a forward pass each, all tokens go through all of every block; lightly's
masked ViT, heads, losses and momentum update; PyTorch's AdamW as it comes.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from geofm.models.fusion import LinearFusion
from geofm.transforms import Crops


class Encoders(nn.Module):
    """One masked ViT a sensor, their tokens fused as this package's linear fusion does.

    Args:
        vit: Arguments of ``timm.create_model``.
        channels: Number of channels of each sensor.
    """

    def __init__(self, vit: dict[str, Any], channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)
        self.vits = nn.ModuleList(
            MaskedVisionTransformerTIMM(
                timm.create_model(in_chans=n, num_classes=0, dynamic_img_size=True, **vit),
                weight_initialization='skip',
                pos_embed_initialization='skip',
            )
            for n in channels
        )
        self.width = self.vits[0].vit.embed_dim
        self.prefix = self.vits[0].vit.num_prefix_tokens
        self.fusion = LinearFusion(self.width) if len(channels) > 1 else None

    def forward(self, crops: Tensor, masks: Tensor | None = None) -> Tensor:
        """All tokens of crops (B, C, H, W), patches hidden where masks (B, N) are True."""
        if masks is not None:
            masks = nn.functional.pad(masks, (self.prefix, 0))
        images = crops.split(self.channels, dim=1)
        tokens = [
            vit.encode(image, mask=masks) for vit, image in zip(self.vits, images, strict=True)
        ]
        return tokens[0] if self.fusion is None else self.fusion(tokens)


class Composition(nn.Module):
    """A training step of DINOv2.

    Args:
        vit: Arguments of ``timm.create_model``.
        channels: Number of channels of each sensor.
        prototypes: Prototypes of the one head.
    """

    def __init__(self, vit: dict[str, Any], channels: Sequence[int], prototypes: int) -> None:
        super().__init__()
        self.student, self.teacher = Encoders(vit, channels), Encoders(vit, channels)
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

    def losses(self, crops: Crops, temperature: float) -> dict[str, Tensor]:
        """Losses of a batch of B images.

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
        student = self.student(crops.globals, crops.masks)
        patches = self.head(student[:, prefix:][crops.masks])
        features = student[:, 0]
        cls = torch.cat([self.head(features), self.head(self.student(crops.locals)[:, 0])])
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
            momentum: Share of the teacher that stays.
        """
        update_momentum(self.student, self.teacher, momentum)
        update_momentum(self.head, self.teacher_head, momentum)
