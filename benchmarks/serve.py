"""Load test of a live server: many clients at once, some misbehaving, and the promises it keeps.

    python benchmarks/serve.py --seconds 300                     # a tiny model, random weights
    python benchmarks/serve.py --run runs/default --seconds 300

`python -m jaxgpt serve` runs in a process of its own. Clients request texts that this process has
generated before without a batch, to compare with; some disconnect during the answer, some send
invalid requests. Then the server gets SIGTERM under load. Exits with 1 if a promise is broken.

Needs Linux and `pip install 'jaxgpt[serve]'`; the clients are plain sockets. They share the machine
with the server.
"""

import asyncio
import json
import os
import platform
import random
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import tyro

WARM = 0.2  # of the time under load; memory is compared with what it is then
GROWTH = 5.0  # percent of memory, at most
EXIT = 30.0  # seconds from SIGTERM to the end, at most
DRAIN = 25.0  # seconds what was asked before has to end
PATIENCE = 330.0  # seconds for an answer; the server itself allows 300
IDLE = 3.0  # seconds after which a connection is not used again; the server closes it after 5
LOST = (OSError, EOFError)  # what a connection that breaks off raises
PATHS = ("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")
COMPILED = re.compile(r"Finished XLA compilation of (\S+)")


@dataclass(frozen=True)
class Options:
    """The model, and the load."""

    run: str = ""
    """What `serve` takes; empty: two layers of 64 with random weights, made for this."""
    seconds: float = 300.0
    """Seconds of load; a tenth of it before, with one request at a time."""
    clients: int = 64
    prompts: int = 64
    """Distinct requests, of all lengths that fit the context."""
    tokens: int = 64
    """The most tokens of an answer."""
    slots: int = 8
    """The server's option --slots."""
    queue: int = 32
    """The server's option --queue; clients beyond slots and queue get a 429."""
    leave: float = 0.1
    """Fraction of requests whose client disconnects during the answer."""
    bad: float = 0.05
    """Fraction of invalid requests."""
    seed: int = 0


class Case(NamedTuple):
    """A request, and the text of each choice as generated without a batch."""

    path: str
    body: dict[str, Any]
    texts: list[str]


class Mistake(NamedTuple):
    """An invalid request, and the status that it must get."""

    name: str
    content: bytes
    status: int


def make(folder: Path) -> None:
    """A model of random weights that takes conversations too, in the layout of Hugging Face."""
    import jax

    from jaxgpt import chat, pretrained
    from jaxgpt.model import ComputeConfig, GPTConfig, init
    from jaxgpt.tokenizer import TokenizerConfig, build, huggingface

    text = Path(__file__).read_text(encoding="utf-8")
    tokenizer = chat.equipped(build(TokenizerConfig("bpe", 384), [text]))
    # Weights so large that the likeliest token is far ahead.
    cfg = GPTConfig(L=2, D=64, N=4, T=256, V=tokenizer.vocab_size, init_std=0.3)
    compute, _ = ComputeConfig().resolve(cfg, "cpu")
    huggingface.write_tokenizer(tokenizer, folder, cfg.T)
    pretrained.write_model(folder, cfg, init(cfg.build(compute), jax.random.key(0)))


