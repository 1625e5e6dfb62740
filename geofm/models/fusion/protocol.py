"""Interface of a kind of fusion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

#: The ViTs of a model and their inputs: for the key of each ViT, one tuple of sensors per patch
#: embedding. A patch embedding gets the stacked bands of its sensors. A ViT with several patch
#: embeddings, of one sensor each, runs on the tokens of all sensors together.
type Inputs = Mapping[str, tuple[tuple[str, ...], ...]]

#: Key of the ViT in a model with one ViT for all sensors.
SINGLE = 'vit'


class FusionArgs(NamedTuple):
    """Arguments of :class:`geofm.models.MultiSensorViT` that a fusion module is built from.

    Attributes:
        dim: Width of the tokens.
        sensors: Keys of the sensors, in canonical order.
        query: Key of the query sensor.
        nhead: Number of attention heads.
        nlayer: Number of layers.
        dropout: Dropout probability.
        shared: Whether all layers share one set of weights.
    """

    dim: int
    sensors: tuple[str, ...]
    query: str
    nhead: int
    nlayer: int
    dropout: float
    shared: bool


class Fusion(Protocol):
    """Module that fuses the normalised token sequences of several ViTs into one sequence."""

    @property
    def needs_every_token(self) -> bool:
        """Whether a fused token depends on tokens at other positions.

        If False, the module is applied to selected tokens only, of shape (M, D).
        """

    def __call__(self, tokens: Sequence[Tensor], /) -> Tensor:
        """Fuse tokens.

        Args:
            tokens: One tensor per ViT, each of shape (B, L, D).

        Returns:
            Fused tokens of shape (B, L, D).
        """

    def attention(self, tokens: Sequence[Tensor]) -> Mapping[int, Tensor]:
        """Compute the attention weights of the last layer.

        Args:
            tokens: One tensor per ViT, each of shape (B, L, D).

        Returns:
            A mapping from the index in *tokens* of each sequence that is attended to, to weights of
            shape (B, heads, L, L). The last two dimensions are the fused token and the token of
            that sequence. Empty if the fusion has no attention.
        """

    def describe(self, sensors: Sequence[str]) -> str:
        """Describe the properties that must match to load weights of another module.

        Args:
            sensors: Keys of the model's sensors.

        Returns:
            The description.
        """


@dataclass(frozen=True, slots=True)
class FusionKind:
    """Way to compute one token sequence from several sensors.

    Attributes:
        arrange: Function that returns the ViTs and their inputs for given sensors.
        build: Function that builds the fusion module, which must satisfy :class:`Fusion`; None for
            a single ViT, whose tokens are the result.
    """

    arrange: Callable[[tuple[str, ...]], Inputs]
    build: Callable[[FusionArgs], nn.Module] | None = None


def one_vit_per_sensor(sensors: tuple[str, ...]) -> Inputs:
    """Return the inputs with one ViT per sensor.

    Args:
        sensors: Keys of the sensors.

    Returns:
        The inputs of the ViTs, by the keys of the sensors.
    """
    return {key: ((key,),) for key in sensors}
