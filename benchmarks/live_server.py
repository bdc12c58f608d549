"""`python -m jaxgpt serve` in a process of its own, for the benchmarks of the server."""

import asyncio
import os
import platform
import re
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

COMPILED = re.compile(r"Finished XLA compilation of (\S+)")


@dataclass
class LiveServer:
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


@asynccontextmanager
async def serving(
    path: str, log: Path, *flags: str, slots: int = 8, queue: int = 32
) -> AsyncIterator[LiveServer]:
    """A server that takes calls.

    Args:
        path: The model.
        log: The file for what the server writes to stderr.
        flags: More options of the command.
        slots: The option --slots.
        queue: The option --queue.
    """
    command = [sys.executable, "-m", "jaxgpt", "serve", path, "--port", "0"]
    command += ["--slots", str(slots), "--queue", str(queue), *flags]
    env = {**os.environ, "JAX_LOG_COMPILES": "1"}
    started = time.monotonic()
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *command, env=env, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )
    server = LiveServer(process, log, started)
    try:
        said = ""
        while "is ready after" not in said:
            line = (await process.stdout.readline()).decode()
            if not line:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
            said += line
        server.port = int(re.findall(r"http://[^/]*:(\d+)/", said)[0])
        async with http_client(server.port) as http:
            (await http.get("/health")).raise_for_status()
        yield server
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def http_client(
    port: int, socket_options: Sequence[tuple[int, int, Any]] = (), *, keep: float = 3.0
) -> httpx2.AsyncClient:
    """A client of the server on this machine, without limits on connections and on time.

    Args:
        port: The server's port.
        socket_options: Options of the connections' sockets, as for `socket.setsockopt`.
        keep: The seconds after which an idle connection is not used again; the server closes it
            after 5.
    """
    transport = httpx2.AsyncHTTPTransport(
        limits=httpx2.Limits(keepalive_expiry=keep), socket_options=socket_options
    )
    return httpx2.AsyncClient(
        transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=None
    )


@contextmanager
def served_model(run: str) -> Iterator[str]:
    """The path of the model to serve: `run`, or if that is empty a temporary `make_model`."""
    with tempfile.TemporaryDirectory() as folder:
        if not run:
            make_model(Path(folder) / "tiny")
        yield run or f"{folder}/tiny"


def make_model(folder: Path, *, L: int = 2, D: int = 64, N: int = 4, V: int = 386) -> None:
    """A model of random weights that takes conversations too, in the layout of Hugging Face.

    Args:
        folder: Where it is written.
        L: Layers.
        D: Width.
        N: Heads.
        V: Tokens of its vocabulary, with those of the chat format.
    """
    import jax

    from jaxgpt import chat, pretrained
    from jaxgpt.model import ComputeConfig, GPTConfig, init
    from jaxgpt.tokenizer import TokenizerConfig, build, huggingface

    texts = [Path(__file__).with_name("serve.py").read_text(encoding="utf-8")]
    if V > 1000:  # more than are worth a token in this file
        library = Path(sysconfig.get_path("stdlib"))
        texts = [file.read_text(encoding="utf-8") for file in sorted(library.glob("*.py"))]
    tokenizer = build(TokenizerConfig("bpe", V - len(chat.ChatML.specials)), texts)
    tokenizer = tokenizer.extended(chat.ChatML.specials)
    # Weights so large that the likeliest token is far ahead.
    cfg = GPTConfig(L=L, D=D, N=N, T=256, V=tokenizer.vocab_size, init_std=2.4 * (2 / D / L) ** 0.5)
    compute, _ = ComputeConfig().resolve(cfg, "cpu")
    huggingface.write_tokenizer(tokenizer, folder, cfg.T)
    pretrained.write_model(folder, cfg, init(cfg.build(compute), jax.random.key(0)))


def print_environment() -> None:
    """Prints the command, the versions and the machine."""
    libraries = ("jaxgpt", "jax", "fastapi", "uvicorn", "h11", "httpx2")
    print("python", *sys.argv)
    print(f"Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in libraries))
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} before")
