"""Engines that components share: who uses which, and who closes it."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
from pydantic import SecretStr

from kvmem import KVMem, RemoteSettings, Settings
from kvmem.sharing import SharedEngine


def test_secrets_are_told_apart() -> None:
    """Alone and inside settings: one tenant's key never opens another's engine, and no key holds a secret."""
    for wrap in (lambda key: SecretStr(key), lambda key: Settings(remote=RemoteSettings(api_key=SecretStr(key)))):
        first, again, other = (SharedEngine("m", None, {"x": wrap(key)}) for key in ("anna-1", "anna-1", "ben-2"))
        assert first == again
        assert first != other
        assert "anna" not in first.key


def test_an_engine_is_closed_by_its_last_user(saved_model: str) -> None:
    """Those that were collected are not counted."""
    first, second, third = (SharedEngine(saved_model, None, {}) for _ in range(3))
    engine = first.open()
    assert second.open() is third.open() is engine
    first.close()
    first.close()
    assert not engine.closed
    del third
    gc.collect()
    second.close()
    assert engine.closed
    again = SharedEngine(saved_model, None, {})
    assert again.open() is not engine
    again.close()


def test_an_engine_closes_while_its_work_opens_another(saved_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits for work, and must not keep what that work waits for."""
    share = SharedEngine(saved_model, None, {})
    closing, opened = threading.Event(), threading.Event()
    close = KVMem.close

    def closes(self: KVMem) -> None:
        closing.set()
        assert opened.wait(60), "the other engine could not be opened"
        close(self)

    def work() -> Any:
        assert closing.wait(60)
        SharedEngine(saved_model, None, {"namespace": "other"}).open()
        opened.set()

    share.open()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(KVMem, "close", closes)
        share.close()
    thread.join(60)
    assert opened.is_set()
