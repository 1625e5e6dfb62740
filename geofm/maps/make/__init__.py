"""Making maps of scenes: attention, features, predictions and change."""
