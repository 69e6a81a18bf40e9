"""Compares ordinary RAG, full-context prefill and kvmem on a user's own documents, questions and model."""
