"""Showing maps: figures, tiles, a page for a browser, and search for similar places."""
