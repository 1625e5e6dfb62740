"""Maps of what a fine-tuned task says of every scene of a table of rasters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geofm.atomic import check_not_overwritten
from geofm.maps.parts import ALONE, Part
from geofm.maps.predict import Prediction
from geofm.maps.scene import Imagery
from geofm.maps.table_run import TableRun, run_table
from geofm.maps.table_scenes import TableScenes


def predict_table(
    prediction: Prediction, scenes: TableScenes, output: Path, part: Part = ALONE
) -> TableRun:
    """Map what a fine-tuned task says of every scene of a table.

    Args:
        prediction: What to apply to the scenes.
        scenes: The scenes.
        output: Folder of a folder for each scene.
        part: Which of the scenes this process maps.

    Returns:
        What became of the scenes, see :func:`geofm.maps.table_run.run_table`.
    """

    def made_with(scene: Imagery) -> Mapping[str, Any]:
        check_not_overwritten(
            prediction.keep, prediction.files(scene, output / scene.stem).values()
        )
        return {
            **prediction.manifest(scene),
            'products': prediction.products,
            'simplify': prediction.options.simplify,
            'legend': prediction.task.legend.entry(),
        }

    return run_table(scenes, output, prediction.run, made_with, 'prediction', part)
