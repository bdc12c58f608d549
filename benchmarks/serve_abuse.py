"""A live server under abuse: the latency of plain requests before and during the abuse.

    python benchmarks/serve_abuse.py                             # a tiny model, random weights
    python benchmarks/serve_abuse.py --run runs/default --only "constraint storm"

`python -m jaxgpt serve` runs in a process of its own, on this machine only, and so does the abuse,
with a low priority, because abusive clients would not use the server's processor. Exits with 1 if
a plain request or /health takes longer than LIMIT.

Needs Linux and `pip install 'jaxgpt[test]'`. Abusive clients are plain sockets; others use httpx2.
"""

import asyncio
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import tyro
from live_server import http_client, print_environment, served_model, serving

LIMIT = 1.0  # seconds that a plain request and /health may take
PLAIN = {"prompt": "a", "max_tokens": 4, "seed": 0}


@dataclass(frozen=True)
class Options:
    """What is served, and how it is abused."""

    run: str = ""
    """What `serve` takes; empty: two layers of 64 with random weights, made for this."""
    seconds: float = 8.0
    """Of each kind of abuse, and of plain requests before it."""
    clients: int = 60
    """Abusive clients at once."""
    pause: float = 0.5
    """Seconds between two calls of an abusive client."""
    sockets: int = 600
    """Connections that send nothing, or send it slowly."""
    only: str = ""
    """One kind of abuse, by its name; empty: all."""


