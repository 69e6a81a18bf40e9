"""Benchmarks that anyone can run: `kvmem bench fidelity`, `kvmem bench speed`, `kvmem bench task`."""
