"""Generating answers, alone and in batches."""
