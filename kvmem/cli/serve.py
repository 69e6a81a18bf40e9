"""The `kvmem serve` command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr

from kvmem import BlendSettings, InputError, LanguageModel, ModelSettings, RemoteSettings, Settings
from kvmem.cli.console import Model, Threads, err, errors
from kvmem.model.base import AnyModel
from kvmem.model.locate import is_remote


def serve(
    model: Model = "smollm2",
    store: Annotated[Path, typer.Option("--store", envvar="KVMEM_STORE", help="Directory of the store.")] = Path(
        ".kvmem"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on; any but a loopback address requires --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    name: Annotated[str | None, typer.Option(help="Model name for clients; default: the last part of --model.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File with one 'namespace key' pair per line.", envvar="KVMEM_KEYS")
    ] = None,
    threads: Threads = None,
    blend: Annotated[str, typer.Option(help="Selector: query, deviation, first_k, none or all.")] = "query",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length that a request may ask for.")] = 4096,
    queue: Annotated[int, typer.Option(min=1, help="Maximum number of waiting requests.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Maximum seconds per request, queueing included.")] = 300.0,
    body_bytes: Annotated[int, typer.Option(min=1, help="Maximum size of a request body.")] = 16_000_000,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of a vLLM server's model, if the server names none.")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Chunk separator, for LMCache on a vLLM server.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVMEM_API_KEY", help="API key of a vLLM server.")] = None,
    disk_bytes: Annotated[int | None, typer.Option(min=0, help="Maximum size of the store.")] = None,
) -> None:
    """Serve an OpenAI-compatible API with documents. Press Ctrl-C to stop."""
    with errors():
        try:
            from kvmem.serve.app import create_app, longest_answer
            from kvmem.serve.run import run
        except ImportError as error:
            raise InputError("The server requires additional packages. Run: pip install 'kvmem[serve]'") from error
        from kvmem.serve.settings import ServeSettings, check_address, read_keys
        from kvmem.store.open import open_store

        known = read_keys(keys) if keys is not None else {}
        limits = ServeSettings(keys=known, max_tokens=max_tokens, queue=queue, timeout=timeout, body_bytes=body_bytes)
        check_address(host, limits)
        remote = RemoteSettings(
            api_key=SecretStr(api_key) if api_key else None, tokenizer=tokenizer, separator=separator
        )
        with err.status(f"Loading {model} …"):
            if is_remote(model):
                from kvmem.backends.vllm import VLLMModel

                loaded: AnyModel = VLLMModel.connect(model, remote)
            else:
                loaded = LanguageModel.load(model, ModelSettings(threads=threads))
        loaded.name = name or model.rstrip("/").rsplit("/", 1)[-1]
        longest = longest_answer(loaded, limits)
        wanted = {"disk_bytes": disk_bytes, "blend": BlendSettings.parse(blend), "max_tokens": longest}
        settings = Settings.parse(None, wanted)
        opened = open_store(store, settings.storage)
        logging.getLogger("kvmem.serve").setLevel(logging.INFO)
        try:
            app = create_app(loaded, opened, settings, limits)
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            err.print(
                f"Serving {loaded.name} at http://{where}/v1 (press Ctrl-C to stop)", highlight=False, markup=False
            )
            run(app, host, port)
        finally:
            opened.close()
            loaded.close()
