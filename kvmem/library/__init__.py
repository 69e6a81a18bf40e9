"""Documents, conversations and requests."""
