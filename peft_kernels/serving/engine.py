"""The engine: takes requests and adapters from any thread and runs the batch that serves them."""

from __future__ import annotations

import contextvars
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .arguments import at_least, end_tokens, token_ids
from .batch import Batch
from .decoder import Decoder
from .fair_lock import FairLock
from .request import Request, Sampling
from .store import AdapterState, BudgetInUse, Store


class Engine:
    """Serves requests from one base model, each with its own LoRA, DoRA or bottleneck adapter.

    Each prompt is prefilled alone; decoding runs all requests as one batch, one row per request. Attention is
    computed per row on the row's own cache, and the batch always has `max_batch` rows, so a request's result
    is bit-identical whatever else is in the batch (the recipe says where that holds).

    The engine owns the model: nothing else may change it until `close` restores it.

    Parameters
    ----------
    model : transformers model
        A causal language model in evaluation mode, dense or 4-bit, without adapters.
    tokenizer : optional
        Encodes prompts given as text.
    max_batch : int
        Number of requests that run at once.
    budget_bytes : int, optional
        Memory for adapters. The least recently used ones are evicted, and reloaded from their folder when
        needed. An adapter that is being loaded is not counted.
    adapter_dtype : torch.dtype
        Dtype of LoRA weights: fp32, like PEFT, or the model's 16-bit dtype, which halves their memory.
    pad : bool
        Always run `max_batch` rows. False runs only active rows: faster with few requests, but bits may
        depend on their number.

    Raises
    ------
    TypeError
        The model has adapters or another engine, is in training mode, or its attention cannot run per row.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_batch: int = 8,
        budget_bytes: int | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        pad: bool = True,
    ) -> None:
        max_batch = at_least("max_batch", max_batch, 1)
        if budget_bytes is not None:
            budget_bytes = at_least("budget_bytes", budget_bytes, 0)
        self._decoder = Decoder(model)
        if adapter_dtype not in (torch.float32, self._decoder.dtype):
            raise ValueError(
                f"adapter_dtype: expected torch.float32 or the model's {self._decoder.dtype}, "
                f"got {adapter_dtype}"
            )
        self.tokenizer = tokenizer
        self._store = Store(self._decoder, budget_bytes, adapter_dtype)
        self._batch = Batch(self._decoder, self._store, max_batch, pad)
        self._waiting: deque[Request] = deque()
        self._model_lock = FairLock()  # guards model, store and batch; held during a step
        # Guards what submit uses; taken inside _model_lock, never around it.
        self._queue = threading.Condition()
        self._serving = 0  # threads in run() or _loop()
        self._process = os.getpid()  # their process
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._decoder.own()
        self._release = weakref.finalize(self, self._store.close)  # also if never closed
        self._release.atexit = False

    def _serves(self) -> bool:
        return self._serving > 0 and self._process == os.getpid()

    def _check_process(self) -> None:
        """Raises in a process that was forked while serving, where a lock may never be released."""
        if self._serving and self._process != os.getpid():
            raise RuntimeError(
                "the engine ran in another process when this one was forked from it: expected an engine of "
                "this process, or a fork before engine.start()"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed: expected another one for the model")

    # Adapters.

    def register(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Registers an adapter's folder under a name; it is loaded by the first request. Raises ValueError if
        the name belongs to another folder."""
        self._check_process()
        with self._model_lock, self._queue:
            self._check_open()
            self._store.register(name, Path(folder).absolute())

    def load(self, name: str, folder: str | os.PathLike[str] | None = None) -> None:
        """Loads an adapter now, while requests run. An adapter in memory is not reread from its folder:
        `unload` it first.

        Raises
        ------
        CheckpointError (a ValueError)
            Its folder is damaged, for another model or of an unsupported kind.
        ValueError
            The name is unknown or belongs to another folder; the adapter does not fit into `budget_bytes`
            with those in use. Nothing is changed then.
        """
        self._check_process()
        with self._queue:
            self._check_open()
            there = self._folder(name) if folder is None else Path(folder).absolute()
            self._store.check(name, there)
        resident = name in self._store.resident
        read = None if resident else self._store.read(name, there)  # without the lock: steps continue
        with self._model_lock:
            with self._queue:  # checked again: it may have been unloaded or closed
                self._check_open()
                new = name not in self._store.folders
                if folder is None:
                    self._folder(name)
                self._store.register(name, there)
            try:
                self._store.get(name, self._batch.in_use(), read)
            except BaseException as error:
                with self._queue:
                    if new and not self._requests(name):
                        self._store.forget(name)
                if isinstance(error, BudgetInUse):
                    raise ValueError(
                        f"adapter {name!r}: expected room in budget_bytes next to adapters in use, got none"
                    ) from None
                raise

    def unload(self, name: str) -> None:
        """Removes an adapter and its name. Raises ValueError while requests use it."""
        self._check_process()
        with self._model_lock, self._queue:
            self._folder(name)
            self._batch.leave()
            if (count := self._requests(name)) > 0:
                raise ValueError(f"adapter {name!r}: expected no requests that use it, got {count}")
            self._store.forget(name)

    @property
    def adapters(self) -> list[AdapterState]:
        """All registered adapters; those in memory last, in order of use."""
        self._check_process()
        with self._model_lock, self._queue:
            there = self._store.resident
            names = [name for name in self._store.folders if name not in there] + list(there)
            return [
                AdapterState(
                    name,
                    self._store.folders[name],
                    there[name].nbytes if name in there else 0,
                    self._requests(name),
                )
                for name in names
            ]

    def _folder(self, name: str) -> Path:
        if not isinstance(name, str) or name not in self._store.folders:
            known = ", ".join(self._store.folders) or "none"
            raise ValueError(f"adapter: expected one that is registered ({known}), got {name!r}")
        return self._store.folders[name]

    # Requests.

    def submit(
        self,
        prompt: str | Sequence[int],
        adapter: str | None = None,
        *,
        max_new_tokens: int = 64,
        eos_token_id: int | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        keep_logits: bool = False,
    ) -> Request:
        """Queues a request, from any thread, without computing anything.

        Parameters
        ----------
        prompt : str or sequence of int
            Text for the tokenizer, or token ids.
        adapter : str, optional
            None runs the base alone.
        eos_token_id : int or sequence of int, optional
            Tokens that end the request; by default those of the model's `generation_config`.
        keep_logits : bool
            Keep the logits of each token in `Request.logits`.

        Raises
        ------
        ValueError
            Unknown adapter; a prompt that is empty, too long, or has tokens outside of the vocabulary. Errors
            of an adapter's folder are raised by `Request.result`.
        """
        self._check_process()
        ids = token_ids(prompt, self.tokenizer, self._decoder.vocabulary)
        longest = self._decoder.longest
        max_new_tokens = at_least("max_new_tokens", max_new_tokens, 1)
        if longest is not None and len(ids) + max_new_tokens > longest:
            got = f"{len(ids)} of the prompt and {max_new_tokens} new ones"
            raise ValueError(f"prompt: expected at most {longest} tokens in all, got {got}")
        eos = end_tokens(eos_token_id, self._decoder.model)
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling: expected a Sampling, got {sampling!r}")
        with self._queue:
            self._check_open()
            if adapter is not None:
                self._folder(adapter)
            request = Request(
                ids, adapter, max_new_tokens, eos, sampling, keep_logits,
                self._serves,
            )  # fmt: skip
            self._waiting.append(request)
            self._queue.notify_all()
        return request

    def generate(
        self, prompts: Sequence[Any], adapters: Sequence[str | None] | None = None, **options: Any
    ) -> list[list[int]]:
        """New tokens for each prompt, each with its adapter. `options` and errors as in `submit`; also raises
        the first error of a request."""
        if isinstance(prompts, str):
            raise ValueError("prompts: expected a sequence of prompts, got a text")
        if isinstance(adapters, str):
            raise ValueError("adapters: expected a sequence of names, got a text")
        names = [None] * len(prompts) if adapters is None else adapters
        if len(names) != len(prompts):
            raise ValueError(f"adapters: expected one for each of {len(prompts)} prompts, got {len(names)}")
        requests: list[Request] = []
        try:
            for prompt, name in zip(prompts, names, strict=True):
                requests.append(self.submit(prompt, name, **options))
            if self._thread is None:
                self.run()
            return [request.result() for request in requests]
        except BaseException:  # including Ctrl-C
            for request in requests:
                request.cancel()
            raise

    # Steps.

    def step(self) -> bool:
        """Moves waiting requests to free slots, then decodes one token for each running one. Returns whether
        any requests are left."""
        self._check_process()
        with self._model_lock:
            self._batch.leave()
            self._join_waiting()
            self._batch.decode()
            return bool(self._waiting or self._batch.requests)

    def _join_waiting(self) -> None:
        """Joins waiting requests in FIFO order."""
        while self._waiting and not self._batch.is_full:
            if not self._batch.join(self._waiting[0]):
                return
            with self._queue:
                self._waiting.popleft()

    def run(self) -> None:
        """Steps until no request is left."""
        self._serve(1)
        try:
            while self.step():
                pass
        finally:
            self._serve(-1)

    def _serve(self, threads: int) -> None:
        """Adds to the number of serving threads. When it reaches 0, wakes threads that wait for requests."""
        self._check_process()
        with self._queue:
            self._serving, self._process = self._serving + threads, os.getpid()
            unserved = [] if self._serving else self._unfinished()
        for request in unserved:
            request.wake()

    def start(self) -> Engine:
        """Starts a thread that steps whenever there are requests."""
        self._check_process()
        with self._queue:
            self._check_open()
            if self._thread is None:
                self._stopping = False
                self._serve(1)
                run = contextvars.copy_context().run  # may hold a chosen back end
                self._thread = threading.Thread(
                    target=run, args=(self._loop,), name="peft_kernels.serving", daemon=True
                )
                self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread after its current step. Unfinished requests stay; waiting for them raises
        RuntimeError until the next `start`."""
        self._check_process()
        if self._join_thread():
            self._serve(-1)

    def _join_thread(self) -> bool:
        """Joins the worker thread; returns whether one was running."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._queue:
                self._stopping = True
                self._queue.notify_all()
            thread.join()
        return thread is not None

    def _loop(self) -> None:
        while not self._stopping:
            if not self.step():
                with self._queue:
                    self._queue.wait_for(lambda: self._waiting or self._stopping)

    def close(self) -> None:
        """Stops, cancels remaining requests and restores the model. Later calls raise RuntimeError."""
        if self._serving and not self._serves():
            self._closed = True  # threads of the parent process cannot be joined here
            return
        ended = self._join_thread()
        with self._model_lock, self._queue:
            for request in self._unfinished():
                request.cancel()
            self._waiting.clear()
            self._batch.clear()
            self._closed = True
            self._release()
        if ended:
            self._serve(-1)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _requests(self, name: str) -> int:
        """Number of unfinished requests that use an adapter."""
        return sum(one.adapter == name and not one.done for one in self._unfinished())

    def _unfinished(self) -> list[Request]:
        """All waiting and running requests."""
        return [*self._waiting, *self._batch.requests]
