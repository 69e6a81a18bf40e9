"""For tests, ours and yours: tiny random models that need no network, and a conformance suite for stores."""

from kvmem.testing.models import make_entry, same_entry, tiny_config, tiny_model, tiny_tokenizer
from kvmem.testing.stores import check_store

__all__ = ["check_store", "make_entry", "same_entry", "tiny_config", "tiny_model", "tiny_tokenizer"]
