"""Benchmarks that anyone can run from a clone; not part of the package."""
