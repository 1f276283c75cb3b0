"""`Replica`: the server as one replica of a Ray Serve application. Only `application` needs ray."""

import os
import threading
from typing import Any

import torch
from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.base import load_tokenizer
from runtime.errors import ConfigError
from runtime.loading import load_specbound
from runtime.server.app import make_app
from runtime.server.request.limits import Limits
from runtime.server.serve import STOP_SECONDS
from runtime.server.worker import Worker


class Replica:
    """One model behind the server's routes; there once it is loaded and its exactness probed.

    API keys are read from `SPECBOUND_API_KEY`, with spaces between, since arguments are shown on Ray's dashboard.

    Args:
        adapter: folder or Hub id.
        base_model: folder or Hub id, if not the one that the adapter names.
        name: of the model for clients.
        dtype: of the base.
        threads: of torch; ids are equal on replicas that have equally many.
        kv_memory: GiB for keys and values of running answers.
        limits: those of `Limits`, which is what one request may ask for.

    Raises:
        SpecBoundError: and whatever else loading raises; Ray then says so and does not send requests here.
    """

    def __init__(
        self,
        adapter: str,
        base_model: str | None = None,
        *,
        name: str,
        dtype: str = "bfloat16",
        threads: int,
        kv_memory: float,
        **limits: Any,
    ) -> None:
        def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
            torch.set_num_threads(threads)
            model = load_specbound(adapter, base_model, dtype=dtype)
            return model, load_tokenizer(str(model.name_or_path), {})

        self.name, self.limits, loaded = name, Limits(**limits), threading.Event()
        self.worker = Worker(
            load, max_waiting=self.limits.max_waiting, max_running=self.limits.max_running,
            kv_bytes=int(kv_memory * 2**30), on_change=loaded.set,
        )  # fmt: skip
        self.worker.start()
        loaded.wait()
        if self.worker.error is not None:
            raise self.worker.error

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The routes; Ray asks for them once the model is there."""
        keys = os.environ.get("SPECBOUND_API_KEY", "").split()
        return make_app(self.worker, names=[self.name], limits=self.limits, api_keys=keys)

    def __del__(self) -> None:
        """End the thread; Ray has waited for the running requests."""
        if hasattr(self, "worker"):
            self.worker.stop(STOP_SECONDS)


def application(arguments: dict[str, Any]) -> Any:
    """The application that `configs/serve/ray.yaml` names, with the arguments of `Replica` that stand there.

    Raises:
        ConfigError: ray is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'ray[serve]>=2.60'") from None
    return serve.deployment(serve.ingress()(Replica)).bind(**arguments)
