"""Weights of other projects' ViTs in, and ours out."""