def post(path: str, body: Any) -> bytes:
    """A call, as it is sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


class Attack:
    """Abusive clients, which go on until they are cancelled."""

    def __init__(self, port: int, options: Options) -> None:
        self.port, self.options = port, options
        self.statuses: Counter[int | str] = Counter()

    def run(self, name: str, seconds: float, statuses: Any) -> None:
        """One kind of abuse, in a process of its own; puts what became of it in a queue."""

        async def limited() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await getattr(self, name)()

        os.nice(10)
        asyncio.run(limited())
        statuses.put(self.statuses)

    async def ask(self, content: bytes, patience: float = 60.0) -> None:
        """One call on a connection of its own."""
        writer = None
        try:
            async with asyncio.timeout(patience):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(content)
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                self.statuses[int(head.split()[1])] += 1
        except (OSError, EOFError) as error:
            self.statuses["no answer" if isinstance(error, TimeoutError) else "closed"] += 1
        finally:
            if writer is not None:
                writer.transport.abort()

    async def many(self, content: Callable[[random.Random], bytes], patience: float = 60) -> None:
        """Clients that make one call after the other."""

        async def client(number: int) -> None:
            rng = random.Random(number)
            while True:
                await self.ask(content(rng), patience)
                await asyncio.sleep(self.options.pause)

        async with asyncio.TaskGroup() as group:
            for number in range(self.options.clients):
                group.create_task(client(number))

    async def held(self, first: bytes, drip: bytes = b"", every: float = 1.0) -> None:
        """Connections that send a little, and open again if the server closes them."""

        async def client() -> None:
            while True:
                writer = None
                with suppress(OSError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    self.statuses["connections"] += 1
                    writer.write(first)
                    while not reader.at_eof():
                        with suppress(TimeoutError):
                            async with asyncio.timeout(every):
                                await reader.read(1 << 16)
                        if drip:
                            writer.write(drip)
                            await writer.drain()
                if writer is not None:
                    writer.transport.abort()
                await asyncio.sleep(0.2)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.options.sockets):
                group.create_task(client())

    async def constraint_storm(self) -> None:
        """Distinct JSON schemas that take about a second each to compile."""
        await self.many(expensive)

    async def constraints_of_who_leaves(self) -> None:
        """The same, by clients that disconnect after a moment."""
        await self.many(expensive, patience=0.3)

    async def silent_sockets(self) -> None:
        """Connections that send nothing."""
        await self.held(b"")

    async def slow_headers(self) -> None:
        """Request heads that come a byte at a time."""
        await self.held(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ", b"x")

    async def slow_bodies(self) -> None:
        """Bodies that come a byte at a time, and have no end."""
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json"
        await self.held(head + b"\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n")

    async def tiny_chunks(self) -> None:
        """Bodies in chunks of one byte, as fast as they are taken."""
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json"
        content = head + b"\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 300_000
        await self.many(lambda rng: content)

    async def large_prompts(self) -> None:
        """Prompts of almost a megabyte, in one word."""
        letters = "abcdefghij"
        contents = [
            post("/v1/completions", {"prompt": "".join(random.Random(i).choices(letters, k=10**6))})
            for i in range(8)
        ]
        await self.many(lambda rng: rng.choice(contents))

    async def many_messages(self) -> None:
        """Conversations of 25,000 messages."""
        names = "user", "assistant"
        messages = [{"role": names[i % 2], "content": "a"} for i in range(24_999)]
        content = post("/v1/chat/completions", {"messages": messages})
        await self.many(lambda rng: content)

    async def long_lists_to_embed(self) -> None:
        """Calls of 2,048 texts each."""
        texts = [f"text {number}" for number in range(2048)]
        content = post("/v1/embeddings", {"input": texts})
        await self.many(lambda rng: content)

    async def readers_that_never_read(self) -> None:
        """Pipelined calls whose answers nobody reads."""
        content = get("/") * 200

        async def client() -> None:
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1)
                    writer.transport.pause_reading()
                    self.statuses["connections"] += 1
                    with suppress(TimeoutError):
                        async with asyncio.timeout(5):
                            while True:
                                writer.write(content)
                                await writer.drain()
                    await asyncio.sleep(5)
                    writer.transport.abort()

        async with asyncio.TaskGroup() as group:
            for _ in range(self.options.clients):
                group.create_task(client())

    async def garbage(self) -> None:
        """Bytes of TLS, of HTTP/0.9, and of nothing known."""
        heads = [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
            b"GET /\r\n\r\n",
            b"\0" * 100_000,
            b"GET /health HTTP/1.1\r\n" + b"x: " + b"y" * 100_000,
            get("/health")[:-2] + b"content-length: " + b"9" * 40 + b"\r\n\r\n",
        ]
        await self.many(lambda rng: rng.choice(heads), patience=2)


def expensive(rng: random.Random) -> bytes:
    """A call whose JSON schema takes long to compile: strings of 10,000 ranges of characters."""
    letters = "".join(chr(0x4E00 + 2 * i) for i in range(9_900))
    schema = {"type": "string", "pattern": f"^[{letters}]{{{rng.randint(50, 70)}}}$"}
    schema["description"] = str(rng.random())
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    return post("/v1/completions", {"prompt": "a", "max_tokens": 4, "response_format": form})


async def latency(request: Awaitable[httpx2.Response]) -> float:
    """Seconds of one call; infinity if it is not answered with 200."""
    start = time.monotonic()
    try:
        async with asyncio.timeout(20):
            status = (await request).status_code
    except (httpx2.TransportError, TimeoutError):
        return float("inf")
    return time.monotonic() - start if status == 200 else float("inf")


async def latencies(port: int, seconds: float) -> list[list[float]]:
    """Of plain requests and of /health, one after the other, each on a connection of its own."""
    found: list[list[float]] = [[], []]
    end = time.monotonic() + seconds
    async with http_client(port, keep=0) as http:
        while time.monotonic() < end:
            found[0].append(await latency(http.post("/v1/completions", json=PLAIN)))
            found[1].append(await latency(http.get("/health")))
            await asyncio.sleep(0.1)
    return found


def told(times: list[float]) -> str:
    """Their median and the worst, in milliseconds."""
    return f"{1000 * statistics.median(times):>8.0f}{1000 * max(times):>8.0f}"


KINDS = (
    "constraint_storm",
    "constraints_of_who_leaves",
    "silent_sockets",
    "slow_headers",
    "slow_bodies",
    "tiny_chunks",
    "large_prompts",
    "many_messages",
    "long_lists_to_embed",
    "readers_that_never_read",
    "garbage",
)


async def measure(path: str, options: Options) -> int:
    """All of it against one server; the exit status."""
    processes = multiprocessing.get_context("spawn")
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        async with serving(path, Path(folder) / "stderr") as server:
            print(f"{'':<28}{'plain: median, worst, ms':>32}{'/health: median, worst, ms':>34}")
            watch = asyncio.create_task(server.watch())
            for kind in KINDS:
                name = kind.replace("_", " ")
                if options.only not in ("", name):
                    continue
                before = await latencies(server.port, options.seconds / 4)
                attack, statuses = Attack(server.port, options), processes.Queue()
                arguments = kind, options.seconds + 3, statuses
                attacking = processes.Process(target=attack.run, args=arguments)
                attacking.start()
                await asyncio.sleep(3)  # it takes a while to start
                during = await latencies(server.port, options.seconds)
                seen = await asyncio.to_thread(statuses.get, timeout=60)
                await asyncio.to_thread(attacking.join)
                for when, times in (("before", before), ("during", during)):
                    print(f"{name + ', ' + when:<38}{told(times[0]):>22}{told(times[1]):>34}")
                print(f"    {len(during[0])} plain requests; attack: {dict(seen)}")
                slow += max(max(times) for times in during) > LIMIT
                await asyncio.sleep(1)
            watch.cancel()
        log = (Path(folder) / "stderr").read_text(errors="replace")
    print(f"memory: {max((held for _, held in server.memory), default=0) / 2**20:.0f} MiB at most")
    print(f"the log: {log.count(chr(10))} lines, {log.count('Traceback')} exceptions")
    if "Traceback" in log:
        print(log[log.index("Traceback") - 500 :][:4000])
    print(f"{slow} kinds of abuse made a request slower than {LIMIT:g} s")
    return int(slow > 0 or "Traceback" in log)


def main(options: Options) -> int:
    """Makes a model where none is given, and abuses a server of it."""
    print_environment()
    with served_model(options.run) as path:
        return asyncio.run(measure(path, options))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
