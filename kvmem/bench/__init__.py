"""The benchmarks of `kvmem bench`, which anyone can run."""
