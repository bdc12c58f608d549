"""Tokenizes a text file that is too large for memory, and reports speed and peak memory.

    python benchmarks/tokenize_corpus.py --gigabytes 2
    python benchmarks/tokenize_corpus.py --gigabytes 0.2 --beam 1 2    # needs apache-beam

The file is made of the Python standard library's modules in random order, and is one document. It
is compared with the same encoding in one call per mebibyte, in one thread, on a sample of the file.
With --beam, the text is in 16 files, and Apache Beam tokenizes it too, with these numbers of worker
processes; its tokens must be the same.
"""

import argparse
import hashlib
import os
import platform
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

from jaxgpt import data
from jaxgpt.tokenizer import Tokenizer, TokenizerConfig, build

SAMPLE = 32  # mebibytes


def write_file(file: Path, size: int, seed: int = 0) -> None:
    """Writes about `size` bytes of UTF-8 text: files of the library, in random order."""
    documents = [text.encode() for text in data.texts(data.DataConfig(), held_out=True)]
    shuffled = random.Random(seed)
    with open(file, "wb") as out:
        while out.tell() < size:
            out.write(shuffled.choice(documents))


def digest(entry: Path) -> str:
    """A hash of the manifest of a cache entry, which has the hashes of its files."""
    return hashlib.sha256((entry / "SHA256SUMS").read_bytes()).hexdigest()[:16]


def run_beam(folder: Path, tokenizer: Tokenizer, workers: int) -> tuple[float, str]:
    """The seconds in which Beam tokenizes the files of a folder, and the digest of the tokens."""
    from jaxgpt.data import beam

    cfg = data.DataConfig(paths=(str(folder / "corpus*"),), cache=str(folder / f"beam{workers}"))
    options = ["--runner=DirectRunner", f"--direct_num_workers={workers}"]
    options += ["--direct_running_mode=multi_processing"]
    began = time.perf_counter()
    (entry,) = beam.tokenize(cfg, tokenizer, options=options)
    return time.perf_counter() - began, digest(Path(entry))


def peak_mib() -> float:
    """Peak resident memory of this process; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one for each core")
    parser.add_argument("--beam", type=int, nargs="*", default=[], help="worker processes")
    args = parser.parse_args()

    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"tiktoken {tiktoken.__version__}"
    )
    began = time.perf_counter()
    cfg = TokenizerConfig(vocab_size=args.vocab_size)
    tokenizer = build(cfg, data.texts(data.DataConfig()))
    print(f"trained {args.vocab_size} ids in {time.perf_counter() - began:.1f} s")

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"corpus{n:02}.txt" for n in range(16 if args.beam else 1)]
        for number, file in enumerate(files):
            write_file(file, int(args.gigabytes * 1e9 / len(files)), seed=number)
        size = sum(file.stat().st_size for file in files)

        with open(file, newline="", encoding="utf-8") as text:
            sample = [text.read(1 << 20) for _ in range(SAMPLE)]
        began, used = time.perf_counter(), time.process_time()
        for piece in sample:
            tokenizer.encode_array(piece)
        sample_size = sum(len(piece.encode()) for piece in sample)
        single = sample_size / (time.perf_counter() - began)
        single_cpu = sample_size / (time.process_time() - used)

        pattern = str(Path(folder) / "corpus*")
        data_cfg = data.DataConfig(paths=(pattern,), cache=folder, workers=args.workers)
        before = peak_mib()
        began, used = time.perf_counter(), time.process_time()
        corpus = data.prepare(data_cfg, tokenizer)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        began = time.perf_counter()
        data.prepare(data_cfg, tokenizer)
        again = time.perf_counter() - began
        (entry,) = data.token_entries(data_cfg, corpus.fingerprint)
        local = digest(entry)
        beams = {n: run_beam(Path(folder), tokenizer, n) for n in args.beam}

    tokens = len(corpus.train) + len(corpus.val)
    print(f"{size / 1e9:.2f} GB, {tokens:,} tokens, {size / tokens:.2f} bytes per token")
    print(f"prepare      {seconds:8.1f} s  {size / seconds / 1e6:6.2f} MB/s, all passes included")
    print(f"one thread                {single / 1e6:6.2f} MB/s, encoding alone")
    print(f"ratio                     {size / seconds / single:6.2f}")
    print(f"by CPU time               {size / cpu / single_cpu:6.2f} (1: nothing but encoding)")
    print(f"from the cache {again:6.1f} s")
    for workers, (took, found) in beams.items():
        same = "the same tokens" if found == local else "OTHER TOKENS"
        print(
            f"Beam, {workers} worker{'s' if workers > 1 else ' '} {took:7.1f} s "
            f"{size / took / 1e6:7.2f} MB/s, {same} (SHA-256 {found})"
        )
    print(f"peak memory {peak_mib():.0f} MiB in the one process; {before:.0f} MiB before prepare")


if __name__ == "__main__":
    main()
