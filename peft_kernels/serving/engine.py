"""The engine: requests and adapters from any thread, and steps of the batch that serves them."""

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
from .store import AdapterState, NoRoom, Store


class Engine:
    """Serves requests from one base model, each with an adapter of its own, LoRA, DoRA or bottleneck.

    A prompt goes through the model alone; decoded tokens go through it together, one row for each request.
    Attention is computed by row, on the row's own cache, and batches have one size, `max_batch`, whatever is
    in them: what a request gets is the same to the bit whoever its neighbours are (see the recipe for where
    that holds).

    While an engine is there, the model is its own: nobody else may change it. `close` gives it back as it
    was.

    Parameters
    ----------
    model : transformers model
        A causal language model in evaluation mode, dense or in 4 bits, without adapters.
    tokenizer : optional
        For prompts that are texts.
    max_batch : int
        Requests that run at once.
    budget_bytes : int, optional
        Of adapters in memory. Those that have been idle longest go first, and come again from their folder.
        While one is loaded it comes on top.
    adapter_dtype : torch.dtype
        What LoRA weights are kept in. fp32, as PEFT does it; the model's own 16-bit type halves their bytes.
    pad : bool
        Batches of one size. False computes only what runs: faster with few requests, and bits may then depend
        on how many run.

    Raises
    ------
    TypeError
        The model has adapters or another engine, is in training mode, or its attention cannot be computed by
        rows.
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
        self._model_lock = FairLock()  # the model, the store and the batch; held in a step
        self._queue = threading.Condition()  # what submit touches; taken inside the other, never around it
        self._serving = 0  # threads in run() or in the background
        self._process = os.getpid()  # where they are
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._decoder.own()
        self._release = weakref.finalize(self, self._store.close)  # also of one that nobody has closed
        self._release.atexit = False

    def _serves(self) -> bool:
        return self._serving > 0 and self._process == os.getpid()

    def _check_process(self) -> None:
        """Before a lock is taken: in a process forked from the one that serves, nobody lets go of it."""
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
        """Let requests name an adapter. It is loaded when the first one needs it. ValueError when the name is
        another's."""
        self._check_process()
        with self._model_lock, self._queue:
            self._check_open()
            self._store.register(name, Path(folder).absolute())

    def load(self, name: str, folder: str | os.PathLike[str] | None = None) -> None:
        """Load an adapter now, beside requests that run. One that is in memory stays as it is, whatever its
        folder holds by now: `unload` it first.

        Raises
        ------
        CheckpointError (a ValueError)
            Its folder is damaged, for another model or of a kind that is not served.
        ValueError
            The name is unknown or another's; the adapter does not fit `budget_bytes` beside those in use. In
            any case nothing is changed.
        """
        self._check_process()
        with self._queue:
            self._check_open()
            there = self._folder(name) if folder is None else Path(folder).absolute()
            self._store.check(name, there)
        resident = name in self._store.resident
        read = None if resident else self._store.read(name, there)  # beside steps of others
        with self._model_lock:
            with self._queue:  # again: it may have been unloaded meanwhile, or the engine closed
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
                if isinstance(error, NoRoom):
                    raise ValueError(
                        f"adapter {name!r}: expected room in budget_bytes beside adapters in use, got none"
                    ) from None
                raise

    def unload(self, name: str) -> None:
        """Take an adapter out of memory and forget its name. ValueError while requests wait or run with
        it."""
        self._check_process()
        with self._model_lock, self._queue:
            self._folder(name)
            self._batch.leave()
            if (count := self._requests(name)) > 0:
                raise ValueError(f"adapter {name!r}: expected no requests that use it, got {count}")
            self._store.forget(name)

    @property
    def adapters(self) -> list[AdapterState]:
        """All that are known, those in memory last, by when they were used."""
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
        """Put a request into the queue. From any thread; nothing is computed here.

        Parameters
        ----------
        prompt : str or sequence of int
            A text for the tokenizer, or token ids.
        adapter : str, optional
            None is the base alone.
        eos_token_id : int or sequence of int, optional
            Tokens that end it. By default those of the model's `generation_config`.
        keep_logits : bool
            Keep the logits of each token, in `Request.logits`.

        Raises
        ------
        ValueError
            An adapter that is not known, a prompt that is empty, of tokens that the model does not have, or
            too long for it. What is wrong with an adapter's folder comes out of `Request.result`.
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
        """New tokens for each prompt, with an adapter for each. `options` as in `submit`; so are the errors,
        and the first of any request."""
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
        except BaseException:  # Ctrl-C too: nobody will ask for the others
            for request in requests:
                request.cancel()
            raise

    # Steps.

    def step(self) -> bool:
        """Let requests that wait join as there are slots, then decode one token for each that runs. Whether
        anything is left to do."""
        self._check_process()
        with self._model_lock:
            self._batch.leave()
            self._join()
            self._batch.decode()
            return bool(self._waiting or self._batch.requests)

    def _join(self) -> None:
        """In the order in which they came."""
        while self._waiting and not self._batch.is_full:
            if not self._batch.join(self._waiting[0]):
                return
            with self._queue:
                self._waiting.popleft()

    def run(self) -> None:
        """Step until nothing is left to do."""
        self._serve(1)
        try:
            while self.step():
                pass
        finally:
            self._serve(-1)

    def _serve(self, threads: int) -> None:
        """With the last thread gone, those who wait for requests are told."""
        self._check_process()
        with self._queue:
            self._serving, self._process = self._serving + threads, os.getpid()
            waited_for = [] if self._serving else self._left()
        for request in waited_for:
            request.wake()

    def start(self) -> Engine:
        """Step in a thread of its own, whenever there is something to do."""
        self._check_process()
        with self._queue:
            self._check_open()
            if self._thread is None:
                self._stopping = False
                self._serve(1)
                run = contextvars.copy_context().run  # it may hold a back end that is asked for
                self._thread = threading.Thread(
                    target=run, args=(self._loop,), name="peft_kernels.serving", daemon=True
                )
                self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread after the step that it is in. What is not done stays in the queue and the batch; who
        waits for it gets a RuntimeError, and may ask again after another `start`."""
        self._check_process()
        if self._end():
            self._serve(-1)

    def _end(self) -> bool:
        """The thread. Whether there was one."""
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
        """Stop, cancel what is left, and give the model back as it was. What is asked for afterwards is a
        RuntimeError."""
        if self._serving and not self._serves():
            self._closed = True  # what the threads of another process had begun cannot be ended here
            return
        ended = self._end()
        with self._model_lock, self._queue:
            for request in self._left():
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
        """That wait or run with an adapter."""
        return sum(one.adapter == name and not one.done for one in self._left())

    def _left(self) -> list[Request]:
        """All that wait or run."""
        return [*self._waiting, *self._batch.requests]
