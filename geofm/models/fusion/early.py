"""Early fusion: one ViT over the stacked bands of all sensors."""

from geofm.models.fusion.protocol import SINGLE, FusionKind, Inputs


def arrange(sensors: tuple[str, ...]) -> Inputs:
    """Return the inputs: one ViT with one patch embedding for all sensors.

    Args:
        sensors: Keys of the sensors.

    Returns:
        Inputs by key of the ViT.
    """
    return {SINGLE: (sensors,)}


KIND = FusionKind(arrange)
