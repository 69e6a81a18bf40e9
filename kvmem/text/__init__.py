"""What is answered from: documents, loaders, chunks, filters and retrieval."""
