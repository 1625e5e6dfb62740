"""Checkpoint files: which model a file holds, and safe reading and writing."""
