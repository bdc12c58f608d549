"""Load test of a live server: many clients at once, some misbehaving, and the promises it keeps.

    python benchmarks/serve.py --seconds 300                     # a tiny model, random weights
    python benchmarks/serve.py --run runs/default --seconds 300

`python -m jaxgpt serve` runs in a process of its own. Clients request texts that this process has
generated before without a batch, to compare with; some disconnect during the answer, some send
invalid requests. Then the server gets SIGTERM under load. Exits with 1 if a promise is broken.

Needs Linux and `pip install 'jaxgpt[test]'`. The clients share the machine with the server, and
take about 2 ms of processor time per call.
"""

import asyncio
import json
import random
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import tyro
from live_server import LiveServer, http_client, print_environment, served_model, serving
from prometheus_client.parser import text_string_to_metric_families

WARM = 0.2  # of the time under load; memory is compared with what it is then
GROWTH = 5.0  # percent of memory, at most
EXIT = 30.0  # seconds from SIGTERM to the end, at most
DRAIN = 25.0  # seconds what was asked before has to end
PATIENCE = 330.0  # seconds for an answer; the server itself allows 300
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # what closing sends then
PATHS = ("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")


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
    status: int
    request: httpx2.Request


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


def mistakes(http: httpx2.AsyncClient, context: int, vocabulary: int) -> list[Mistake]:
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

    def post(body: Any, path: str = path, **headers: str) -> httpx2.Request:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", "connection": "close", **headers}
        return http.build_request("POST", path, content=content, headers=headers)

    return [
        *(Mistake(name, 400, post(body)) for name, body in bodies.items()),
        Mistake("another model", 404, post({**fine, "model": "another"})),
        Mistake("another path", 404, post(fine, "/v1/images")),
        Mistake("another method", 405, http.build_request("GET", path)),
        Mistake("another host", 403, post(fine, host="example.org")),
        Mistake("another kind of body", 415, post(fine, **{"content-type": "text/plain"})),
        Mistake("a body that is too large", 413, post(b" " * (2**20 + 1))),
    ]


