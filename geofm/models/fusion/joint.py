"""Joint encoding: one transformer over the patch tokens of all sensors together.

As in the multimodal encoders of CROMA (Fuller et al., 2023) and OlmoEarth. Each sensor has a patch
embedding and a learned sensor embedding; CLS and registers occur once. After the last block, patch
tokens are averaged over the sensors that are present. A missing sensor has no tokens.
"""

from geofm.models.fusion.protocol import SINGLE, FusionKind, Inputs


def arrange(sensors: tuple[str, ...]) -> Inputs:
    """Return the inputs: one ViT with one patch embedding per sensor.

    Args:
        sensors: Keys of the sensors.

    Returns:
        Inputs by key of the ViT.
    """
    return {SINGLE: tuple((key,) for key in sensors)}


KIND = FusionKind(arrange)
