"""The sections of docs/benchmarks.md, one function for each benchmark."""
