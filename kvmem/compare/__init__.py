"""Ordinary RAG, full-context prefill and kvmem, head to head on a user's own documents, questions and model."""