def cases(trained: Any, options: Options) -> list[Case]:
    """Requests of many lengths and settings, with their texts as generated without a batch."""
    from jaxgpt.chat import choose, render
    from jaxgpt.errors import InputError

    rng = random.Random(options.seed)
    tokenizer, context = trained.tokenizer, trained.config.model.T
    special = {*tokenizer.specials.values(), tokenizer.eot}
    # Whole characters, that one can see.
    texts_of = enumerate(piece.decode(errors="replace") for piece in tokenizer.pieces)
    usual = [
        id
        for id, text in texts_of
        if id not in special and text.isprintable() and "\ufffd" not in text
    ]
    try:
        template = choose(tokenizer)
    except InputError:
        template = None

    def said(length: int) -> str:
        return tokenizer.decode(rng.choices(usual, k=length))

    def asked(length: int, is_chat: bool) -> tuple[Any, int]:
        """A prompt of about so many tokens, and how many it has; 0: none that can be."""
        text = said(length)
        try:
            if is_chat:
                messages = [{"role": "user", "content": text}]
                return messages, len(render(template, tokenizer, messages, open=True).tokens)
            return text, len([*tokenizer.prefix, *tokenizer.encode(text)] or [tokenizer.eot])
        except InputError:  # what random ids say is not always text
            return text, 0

    settings = cycle(
        [
            {"temperature": 0.0},
            {"temperature": 0.8},
            {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
            {"temperature": 1.3, "top_p": 0.9, "n": 2},
            {"temperature": 0.0, "stop": []},
            {"temperature": 1.0, "top_k": 20, "min_p": 0.02, "presence_penalty": 0.5},
            {"temperature": 0.0},
            {"temperature": 1.0, "guided_choice": []},
        ]
    )
    made: list[Case] = []
    while len(made) < options.prompts:
        is_chat = template is not None and len(made) % 3 == 1
        longest = max(1, (context - 2) * len(made) // options.prompts)
        prompt, length = asked(rng.randint(1, longest), is_chat)
        if not 0 < length < context:
            continue
        body = {**next(settings), "seed": rng.randrange(2**40)}
        body["max_tokens"] = rng.randint(1, min(options.tokens, context - length))
        if "guided_choice" in body:
            body["guided_choice"] = list(dict.fromkeys(said(4) for _ in range(3)))
        given = {"choices" if key == "guided_choice" else key: x for key, x in body.items()}
        choices, most = given.pop("n", 1), given.pop("max_tokens")
        write = trained.stream_chat if is_chat else trained.stream
        if "stop" in body:
            whole = "".join(write(prompt, most, **{**given, "stop": ()}))
            given["stop"] = body["stop"] = [whole[len(whole) // 2 :][:2] or "none"]
        seeds = range(body["seed"], body["seed"] + choices)
        texts = ["".join(write(prompt, most, **{**given, "seed": seed})) for seed in seeds]
        path, name = PATHS[is_chat]
        made.append(Case(path, {**body, name: prompt}, texts))
    return made


def post(path: str, body: Any, kind: str = "application/json", host: str = "127.0.0.1") -> bytes:
    """A call, as it is sent."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: {kind}\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


def mistakes(context: int, vocabulary: int) -> list[Mistake]:
    """One invalid request of each kind."""
    path, fine = "/v1/completions", {"prompt": [0], "max_tokens": 4}
    bodies: dict[str, Any] = {
        "no JSON": b'{"prompt": ',
        "no object": [],
        "no prompt": {"max_tokens": 4},
        "a field that is not known": {**fine, "tools": [1]},
        "a field of another type": {**fine, "max_tokens": "4"},
        "a field out of range": {**fine, "temperature": -1},
        "fields that exclude each other": {**fine, "guided_regex": "a", "guided_choice": ["a"]},
        "a regular expression that is none": {**fine, "guided_regex": "("},
        "a prompt that is too long": {**fine, "prompt": [0] * context},
        "an answer that is too long": {**fine, "max_tokens": context},
        "an id that is no token": {**fine, "prompt": [vocabulary]},
        "half a surrogate pair": b'{"prompt": "\\ud800"}',
    }
    return [
        *(Mistake(name, post(path, body), 400) for name, body in bodies.items()),
        Mistake("another model", post(path, {**fine, "model": "another"}), 404),
        Mistake("another path", post("/v1/images", fine), 404),
        Mistake("another method", get(path), 405),
        Mistake("another host", post(path, fine, host="example.org"), 403),
        Mistake("another kind of body", post(path, fine, kind="text/plain"), 415),
        Mistake("a body that is too large", post(path, b" " * (2**20 + 1)), 413),
    ]


class Connection:
    """HTTP/1.1 to the server, kept open from one call to the next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: Any = None
        self._writer: Any = None
        self._headers: dict[str, str] = {}
        self._used = 0.0

    async def send(self, content: bytes) -> None:
        """A call, or a part of one."""
        if self._writer is None or time.monotonic() - self._used > IDLE:
            self.close()
            opened = await asyncio.open_connection("127.0.0.1", self._port)
            self._reader, self._writer = opened
        self._writer.write(content)
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """The answer's status and headers."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        pairs = (line.partition(":") for line in lines[1:-1])
        self._headers = {name.lower(): value.strip() for name, _, value in pairs}
        return int(lines[0].split()[1]), self._headers

    async def parts(self) -> AsyncIterator[bytes]:
        """The body of the answer, in chunks."""
        if self._headers.get("transfer-encoding") == "chunked":
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readuntil(b"\r\n")
        else:
            yield await self._reader.readexactly(int(self._headers["content-length"]))
        self._used = time.monotonic()
        if self._headers.get("connection") == "close":
            self.close()

    async def body(self) -> Any:
        """All of it: JSON, or else text."""
        content = b"".join([part async for part in self.parts()])
        try:
            return json.loads(content)
        except ValueError:
            return content.decode()

    async def events(self) -> AsyncIterator[dict[str, Any] | None]:
        """The server-sent events of the body; None for the one that says it is done."""
        rest = b""
        async for part in self.parts():
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                if not event.startswith(b":"):
                    data = event.removeprefix(b"data: ")
                    yield None if data == b"[DONE]" else json.loads(data)

    def close(self, at_once: bool = False) -> None:
        """Leaves; `at_once` with a reset, whatever is on its way."""
        if self._writer is not None:
            self._writer.transport.abort() if at_once else self._writer.close()
        self._writer = None


@dataclass
class Answer:
    """What is known of an answer so far."""

    choices: int
    sent: float = 0.0
    first: float = 0.0
    """When the first text came; only a stream tells."""
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.texts = [""] * self.choices
        self.finishes: list[str | None] = [None] * self.choices

    def take(self, said: dict[str, Any]) -> None:
        """A whole answer, or an event of one."""
        if "error" in said:
            self.error = said["error"]
            return
        self.ids.add(said["id"])
        for choice in said["choices"]:
            message = choice.get("message") or choice.get("delta") or {}
            text = choice.get("text") or message.get("content") or ""
            if text and not self.first:
                self.first = time.monotonic()
            self.texts[choice["index"]] += text
            if choice["finish_reason"]:
                self.finishes[choice["index"]] = choice["finish_reason"]
        if usage := said.get("usage"):
            self.tokens = usage["completion_tokens"]

    @property
    def is_stopped(self) -> bool:
        """Whether it was refused because the server is shutting down."""
        return self.error.get("code") == "stopped"


class Load:
    """The clients, and what they saw."""

    def __init__(
        self, port: int, cases: list[Case], mistakes: list[Mistake], options: Options
    ) -> None:
        self.port, self.cases, self.mistakes, self.options = port, cases, mistakes, options
        self.broken: dict[str, list[str]] = defaultdict(list)
        """By promise, what was seen instead."""
        self.answers: list[Answer] = []  # that came to their end
        self.statuses: Counter[int] = Counter()
        self.left: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.open: dict[int, Answer] = {}  # by client
        self.again = 0
        self.turned_away = 0  # after SIGTERM
        self.stopping = False
        self.signalled = float("inf")
        self.known: dict[int, tuple[list[str | None], int]] = {}

    async def run(self, clients: int, seconds: float) -> tuple[float, float]:
        """Lets clients ask for so many seconds; from when to when that was."""
        self.stopping, start = False, time.monotonic()
        asking = asyncio.create_task(self.ask_all(clients))
        await asyncio.wait([asking], timeout=seconds)
        self.stopping, end = True, time.monotonic()
        await asking
        return start, end

    async def ask_all(self, clients: int) -> None:
        """Lets clients ask until they are told to stop, or turned away."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                # One that is alone takes the time of good calls.
                options = self.options if clients > 1 else replace(self.options, leave=0, bad=0)
                group.create_task(self.client(number, options))

    async def client(self, number: int, options: Options) -> None:
        """Asks, one call after the other."""
        rng = random.Random(f"{options.seed} {number}")
        connection = Connection(self.port)
        while not self.stopping:
            kind = rng.random()
            sent = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    if kind < options.bad:
                        goes_on = await self.mistake(rng.choice(self.mistakes))
                    elif kind < options.bad + options.leave:
                        goes_on = await self.leave(connection, rng)
                    else:
                        goes_on = await self.ask(connection, rng, number)
            except TimeoutError:
                self.broken["ended"].append(f"no answer in {PATIENCE:g} s")
                connection.close()
                continue
            except LOST as error:
                connection.close()
                answer = self.open.pop(number, None)
                if self.is_late(answer.sent if answer else sent) and not (answer and answer.first):
                    self.turned_away += 1
                    break
                self.broken["ended"].append(f"the connection broke off: {error!r}")
                await asyncio.sleep(0.5)
                continue
            if not goes_on:
                break
        connection.close()

    def is_late(self, sent: float) -> bool:
        """Whether it came when, or just before, the server was told to shut down."""
        return sent > self.signalled - 1

    async def say(self, connection: Connection, case: Case, stream: bool, answer: Answer) -> None:
        """Asks, and fills the answer."""
        body = {**case.body, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer.sent = time.monotonic()
        await connection.send(post(case.path, body))
        answer.status, answer.headers = await connection.head()
        self.count(answer.status)
        if answer.status != 200 or not stream:
            answer.take(await connection.body())
            if answer.status == 200:
                answer.first = 0.0  # it came with all the rest
        else:
            done = False
            async for event in connection.events():
                done = event is None
                if event is not None:
                    answer.take(event)
            if not done and not answer.error:
                self.broken["ended"].append("a stream ended without [DONE]")
        answer.ended = time.monotonic()

    def count(self, status: int) -> None:
        """A status; one that says the server failed is not expected, unless it shuts down."""
        self.statuses[status] += 1
        if status >= 500 and not (status == 503 and time.monotonic() > self.signalled):
            self.broken["5xx"].append(f"status {status}")

    async def ask(self, connection: Connection, rng: random.Random, number: int) -> bool:
        """A call of a client that waits; returns whether it may go on asking."""
        index, stream = rng.randrange(len(self.cases)), rng.random() < 0.5
        case = self.cases[index]
        while True:
            answer = self.open[number] = Answer(len(case.texts))
            await self.say(connection, case, stream, answer)
            del self.open[number]
            if answer.status != 429:
                break
            self.again += 1
            wait = answer.headers.get("retry-after", "")
            if not wait.isdecimal():
                self.broken["429"].append(f"retry-after: {wait!r}")
            await asyncio.sleep(float(wait or 1) + rng.random())
            if self.stopping:
                return True
        if answer.is_stopped and time.monotonic() > self.signalled:
            if "retry-after" not in answer.headers and answer.status != 200:
                self.broken["SIGTERM"].append("a 503 without retry-after")
            in_time = time.monotonic() < self.signalled + DRAIN
            if answer.first or (in_time and not self.is_late(answer.sent)):
                self.broken["SIGTERM"].append("an answer that had been asked for was cut off")
            self.turned_away += 1
            return False
        if answer.status != 200 or answer.error:
            if answer.status < 500:
                self.broken["refused"].append(f"a good call got {answer.status}: {answer.error}")
            elif answer.status == 200:
                self.broken["5xx"].append(f"an error in a stream: {answer.error}")
            return True
        self.answers.append(answer)
        self.compare(index, answer)
        return True

    def compare(self, index: int, answer: Answer) -> None:
        """Compares an answer with the text without a batch, and with how earlier answers ended."""
        case, ends = self.cases[index], (answer.finishes, answer.tokens)
        if answer.texts != case.texts:
            self.broken["texts"].append(f"{case.body}: {answer.texts}, alone {case.texts}")
        if len(answer.ids) != 1:
            self.broken["texts"].append(f"one answer had the ids {answer.ids}")
        if self.known.setdefault(index, ends) != ends or not all(answer.finishes):
            self.broken["texts"].append(f"{case.body}: {ends}, before {self.known[index]}")

    async def leave(self, connection: Connection, rng: random.Random) -> bool:
        """A call of a client that disconnects in the middle."""
        case = rng.choice(self.cases)
        kind = rng.choice(["in a stream", "before a whole answer", "in its own body"])
        content = post(case.path, {**case.body, "stream": kind == "in a stream"})
        self.left[kind] += 1
        if kind == "in its own body":
            content = content[: rng.randrange(1, len(content))]
        await connection.send(content)
        if kind == "in a stream":
            status, _ = await connection.head()
            self.count(status)
            if status == 200:
                answer, left = Answer(len(case.texts)), rng.randint(1, 4)
                async for event in connection.events():
                    answer.take(event or {"choices": [], "id": "done"})
                    left -= 1
                    if not left:
                        break
                for text, alone in zip(answer.texts, case.texts, strict=True):
                    if not alone.startswith(text):
                        self.broken["texts"].append(f"{case.body}: {text!r}, alone {alone!r}")
        else:
            await asyncio.sleep(rng.uniform(0, 1))
        connection.close(at_once=rng.random() < 0.5)
        return True

    async def mistake(self, mistake: Mistake) -> bool:
        """Sends an invalid request."""
        connection = Connection(self.port)
        try:
            await connection.send(mistake.content)
            status, _ = await connection.head()
            body = await connection.body()
        finally:
            connection.close()
        self.count(status)
        if status == 503 and time.monotonic() > self.signalled:
            self.turned_away += 1
            return False
        self.refused[mistake.name] += 1
        said = body.get("error") if isinstance(body, dict) else None
        if status != mistake.status or not (said and said["message"] and said["type"]):
            self.broken["refused"].append(f"{mistake.name}: {status} {body}")
        return True


@dataclass
class Server:
    """The server's process."""

    process: asyncio.subprocess.Process
    log: Path
    """What it writes to stderr."""
    started: float
    port: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Times and bytes."""

    def compiled(self) -> list[str]:
        """What has been compiled until now, or fetched from the compilation cache."""
        return COMPILED.findall(self.log.read_text(errors="replace"))

    async def watch(self) -> None:
        """Notes the memory it holds, twice a second."""
        page = resource.getpagesize()
        while True:
            statm = Path(f"/proc/{self.process.pid}/statm")
            words = statm.read_text().split() if statm.exists() else []
            if len(words) > 1:
                self.memory.append((time.monotonic(), int(words[1]) * page))
            await asyncio.sleep(0.5)

    def growth(self, start: float, end: float) -> tuple[float, float, float]:
        """Bytes after the warm-up and at the end, and percent; medians of a tenth of the time."""
        tenth = (end - start) / 10

        def held(since: float) -> float:
            some = [n for at, n in self.memory if since <= at <= since + tenth]
            return statistics.median(some) if some else float("nan")

        warm, last = held(start + WARM * 10 * tenth), held(end - tenth)
        return warm, last, 100 * (last / warm - 1)


@asynccontextmanager
async def serving(
    path: str, options: Options, log: Path, flags: Sequence[str] = ()
) -> AsyncIterator[Server]:
    """A server that takes calls, started with some more flags."""
    command = [sys.executable, "-m", "jaxgpt", "serve", path, "--port", "0"]
    command += ["--slots", str(options.slots), "--queue", str(options.queue), *flags]
    env = {**os.environ, "JAX_LOG_COMPILES": "1"}
    started = time.monotonic()
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command, env=env, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )
    server = Server(process, log, started)
    try:
        said = ""
        while "is ready after" not in said:
            line = (await process.stdout.readline()).decode()
            if not line:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
            said += line
        server.port = int(re.findall(r"http://[^/]*:(\d+)/", said)[0])
        connection = Connection(server.port)
        await connection.send(get("/health"))
        assert (await connection.head())[0] == 200
        connection.close()
        yield server
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def idle(port: int, seconds: float = 10.0) -> dict[str, int]:
    """What the engine counts, once nothing runs or waits, or so many seconds have gone."""
    counts: dict[str, int] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection = Connection(port)
        try:
            await connection.send(get("/metrics"))
            await connection.head()
            lines = re.findall(r"^jaxgpt_(\w+) (\d+)$", await connection.body(), re.MULTILINE)
        except LOST:
            break
        finally:
            connection.close()
        counts = {name: int(count) for name, count in lines}
        if not counts["running"] + counts["waiting"]:
            break
        await asyncio.sleep(0.2)
    return counts


async def drained(load: Load, server: Server) -> tuple[int, float, int]:
    """SIGTERM under load: how many answers were running, seconds to the end, exit status."""
    load.stopping = False
    asking = asyncio.create_task(load.ask_all(load.options.clients))
    await asyncio.sleep(3)
    running = sum(1 for answer in load.open.values() if answer.first)
    load.signalled = time.monotonic()
    if server.process.returncode is None:
        server.process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(2 * EXIT):
            status = await server.process.wait()
    except TimeoutError:
        server.process.kill()
        status = await server.process.wait()
    took = time.monotonic() - load.signalled
    await asking
    return running, took, status


def percentiles(answers: list[Answer]) -> list[float]:
    """Milliseconds to the first text: what half, 95% and 99% of the streams took at most."""
    times = sorted(1000 * (answer.first - answer.sent) for answer in answers if answer.first)
    if len(times) < 2:
        return [float("nan")] * 3
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return [cuts[49], cuts[94], cuts[98]]


async def measure(path: str, trained: Any, calls: list[Case], options: Options) -> int:
    """All of it against one server; the exit status."""
    mistaken = mistakes(trained.config.model.T, trained.tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        async with serving(path, options, Path(folder) / "stderr") as server:
            ready, at_start = time.monotonic() - server.started, len(server.compiled())
            print(f"the server is ready after {ready:.1f} s and {at_start} compilations")
            load = Load(server.port, calls, mistaken, options)
            alone = await load.run(1, max(5.0, options.seconds / 10))
            print(f"one at a time: {alone[1] - alone[0]:.0f} s")
            watch = asyncio.create_task(server.watch())
            busy = await load.run(options.clients, options.seconds)
            print(f"{options.clients} clients: {busy[1] - busy[0]:.0f} s")
            watch.cancel()
            counts = await idle(server.port)
            running, took, status = await drained(load, server)
        compiled, log = server.compiled(), server.log.read_text(errors="replace")
    late = compiled[at_start:]
    before, after, growth = server.growth(*busy)
    failures = log.count("Traceback")

    rates = []
    for start, end in (busy, alone):
        answers = [answer for answer in load.answers if start <= answer.ended <= end]
        tokens = sum(answer.tokens for answer in answers)
        times = percentiles(answers)
        rates.append([len(answers) / (end - start), tokens / (end - start), *times])
    names = ["requests/s", "tokens/s", *(f"first text, p{p}, ms" for p in (50, 95, 99))]
    print(f"\n{'':<22}{f'{options.clients} clients':>12}{'one by one':>12}{'ratio':>8}")
    for name, many, one in zip(names, *rates, strict=True):
        print(f"{name:<22}{many:>12.1f}{one:>12.1f}{many / one:>8.2f}")

    answers, broken = len(load.answers), load.broken
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(load.statuses.items()))
    left = sum(load.left.values())
    calls = f"{sum(load.statuses.values())} calls, {left} left in the middle"
    still = counts.get("running", -1), counts.get("waiting", -1)
    let_go = counts.get("cancelled_total", 0)
    ended = sum(answer.ended > load.signalled for answer in load.answers)
    ends = f"{running} had begun, {ended} ended, {load.turned_away} turned away"
    promises = [
        ("every answer equals that without a batch", f"{answers} answers", broken["texts"]),
        ("every call is answered", calls, broken["ended"]),
        ("no 5xx before SIGTERM", statuses, broken["5xx"]),
        ("429 says when to come again", f"{load.again} times", broken["429"]),
        ("invalid requests are refused", f"{sum(load.refused.values())} calls", broken["refused"]),
        ("who leaves is let go", f"{let_go} texts stopped", left > 50 and not let_go),
        ("nothing runs or waits when all have left", f"{still[0]} and {still[1]}", still != (0, 0)),
        ("memory grows by 5% at most", f"{growth:+.1f}%", not growth <= GROWTH),
        ("nothing is compiled once it is ready", f"{len(late)} programs", late or not at_start),
        ("the log has no exception", f"{failures}", failures),
        ("SIGTERM lets what is running end", ends, broken["SIGTERM"] or not ended),
        ("and ends within 30 s", f"status {status}, {took:.1f} s", status or took > EXIT),
    ]
    print()
    for promise, seen, wrong in promises:
        print(f"{'BROKEN' if wrong else 'kept':<8}{promise:<42}{seen}")
    print(f"\nmemory: {before / 2**20:.1f} MiB once warm, {after / 2**20:.1f} MiB at the end")
    for program in sorted(set(late)):
        print(f"compiled late: {late.count(program)} x {program}")
    for promise, found in broken.items():
        for one, count in Counter(found).most_common(5):
            print(f"{promise}, {count} of {len(found)}: {one[:600]}")
    if failures or status:
        print(f"the end of the server's log:\n{log[-3000:]}")
    return int(any(wrong for _, _, wrong in promises))


def main(options: Options) -> int:
    """Makes a model where none is given, writes every text alone, and loads the server."""
    import jaxgpt

    libraries = ("jaxgpt", "jax", "fastapi", "uvicorn", "h11")
    print("python", *sys.argv)
    print(f"Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in libraries))
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} before")
    with tempfile.TemporaryDirectory() as folder:
        path = options.run
        if not path:
            path = f"{folder}/tiny"
            make(Path(path))
        trained = jaxgpt.load(path)
        start = time.monotonic()
        calls = cases(trained, options)
        print(f"{len(calls)} texts generated without a batch in {time.monotonic() - start:.0f} s")
        return asyncio.run(measure(path, trained, calls, options))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
