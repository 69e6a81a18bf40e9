"""Composing prompts from stored entries and repairing them."""
