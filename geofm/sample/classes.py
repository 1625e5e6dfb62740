"""Names and colours of the land-cover classes of the generated sample data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LandCoverClass:
    """Class of the land-cover maps. Its value in a map is its index in `LAND_COVER`.

    Attributes:
        name: Display name.
        color: Red, green and blue, 0 to 255.
    """

    name: str
    color: tuple[int, int, int]


LAND_COVER: tuple[LandCoverClass, ...] = (
    LandCoverClass('water', (58, 112, 184)),
    LandCoverClass('wetland', (94, 176, 170)),
    LandCoverClass('forest', (38, 99, 52)),
    LandCoverClass('grassland', (150, 196, 92)),
    LandCoverClass('winter crops', (232, 205, 90)),
    LandCoverClass('summer crops', (226, 145, 52)),
    LandCoverClass('town', (190, 52, 60)),
    LandCoverClass('bare ground', (176, 164, 150)),
)


def class_value(name: str) -> int:
    """Return the value of a class in the land-cover maps.

    Args:
        name: Name of the class.

    Returns:
        Its index in `LAND_COVER`.

    Raises:
        ValueError: If there is no such class.
    """
    names = [land_cover.name for land_cover in LAND_COVER]
    if name not in names:
        raise ValueError(f"unknown land-cover class '{name}': known are {names}")
    return names.index(name)
