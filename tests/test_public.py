from __future__ import annotations

import subprocess
import sys

import kvmem


def test_every_public_name_exists_and_none_is_forgotten() -> None:
    """__all__ is what can be imported, and every error of the tree is in it."""
    assert all(hasattr(kvmem, name) for name in kvmem.__all__)
    assert sorted(kvmem.__all__) == kvmem.__all__
    tree = [kvmem.KVMemError]
    for kind in tree:
        # Those of the integrations are theirs to name.
        tree += [below for below in kind.__subclasses__() if below.__module__.startswith("kvmem.")]
    assert {kind.__name__ for kind in tree} <= set(kvmem.__all__)


def test_import_is_light_and_loads_no_framework() -> None:
    """`import kvmem` loads neither torch nor transformers nor LangChain nor LlamaIndex; the engine no framework."""
    heavy = "{'torch', 'transformers', 'langchain_core', 'llama_index'}"
    code = f"import sys, kvmem; assert not {heavy} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    frameworks = "{'langchain_core', 'llama_index', 'llama_index.core'}"
    code = f"import sys; from kvmem import KVMem; assert not {frameworks} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy module does not hide mistakes."""
    assert not hasattr(kvmem, "KVMemory")


def test_the_names_of_submodules_that_the_docs_mention_can_be_imported() -> None:
    """Where those modules are may change; these paths may not."""
    from kvmem.prompt import CONTEXT, DEFAULT_SYSTEM
    from kvmem.serve.app import create_app
    from kvmem.serve.settings import ServeSettings
    from kvmem.store import DiskStore, FsspecStore, Limits, MemoryStore, Store, TieredStore
    from kvmem.testing import check_store, tiny_model

    assert isinstance(DEFAULT_SYSTEM, str)
    named = (CONTEXT, create_app, ServeSettings, DiskStore, FsspecStore, Limits, MemoryStore, Store, TieredStore)
    assert all(named)
    assert callable(check_store)
    assert callable(tiny_model)
