"""Serves many adapters over one base model, with a different adapter for each request of a batch.

with pk.serving.Engine(model, tokenizer) as engine:       # runs in a thread of its own
    engine.register("legal", "adapters/legal")            # LoRA, DoRA or a bottleneck adapter
    request = engine.submit("Is this binding?", "legal", max_new_tokens=64)
    for token in request: ...                             # streams; request.result() waits for all tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .request import Request, Sampling

if TYPE_CHECKING:
    from .engine import Engine
    from .store import AdapterState

__all__ = ["AdapterState", "Engine", "Request", "Sampling"]


def __getattr__(name: str) -> Any:
    """Imports the engine lazily: it needs transformers, which the package does not."""
    if name in ("AdapterState", "Engine"):
        from . import engine, store

        return getattr(engine if name == "Engine" else store, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
