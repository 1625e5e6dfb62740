"""The files of a tree: found, read for what they show, checked, and kept in one table."""
