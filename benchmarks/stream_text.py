"""Throughput of streamed text against the same text, tokenized before training, in memory-maps.

    python benchmarks/stream_text.py --megabytes 200

A server on this machine has the text as JSON Lines files, made of the Python standard library's
modules in random order. Every reader makes the batches of one epoch: `memory-mapped` from the cache
of tokens, `streamed, cold` downloads, tokenizes and deletes files on the way, under a budget of a
third of the disk space, and `streamed, warm` has all its tokens in the cache. There is no training
step in between, so the cold figure is the most tokens a second that training could consume.
"""

import argparse
import functools
import http.server
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import tiktoken

from jaxgpt import data
from jaxgpt.tokenizer import TokenizerConfig, build

SHAPE = {"context": 1024, "batch": 16}


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and parts of its files."""

    def log_message(self, *_: object) -> None:
        """Is silent."""

    def do_GET(self) -> None:
        """Answers with a file, or the part that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return super().do_GET()
        start, end = int(asked[1]), int(asked[2]) + 1
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(start)
            content = file.read(end - start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def write_files(folder: Path, size: int, count: int) -> int:
    """Writes JSON Lines files of about `size` bytes in total; returns their exact size."""
    documents = list(data.texts(data.DataConfig(), held_out=True))
    shuffled = random.Random(0)
    for number in range(count):
        with open(folder / f"train-{number:03}.jsonl", "w", encoding="utf-8") as out:
            while out.tell() < size // count:
                out.write(json.dumps({"text": shuffled.choice(documents)}) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def serve(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Starts a server in a process of its own; returns it and its address."""
    command = [sys.executable, __file__, "--serve", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().strip()


def tokens_per_second(dataset: data.Dataset, steps: int) -> float:
    """The speed of the batches of some steps."""
    began = time.perf_counter()
    for step in range(steps):
        dataset.batch(step)
    return steps * SHAPE["context"] * SHAPE["batch"] / (time.perf_counter() - began)


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        handler = functools.partial(Files, directory=args.serve)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        server.serve_forever()

    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"tiktoken {tiktoken.__version__}, fsspec {fsspec.__version__}"
    )
    tokenizer = build(TokenizerConfig(vocab_size=4096), data.texts(data.DataConfig()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        size = write_files(folder / "files", args.megabytes * 10**6, args.files)
        server, address = serve(folder / "files")
        try:
            compare(folder, size, args.files, address, tokenizer)
        finally:
            server.terminate()
            server.wait()


def compare(folder: Path, size: int, files: int, address: str, tokenizer) -> None:
    cfg = data.DataConfig(val_fraction=0.0, cache=str(folder / "cache"), paths=(address,))
    local = replace(cfg, paths=(str(folder / "files"),))
    began = time.perf_counter()
    corpus = data.prepare(local, tokenizer)
    seconds = time.perf_counter() - began
    tokens = len(corpus.train)
    whole = data.streams(corpus, local, **SHAPE)
    steps = whole.rows // SHAPE["batch"]
    print(f"{size / 1e6:.0f} MB in {files} files, {tokens:,} tokens; {steps} batches of {SHAPE}")
    mapped = tokens_per_second(whole, steps)

    budget = (size / files + folder_size(folder / "cache")) / 3 / 1e9
    small = replace(cfg, stream=True, disk_gb=budget, cache=str(folder / "small"))
    began = time.perf_counter()
    cold = tokens_per_second(data.stream(small, tokenizer, **SHAPE), steps)
    first = time.perf_counter() - began
    left = folder_size(folder / "small") / 1e9

    streamed = replace(cfg, stream=True, cache=str(folder / "large"))
    tokens_per_second(data.stream(streamed, tokenizer, **SHAPE), steps)
    warm = tokens_per_second(data.stream(streamed, tokenizer, **SHAPE), steps)

    print(f"memory-mapped    {mapped:>14,.0f} tokens/s, after {seconds:.1f} s of tokenizing")
    print(f"streamed, warm   {warm:>14,.0f} tokens/s   ratio {warm / mapped:.2f}")
    print(f"streamed, cold   {cold:>14,.0f} tokens/s   ratio {cold / mapped:.4f}")
    print(
        f"from nothing to the end of the epoch: tokenized first "
        f"{seconds + tokens / mapped:.1f} s, streamed {first:.1f} s"
    )
    print(f"disk: budget {budget * 1e3:.1f} MB, {left * 1e3:.1f} MB at the end")


if __name__ == "__main__":
    main()
