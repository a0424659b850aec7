"""Serves many adapters over one model by HTTP, with FastAPI.

python examples/serve.py --model FOLDER --adapters support=adapters/support legal=adapters/legal
python examples/serve.py --load-test               # throughput with a small random model on the loopback

GET    /adapters                                    known adapters, and which are in memory
PUT    /adapters/{name}   {"folder"}                load one while requests run
DELETE /adapters/{name}                             remove it
POST   /generate          {"prompt", "adapter", "max_new_tokens", "temperature", "seed"}
POST   /v1/chat/completions  {"messages": [{"role", "content"}], "model", "max_tokens", "temperature", "seed"}

Needs `pip install 'peft_kernels[serve]'`. A prompt is a text, or a list of token ids. Chats have the shape of
OpenAI's API and use the tokenizer's chat template; "model" is an adapter, empty for the model alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import fastapi
import jinja2
import torch
import uvicorn
from fastapi.exceptions import RequestValidationError
from finetune import positive
from pydantic import AliasChoices, BaseModel, Field
from tqdm import tqdm

import peft_kernels as pk
from peft_kernels.serving import Engine, Request, Sampling

TIMEOUT = 600.0  # seconds that a client waits at most
LONGEST = 1 << 20  # characters or tokens of a prompt: a tokenizer takes seconds for more


class Options(BaseModel):
    """What all requests have, also by OpenAI's names."""

    adapter: str | None = Field(None, validation_alias=AliasChoices("adapter", "model"))
    max_new_tokens: int = Field(
        64, ge=1, le=4096,
        validation_alias=AliasChoices("max_new_tokens", "max_tokens", "max_completion_tokens"),
    )  # fmt: skip
    temperature: float = 0.0
    seed: int | None = None


class Generate(Options):
    prompt: str | list[int]


class Message(BaseModel):
    role: str = Field(max_length=LONGEST)  # a limit also refuses lone surrogates
    content: str = Field(max_length=LONGEST)


class Chat(Options, extra="forbid"):
    messages: list[Message] = Field(min_length=1)
    stream: Literal[False] = False


class Folder(BaseModel):
    folder: str


class AsciiResponse(fastapi.responses.JSONResponse):
    """JSON with escapes: a message may quote a lone surrogate, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def make_app(engine: Engine, adapters: Path | None = None) -> fastapi.FastAPI:
    """`adapters`: the folder that clients may load adapters from; None: they may load none."""

    @asynccontextmanager
    async def running(app: fastapi.FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = fastapi.FastAPI(lifespan=running, default_response_class=AsciiResponse)

    # Functions that are not async run in threads, and may block.

    @app.exception_handler(ValueError)
    def refuse(request: fastapi.Request, error: ValueError) -> AsciiResponse:
        """The library's message, without the paths of the server's folders."""
        text, root = str(error), [] if adapters is None else [adapters.resolve()]
        for folder in [*(one.folder for one in engine.adapters), *root]:
            text = text.replace(str(folder), folder.name)
        return AsciiResponse({"detail": text}, status_code=400)

    @app.exception_handler(RequestValidationError)
    def invalid(request: fastapi.Request, error: RequestValidationError) -> AsciiResponse:
        """The errors without the given values, which may be anything."""
        words = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        return AsciiResponse({"detail": "; ".join(words)}, status_code=422)

    @app.get("/adapters")
    def known() -> list[dict[str, Any]]:
        return [{"name": one.name, "nbytes": one.nbytes, "requests": one.requests} for one in engine.adapters]

    @app.put("/adapters/{name}")
    def load(name: str, given: Folder) -> dict[str, str]:
        if adapters is None:
            raise fastapi.HTTPException(403, "this server was started without --adapter-folder")
        folder = (adapters / given.folder).resolve()
        if not folder.is_relative_to(adapters.resolve()):
            raise ValueError(f"folder: expected one inside the server's, got {given.folder!r}")
        engine.load(name, folder)
        return {"loaded": name}

    @app.delete("/adapters/{name}")
    def unload(name: str) -> dict[str, str]:
        engine.unload(name)
        return {"unloaded": name}

    @app.post("/generate")
    async def generate(given: Generate, client: fastapi.Request) -> dict[str, Any]:
        check_length("prompt", len(given.prompt))
        request, text = await answer(given, given.prompt, client)
        return {"tokens": request.tokens, "text": text, "finish_reason": request.finish_reason}

    @app.post("/v1/chat/completions")
    async def chat(given: Chat, client: fastapi.Request) -> dict[str, Any]:
        check_length("messages", sum(len(one.role) + len(one.content) for one in given.messages))
        prompt = await asyncio.to_thread(chat_tokens, engine.tokenizer, given.messages)
        request, text = await answer(given, prompt, client)
        message = {"role": "assistant", "content": text}
        old, new = len(request.prompt), len(request.tokens)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": given.adapter or "",
            "choices": [{"index": 0, "message": message, "finish_reason": request.finish_reason}],
            "usage": {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new},
        }

    async def answer(
        given: Options, prompt: str | list[int], client: fastapi.Request
    ) -> tuple[Request, str | None]:
        """The finished request and its text."""
        request = await asyncio.to_thread(  # which tokenises: other clients go on meanwhile
            engine.submit,
            prompt,
            given.adapter or None,
            max_new_tokens=given.max_new_tokens,
            sampling=Sampling(temperature=given.temperature, seed=given.seed),
        )
        await done(request, client)
        if request.finish_reason == "cancelled":
            raise fastapi.HTTPException(504, f"not done after {TIMEOUT:.0f} seconds")
        try:
            tokens = request.result(0)
        except ValueError:  # of the adapter's folder
            raise
        except Exception as error:
            told = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
            raise fastapi.HTTPException(500, f"adapter {given.adapter!r}: {told}") from error
        text = None if engine.tokenizer is None else engine.tokenizer.decode(tokens, skip_special_tokens=True)
        return request, text

    return app


def check_length(name: str, length: int) -> None:
    if length > LONGEST:
        raise ValueError(f"{name}: expected a length of at most {LONGEST}, got {length}")


def chat_tokens(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The token ids of a chat up to its next answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("messages: expected a tokenizer with a chat template, got none: use /generate")
    turns = [one.model_dump() for one in messages]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    except jinja2.TemplateError as error:  # templates refuse roles that they do not know
        raise ValueError(f"messages: the model's chat template: {error}") from error


async def done(request: Request, client: fastapi.Request) -> None:
    """Waits without a thread per request; cancels requests whose client has disconnected."""
    end = time.monotonic() + TIMEOUT
    while not request.done:
        if time.monotonic() > end or await client.is_disconnected():
            request.cancel()
        await asyncio.sleep(0.005)


def random_model(folder: Path, adapters: int) -> tuple[Any, dict[str, Path]]:
    """A small model with random NF4 weights, and folders of adapters that are not zero."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    lora = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    names = [f"adapter{i}" for i in range(adapters)]
    adapted = peft.get_peft_model(model, lora, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, lora)
    adapted.save_pretrained(folder)
    model = adapted.unload()
    pk.quantize_model(model, progress=False)
    return model.eval(), {name: folder / name for name in names}


