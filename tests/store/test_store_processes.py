"""Several processes on one directory, some of them killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from kvmem.store import DiskStore
from kvmem.testing import make_entry, same_entry

# Processes are forked, for speed: starting an interpreter with torch takes seconds.
FORK = multiprocessing.get_context("fork")
KILLS = int(os.environ.get("KVMEM_TEST_KILLS", "300"))
SECONDS = float(os.environ.get("KVMEM_TEST_SECONDS", "15"))


def write_forever(directory: Path, first: int, acknowledged: int) -> None:
    """Put entries one after the other; after each put, its number is written to a pipe."""
    store = DiskStore(directory)
    for number in range(first, first + 10_000):
        if store.put(make_entry(seed=number, tokens=40)):
            os.write(acknowledged, f"{number}\n".encode())
        if number % 7 == 3:
            store.delete(make_entry(seed=number, tokens=40).key)


def test_a_writer_killed_at_any_moment_leaves_correct_entries(tmp_path: Path) -> None:
    """After each of 300 kills: what put returned for is there bit for bit; doctor finds temporaries at most."""
    generator = random.Random(1)
    number = 0
    for _ in range(KILLS):
        reading, writing = os.pipe()
        process = FORK.Process(target=write_forever, args=(tmp_path, number, writing))
        process.start()
        os.close(writing)
        time.sleep(generator.uniform(0.005, 0.06))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with os.fdopen(reading) as lines:
            done = [int(line) for line in lines.read().split("\n") if line]
        store = DiskStore(tmp_path)
        problems = store.check(fix=True)
        assert {problem.what for problem in problems} <= {"temporary"}
        # The last one may have been deleted just before its writer was killed.
        for kept in (n for n in done if n % 7 != 3):
            entry = make_entry(seed=kept, tokens=40)
            found = store.get(entry.key)
            assert found is not None
            assert same_entry(found, entry)
        assert store.check() == []
        if store.stats().entries > 50:
            store.clear("default")
        store.close()
        number = (done[-1] if done else number) + 1
    assert number > KILLS / 3


def use_at_random(directory: Path, seed: int, until: float, limit: int, failures: multiprocessing.Queue[str]) -> None:
    try:
        generator = random.Random(seed)
        store = DiskStore(directory, max_bytes=limit)
        while time.time() < until:
            entry = make_entry(seed=generator.randrange(40), tokens=60, namespace=generator.choice("ab"))
            act = generator.random()
            if act < 0.5:
                store.put(entry)
            elif act < 0.9:
                found = store.get(entry.key)
                if found is not None and not same_entry(found, entry):
                    failures.put("a wrong entry was read")
            elif act < 0.97:
                store.delete(entry.key)
            else:
                store.clear(entry.key.namespace)
    except BaseException as error:
        failures.put(repr(error))


def test_eight_processes_on_one_directory(tmp_path: Path) -> None:
    """Mixed put, get, delete and clear under eviction: no exception, no wrong read, never over the budget."""
    probe = DiskStore(tmp_path / "probe")
    probe.put(make_entry(tokens=60))
    limit = 12 * probe.stats().bytes
    failures: multiprocessing.Queue[str] = FORK.Queue()
    until = time.time() + SECONDS
    processes = [
        FORK.Process(target=use_at_random, args=(tmp_path / "kv", seed, until, limit, failures)) for seed in range(8)
    ]
    for process in processes:
        process.start()
    largest = 0
    while time.time() < until:
        sizes = 0
        for file in [*(tmp_path / "kv").rglob("*.safetensors"), *(tmp_path / "kv").rglob("tmp/*")]:
            try:
                sizes += file.stat().st_size
            except FileNotFoundError:
                continue
        largest = max(largest, sizes)
        time.sleep(0.02)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    assert limit / 2 < largest <= limit
    assert DiskStore(tmp_path / "kv").check() == []


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_fork_gets_a_connection_of_its_own(tmp_path: Path, policy: str) -> None:
    """A store opened before a fork works in both processes."""
    store = DiskStore(tmp_path, policy=policy)  # type: ignore[arg-type]
    store.put(make_entry(seed=1))
    process = FORK.Process(target=lambda: os._exit(0 if store.put(make_entry(seed=2)) else 1))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert store.get(make_entry(seed=2).key) is not None
    assert store.check() == []
