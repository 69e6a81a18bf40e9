"""Keys and values: rotation, entries, attention over a buffer."""
