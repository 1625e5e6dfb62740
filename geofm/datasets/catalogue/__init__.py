"""The catalogue: a table of the files below a folder, with what they show and their problems."""
