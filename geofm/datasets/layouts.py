"""Layouts that are built in, by name."""

from pathlib import Path

from geofm.datasets.sen12ms_layouts import SEN12MSCR_LAYOUT, SEN12MSCRTS_LAYOUT
from geofm.datasets.table.layout import Files, Layout, LayoutError
from geofm.printing import printable
from geofm.sensors import RGB
from geofm.suggestions import did_you_mean

#: Pictures in folders of any depth, such as those of ImageNet, ``train/n01440764/name.JPEG``. A
#: folder ``train``, ``val`` or ``test`` at the top is the split. The folder of a picture is its
#: label, if it has one: part of the name of the place.
IMAGES_LAYOUT = Layout(
    (
        Files(
            RGB.name,
            r'(?P<place>(?:(?P<split>train|val|test)/)?(?:[^/]+/)*[^/]+)\.(?i:jpe?g|png|tiff?|bmp)',
        ),
    ),
    source='layout images',
)

#: Built-in layouts by name.
LAYOUTS: dict[str, Layout] = {
    'sen12mscrts': SEN12MSCRTS_LAYOUT,
    'sen12mscr': SEN12MSCR_LAYOUT,
    'images': IMAGES_LAYOUT,
}


def find_layout(name: str | Path) -> Layout:
    """Find a layout.

    Args:
        name: Name of a built-in layout, or a YAML file.

    Returns:
        The layout.

    Raises:
        LayoutError: If it is neither, or the file is no layout.
    """
    text = str(name)
    if text in LAYOUTS:
        return LAYOUTS[text]
    if not Path(text).is_file() and not text.lower().endswith(('.yaml', '.yml')):
        raise LayoutError(
            f"no layout '{printable(text)}': give a YAML file or one of {', '.join(LAYOUTS)}"
            f'{did_you_mean(text, LAYOUTS)}'
        )
    return Layout.read(text)
