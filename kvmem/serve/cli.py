"""`kvmem serve`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr

from kvmem import BlendSettings, InputError, LanguageModel, ModelSettings, RemoteSettings, Settings
from kvmem.any_model import AnyModel
from kvmem.console import Model, Threads, err, errors
from kvmem.locate import is_remote


def serve(
    model: Model = "smollm2",
    store: Annotated[Path, typer.Option("--store", envvar="KVMEM_STORE", help="Where caches are kept.")] = Path(
        ".kvmem"
    ),
    host: Annotated[str, typer.Option(help="The address to listen at; others than this machine's need --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: the end of its name.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A file of lines 'namespace key'.", envvar="KVMEM_KEYS")] = None,
    threads: Threads = None,
    blend: Annotated[str, typer.Option(help="Selector: query, deviation, first_k, none or all.")] = "query",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that may be asked for.")] = 4096,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds from a request to the end of its answer.")] = 300.0,
    body_bytes: Annotated[int, typer.Option(min=1, help="The largest request.")] = 16_000_000,
    tokenizer: Annotated[str | None, typer.Option(help="Of a vLLM server's model, if it names none.")] = None,
    separator: Annotated[str | None, typer.Option(help="Between chunks, for LMCache on a vLLM server.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVMEM_API_KEY", help="Of a vLLM server.")] = None,
    disk_bytes: Annotated[int | None, typer.Option(min=0, help="The most the store may keep.")] = None,
) -> None:
    """Serve OpenAI's API: chats, completions, documents. Ctrl-C ends it."""
    with errors():
        try:
            from kvmem.serve.app import create_app, longest_answer
            from kvmem.serve.run import run
        except ImportError as error:
            raise InputError("The server needs more packages: pip install 'kvmem[serve]'.") from error
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
                from kvmem.vllm import VLLMModel

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
            err.print(f"{loaded.name} is served at http://{where}/v1 (Ctrl-C ends it)", highlight=False, markup=False)
            run(app, host, port)
        finally:
            opened.close()
            loaded.close()
