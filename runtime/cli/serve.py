"""`specbound serve`. Slow libraries, and those of the `serve` extra, are imported when it runs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.failure import fail
from runtime.cli.options import Adapter, Device, Dtype, Exactness, Model, Threads

Names = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        "--name",
        help="Name of the model for clients. More are taken too. By default the base's.",
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        envvar="SPECBOUND_API_KEY",
        help="Key that clients must send, or one of several. It is safer in the environment, with spaces between.",
    ),
]
Origins = Annotated[list[str] | None, typer.Option(help="Web pages from this origin may ask too. * is all of them.")]


def serve_command(
    adapter: Adapter,
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to bind. A public one needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind. 0 takes a free one.")] = 8000,
    name: Names = None,
    api_key: Keys = None,
    cors_origin: Origins = None,
    max_running: Annotated[
        int | None,
        typer.Option(min=1, help="Make this many answers together. By default what memory holds, 16 at most."),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="This many requests may wait. Others get a 429.")] = 16,
    kv_memory: Annotated[
        float | None,
        typer.Option(min=1e-6, help="GiB for keys and values of running answers. By default half of what is free."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Give each answer this many tokens at most. By default what fits.")
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds a request may take, its wait included. Then it gets a 504.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for running requests to finish on SIGTERM.")] = 30,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    device: Device = "cpu",
    exactness: Exactness = "bitwise",
) -> None:
    """Serve OpenAI's API and a page to watch speculation on.

    Example: specbound serve --adapter outputs/demo/adapter --port 8000

    Example: SPECBOUND_API_KEY=... specbound serve --adapter ORG/NAME --host 0.0.0.0
    """
    from runtime.errors import SpecBoundError
    from runtime.server.listener import bind, url_of

    keys = [key for key in api_key or [] if key]
    try:
        with bind(host, port, has_key=bool(keys)) as listener:
            from runtime.server.request.limits import Limits
            from runtime.server.serve import serve

            load = _loader(adapter, model, dtype=dtype, threads=threads, device=device, exactness=exactness)
            names = name or [_default_name(adapter, model)]
            seconds, running = request_timeout, max_running
            limits = Limits(max_tokens, max_waiting=max_waiting, max_running=running, seconds=seconds)
            print(f"serving {', '.join(names)} on {url_of(listener)}, loading", file=sys.stderr, flush=True)
            origins = cors_origin or []
            serve(
                load, listener, names=names, api_keys=keys, cors_origins=origins, limits=limits, grace=grace,
                kv_bytes=None if kv_memory is None else int(kv_memory * 2**30),
            )  # fmt: skip
    except (SpecBoundError, OSError) as error:
        fail(error, None)


def _loader(adapter: str, model: str | None, **options: Any) -> Callable[[], tuple[Any, Any]]:
    """What loads the model and its tokenizer, and says so."""
    from runtime.cli.speaker import Speaker

    def load() -> tuple[Any, Any]:
        speaker = Speaker.load(adapter, model, **options)
        print(f"ready: {speaker.model.specbound.certificate}", file=sys.stderr)
        return speaker.model, speaker.tokenizer

    return load


def _default_name(adapter: str, model: str | None) -> str:
    """A name for clients that holds no path of this machine."""
    from runtime.adapter.folder import load_adapter
    from runtime.adapter.hub import resolve_adapter

    source = model or load_adapter(resolve_adapter(adapter)).config.base_model_name_or_path
    return Path(source).name if Path(source).is_dir() else source