def load_test(port: int, requests: int, clients: int, names: list[str], new_tokens: int = 32) -> str:
    """Runs several clients at once, each with one request after the other, over the network."""
    import httpx

    seconds: list[float] = []
    queue = iter(range(requests))
    lock = threading.Lock()
    faults: list[str] = []

    def client() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False) as http:
            while True:
                with lock:
                    number = next(queue, None)
                if number is None:
                    return
                body = {
                    "prompt": [5 + number % 100] * 16,
                    "adapter": names[number % len(names)] if names else None,
                    "max_new_tokens": new_tokens,
                }
                start = time.perf_counter()
                try:
                    answer = http.post("/generate", json=body)
                    fault = "" if answer.status_code == 200 else answer.text
                except httpx.HTTPError as error:
                    fault = repr(error)
                with lock:
                    seconds.append(time.perf_counter() - start)
                    if fault:
                        faults.append(fault)

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    with tqdm(total=requests, desc="requests", leave=False, disable=not sys.stderr.isatty()) as bar:
        while any(thread.is_alive() for thread in threads):
            bar.update(len(seconds) - bar.n)
            time.sleep(0.05)
    whole = time.perf_counter() - start
    if faults:
        raise SystemExit(f"{len(faults)} of {requests} requests failed: {faults[0]}")
    seconds.sort()
    p50, p90, p99 = (1e3 * seconds[min(int(q * requests), requests - 1)] for q in (0.5, 0.9, 0.99))
    return (
        f"{requests} requests, {clients} clients, {len(names)} adapters: {requests / whole:.1f} requests/s, "
        f"latency p50 {p50:.0f} ms, p90 {p90:.0f} ms, p99 {p99:.0f} ms"
    )


def serve_on_loopback(app: fastapi.FastAPI) -> tuple[uvicorn.Server, threading.Thread, int]:
    """Runs the server in a thread, on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise SystemExit("the server did not start")
        time.sleep(0.01)
    return server, thread, server.servers[0].sockets[0].getsockname()[1]


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER of a folder that is there, got {text}")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve many adapters over one model.")
    parser.add_argument("--model", type=Path, help="a folder that transformers loads")
    parser.add_argument("--adapters", nargs="*", default=[], type=named_folder, metavar="NAME=FOLDER")
    parser.add_argument("--adapter-folder", type=Path, help="folder that clients may load adapters from")
    parser.add_argument("--dense", action="store_true", help="do not quantise to NF4")
    parser.add_argument("--max-batch", type=positive, default=8)
    parser.add_argument("--budget-mb", type=float, help="of adapters in memory")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--load-test", action="store_true", help="serve, send requests, and print the throughput"
    )
    parser.add_argument("--requests", type=positive, default=64)
    parser.add_argument("--clients", type=positive, default=8)
    options = parser.parse_args()
    if options.budget_mb is not None and not 0 < options.budget_mb < float("inf"):
        parser.error(f"--budget-mb: expected a number above 0, got {options.budget_mb}")
    budget = None if options.budget_mb is None else int(options.budget_mb * 1e6)
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"--model: expected a folder of transformers, got {options.model} without config.json")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs on import
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = None
        if options.model is None:
            if not options.load_test:
                parser.error("--model: expected a folder, got none")
            model, folders = random_model(Path(temporary), 8)
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            if not options.dense:
                pk.quantize_model(model)
            folders = dict(options.adapters)
        try:
            engine = Engine(model, tokenizer, max_batch=options.max_batch, budget_bytes=budget)
        except TypeError as error:  # batches with several adapters are unsupported
            parser.error(f"--{error}")
        try:
            for name, folder in folders.items():
                engine.register(name, folder)
        except ValueError as error:
            parser.error(f"--adapters: {error}")
        app = make_app(engine, options.adapter_folder)
        if not options.load_test:
            uvicorn.run(app, host="127.0.0.1", port=options.port)
            return
        server, thread, port = serve_on_loopback(app)
        print(load_test(port, options.requests, options.clients, [*folders]))
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
