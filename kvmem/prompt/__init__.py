"""What the model reads: layout, plan, tools and answers by schema."""

from kvmem.prompt.layout import CONTEXT, DEFAULT_SYSTEM

__all__ = ["CONTEXT", "DEFAULT_SYSTEM"]
