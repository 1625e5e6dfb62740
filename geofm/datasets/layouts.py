"""Built-in layouts by name."""

from pathlib import Path

from geofm.datasets.sen12ms_layouts import SEN12MSCR_LAYOUT, SEN12MSCRTS_LAYOUT
from geofm.datasets.table.layout import Files, Layout, LayoutError
from geofm.printing import printable
from geofm.sensors import RGB
from geofm.suggestions import did_you_mean

#: Images in folders of any depth, as in ImageNet, ``train/n01440764/name.JPEG``. Each image is a
#: place, named by its path. A top folder ``train``, ``val`` or ``test`` is the split. The folder of
#: an image can serve as its label.
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
    """Find a layout by name or file.

    Args:
        name: Name of a built-in layout, or path of a YAML file.

    Returns:
        The layout.

    Raises:
        LayoutError: If it is neither, or the file is not a layout.
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
