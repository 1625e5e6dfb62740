"""The command that applies a fine-tuned checkpoint to scenes."""

import shlex
import sys
from pathlib import Path

from geofm.maps.predict import ClassProduct, PredictOptions, predict_scene
from geofm.maps.scene import Missing, files_by_sensor
from geofm.printing import say
from geofm.tasks.fine_tuned import load_fine_tuned


def predict(
    checkpoint: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    output: Path = Path('maps'),
    products: list[ClassProduct] | None = None,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 4,
    simplify: float = 0.0,
    bands: list[str] | None = None,
    missing_bands: Missing | None = None,
    device: str | None = None,
    scene: dict[str, Path] | None = None,
    scene_bands: dict[str, list[str]] | None = None,
    reference_sensor: str | None = None,
    reference: Path | None = None,
    reference_column: str | None = None,
    block: int = 64,
) -> None:
    """Map what a fine-tuned checkpoint says of a scene: classes, or numbers of a regression.

    With --config this is Lightning's predict. A run that was stopped resumes when it is given
    again.

    Args:
        checkpoint: Checkpoint of TorchGeo's Classification, SemanticSegmentation or
            PixelwiseRegression, or of geofm's Mask2Former.
        s1: Sentinel-1 scene: VV and VH in dB, on any grid.
        s2: Sentinel-2 scene: bands as DN. Its grid is that of the products.
        output: Folder to write to.
        products: Any of classes, probabilities, entropy, polygons and picture; classes and picture
            if not given.
        window: Side of a window in pixels; best the size that the task was trained with. Of a
            Classification it is the area that gets one class.
        overlap: Least fraction of a window that the next one covers too, in [0, 1).
        batch_size: Windows per forward pass.
        simplify: Tolerance by which polygons are simplified, in units of the scene's CRS.
        bands: Names of the input channels, if the checkpoint does not say.
        missing_bands: What stands for a band that a file lacks: its `mean` or `zero`; an error if
            not given.
        device: Where to compute, e.g. cuda; on the CPU if not given.
        scene: Scenes of any sensors by key, as --scene s1=FILE --scene dem=FILE.
        scene_bands: Names of the bands of files of any sensors, if they do not say, as
            --scene_bands landsat=[B02,B03,B04].
        reference_sensor: Sensor whose grid the products are on; Sentinel-2 where it is given, else
            the first that does not stay the same over time.
        reference: Raster or features with the true classes; the accuracy is printed and written.
        reference_column: Column of the features that holds the class.
        block: Side of the spatial blocks that the intervals of the accuracy are drawn from, in
            pixels of the map.
    """
    task = load_fine_tuned(checkpoint, bands)
    rasters = files_by_sensor(s1, s2, scene)
    options = PredictOptions(window, overlap, batch_size, missing_bands, simplify)
    chosen: list[ClassProduct] = products or (
        ['probabilities'] if task.several else ['classes', 'picture']
    )
    if reference is not None and (task.kind == 'regression' or 'classes' not in chosen):
        raise ValueError('--reference compares classes: add classes to --products')
    files = predict_scene(
        task,
        rasters,
        output,
        chosen,
        options,
        reference=reference_sensor,
        names=scene_bands,
        device=device,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    for path in files.values():
        say(path)
    if reference is not None:
        from rich.console import Console

        from geofm.evaluation.map_accuracy import assess_map

        accuracy = assess_map(files['classes'], reference, reference_column, block)
        Console().print(accuracy.table(str(reference)))
        for path in accuracy.save(output, f'{files["classes"].stem}_accuracy'):
            say(path)