@dataclass
class Answer:
    """What is known of an answer so far."""

    choices: int
    sent: float = 0.0
    first: float = 0.0
    """When the first text came; only a stream tells."""
    ended: float = 0.0
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
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
        self,
        http: httpx2.AsyncClient,
        rude: httpx2.AsyncClient,
        cases: list[Case],
        mistakes: list[Mistake],
        options: Options,
    ) -> None:
        self.http, self.cases, self.mistakes, self.options = http, cases, mistakes, options
        self.rude = rude
        """Resets a connection instead of closing it."""
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
        while not self.stopping:
            kind = rng.random()
            sent = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    if kind < options.bad:
                        goes_on = await self.mistake(rng.choice(self.mistakes))
                    elif kind < options.bad + options.leave:
                        goes_on = await self.leave(rng)
                    else:
                        goes_on = await self.ask(rng, number)
            except TimeoutError:
                self.broken["ended"].append(f"no answer in {PATIENCE:g} s")
                continue
            except httpx2.TransportError as error:
                answer = self.open.pop(number, None)
                if self.is_late(answer.sent if answer else sent) and not (answer and answer.first):
                    self.turned_away += 1
                    break
                self.broken["ended"].append(f"the connection broke off: {error!r}")
                await asyncio.sleep(0.5)
                continue
            if not goes_on:
                break

    def is_late(self, sent: float) -> bool:
        """Whether it came when, or just before, the server was told to shut down."""
        return sent > self.signalled - 1

    async def say(self, case: Case, stream: bool, answer: Answer) -> None:
        """Asks, and fills the answer."""
        body = {**case.body, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer.sent = time.monotonic()
        async with self.http.stream("POST", case.path, json=body) as response:
            answer.status, answer.headers = response.status_code, response.headers
            self.count(answer.status)
            if answer.status != 200 or not stream:
                await response.aread()
                answer.take(response.json())
                if answer.status == 200:
                    answer.first = 0.0  # it came with all the rest
            else:
                done = False
                async for event in httpx2.EventSource(response):
                    done = event.data == "[DONE]"
                    if not done:
                        answer.take(json.loads(event.data))
                if not done and not answer.error:
                    self.broken["ended"].append("a stream ended without [DONE]")
        answer.ended = time.monotonic()

    def count(self, status: int) -> None:
        """A status; one that says the server failed is not expected, unless it shuts down."""
        self.statuses[status] += 1
        if status >= 500 and not (status == 503 and time.monotonic() > self.signalled):
            self.broken["5xx"].append(f"status {status}")

    async def ask(self, rng: random.Random, number: int) -> bool:
        """A call of a client that waits; returns whether it may go on asking."""
        index, stream = rng.randrange(len(self.cases)), rng.random() < 0.5
        case = self.cases[index]
        while True:
            answer = self.open[number] = Answer(len(case.texts))
            await self.say(case, stream, answer)
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

    async def leave(self, rng: random.Random) -> bool:
        """A call of a client that disconnects in the middle."""
        case = rng.choice(self.cases)
        kind = rng.choice(["in a stream", "before a whole answer", "in its own body"])
        http, seconds = rng.choice([self.http, self.rude]), rng.uniform(0, 1)
        self.left[kind] += 1
        if kind == "in a stream":
            body = {**case.body, "stream": True}
            async with http.stream("POST", case.path, json=body) as response:
                self.count(response.status_code)
                if response.status_code == 200:
                    await self.begin(response, case, rng.randint(1, 4))
        elif kind == "before a whole answer":
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await http.post(case.path, json=case.body)
        else:
            content = json.dumps(case.body).encode()
            headers = {"content-type": "application/json", "content-length": str(len(content))}

            async def part() -> AsyncIterator[bytes]:
                yield content[: rng.randrange(len(content))]
                await asyncio.sleep(seconds)
                raise InterruptedError

            with suppress(InterruptedError):
                await http.post(case.path, content=part(), headers=headers)
        return True

    async def begin(self, response: httpx2.Response, case: Case, count: int) -> None:
        """Reads some events of a stream, and compares them with how the texts begin."""
        answer = Answer(len(case.texts))
        async for event in httpx2.EventSource(response):
            if event.data != "[DONE]":
                answer.take(json.loads(event.data))
            count -= 1
            if not count:
                break
        for text, alone in zip(answer.texts, case.texts, strict=True):
            if not alone.startswith(text):
                self.broken["texts"].append(f"{case.body}: {text!r}, alone {alone!r}")

    async def mistake(self, mistake: Mistake) -> bool:
        """Sends an invalid request."""
        response = await self.http.send(mistake.request)
        self.count(response.status_code)
        if response.status_code == 503 and time.monotonic() > self.signalled:
            self.turned_away += 1
            return False
        self.refused[mistake.name] += 1
        error = response.json().get("error")
        if response.status_code != mistake.status or not (error["message"] and error["type"]):
            self.broken["refused"].append(f"{mistake.name}: {response.status_code} {error}")
        return True


def growth(memory: list[tuple[float, int]], start: float, end: float) -> tuple[float, float, float]:
    """Bytes after the warm-up and at the end, and percent; medians of a tenth of the time."""
    tenth = (end - start) / 10

    def held(since: float) -> float:
        some = [n for at, n in memory if since <= at <= since + tenth]
        return statistics.median(some) if some else float("nan")

    warm, last = held(start + WARM * 10 * tenth), held(end - tenth)
    return warm, last, 100 * (last / warm - 1)


async def idle(http: httpx2.AsyncClient, seconds: float = 10.0) -> dict[str, float]:
    """What the engine counts, once nothing runs or waits, or so many seconds have gone."""
    counts: dict[str, float] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            text = (await http.get("/metrics")).text
        except httpx2.TransportError:
            break
        families = text_string_to_metric_families(text)
        samples = (sample for family in families for sample in family.samples)
        counts = {sample.name: sample.value for sample in samples if not sample.labels}
        if not counts["jaxgpt_running"] + counts["jaxgpt_waiting"]:
            break
        await asyncio.sleep(0.2)
    return counts


async def drained(load: Load, server: LiveServer) -> tuple[int, float, int]:
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
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        async with (
            serving(path, log, slots=options.slots, queue=options.queue) as server,
            http_client(server.port) as http,
            http_client(server.port, [RESET]) as rude,
        ):
            ready, at_start = time.monotonic() - server.started, len(server.compiled())
            print(f"the server is ready after {ready:.1f} s and {at_start} compilations")
            sizes = trained.config.model.T, trained.tokenizer.vocab_size
            load = Load(http, rude, calls, mistakes(http, *sizes), options)
            alone = await load.run(1, max(5.0, options.seconds / 10))
            print(f"one at a time: {alone[1] - alone[0]:.0f} s")
            watch = asyncio.create_task(server.watch())
            busy = await load.run(options.clients, options.seconds)
            print(f"{options.clients} clients: {busy[1] - busy[0]:.0f} s")
            watch.cancel()
            counts = await idle(http)
            running, took, status = await drained(load, server)
        compiled, logged = server.compiled(), log.read_text(errors="replace")
    late = compiled[at_start:]
    before, after, grown = growth(server.memory, *busy)
    failures = logged.count("Traceback")

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
    still = [int(counts.get(f"jaxgpt_{name}", -1)) for name in ("running", "waiting")]
    let_go = int(counts.get("jaxgpt_cancelled_total", 0))
    ended = sum(answer.ended > load.signalled for answer in load.answers)
    ends = f"{running} had begun, {ended} ended, {load.turned_away} turned away"
    promises = [
        ("every answer equals that without a batch", f"{answers} answers", broken["texts"]),
        ("every call is answered", calls, broken["ended"]),
        ("no 5xx before SIGTERM", statuses, broken["5xx"]),
        ("429 says when to come again", f"{load.again} times", broken["429"]),
        ("invalid requests are refused", f"{sum(load.refused.values())} calls", broken["refused"]),
        ("who leaves is let go", f"{let_go} texts stopped", left > 50 and not let_go),
        ("nothing runs or waits when all have left", f"{still[0]} and {still[1]}", still != [0, 0]),
        ("memory grows by 5% at most", f"{grown:+.1f}%", not grown <= GROWTH),
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
        print(f"the end of the server's log:\n{logged[-3000:]}")
    return int(any(wrong for _, _, wrong in promises))


def main(options: Options) -> int:
    """Makes a model where none is given, writes every text alone, and loads the server."""
    import jaxgpt

    print_environment()
    with served_model(options.run) as path:
        trained = jaxgpt.load(path)
        start = time.monotonic()
        calls = cases(trained, options)
        print(f"{len(calls)} texts generated without a batch in {time.monotonic() - start:.0f} s")
        return asyncio.run(measure(path, trained, calls, options))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
