"""The layout of a folder of ordinary pictures: every picture is a place."""

from geofm.datasets.table.layout import Files, Layout
from geofm.sensors import RGB

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
