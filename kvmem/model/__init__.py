"""A language model, its tokenizer and the structure of its cache."""
