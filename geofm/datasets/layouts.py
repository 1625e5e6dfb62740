"""Layouts that are built in, by name."""

from pathlib import Path

from geofm.datasets.images_layout import IMAGES_LAYOUT
from geofm.datasets.sen12mscr_layout import SEN12MSCR_LAYOUT
from geofm.datasets.sen12mscrts_layout import SEN12MSCRTS_LAYOUT
from geofm.datasets.table.layout import Layout, LayoutError
from geofm.printing import printable
from geofm.suggestions import did_you_mean

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
