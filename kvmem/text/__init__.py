"""Texts: documents, loaders, chunking, filters and retrieval."""
