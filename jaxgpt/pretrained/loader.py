"""python run.py 464 3280 --tokens 64: the most probable tokens, with jax and numpy alone."""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jax import export

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "I8": np.int8}


def read_tensors(file):
    """Yields the names and the tensors of a safetensors file, mapped into memory."""
    data = np.memmap(file, np.uint8, "r")
    begin = 8 + int(data[:8].view("<u8")[0])
    for name, entry in json.loads(data[8:begin].tobytes()).items():
        if name != "__metadata__":
            first, last = (begin + offset for offset in entry["data_offsets"])
            yield name, data[first:last].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def generate(folder, prompt, tokens):
    """Yields the `tokens` ids that follow a prompt's ids."""
    about = json.loads((folder / "programs.json").read_text())
    if not 0 < tokens <= about["context"] - len(prompt):
        sys.exit(f"{len(prompt)} + {tokens} tokens: the context is {about['context']}")
    sys.path.append(str(folder / "flatbuffers.zip"))  # with which jax reads what it has exported
    files = {name: bytearray((folder / f"{name}.bin").read_bytes()) for name in about["programs"]}
    run = {name: jax.jit(export.deserialize(files[name]).call, donate_argnums=1) for name in files}
    tensors = dict(read_tensors(folder / about["weights"]["file"]))
    weights = [jax.device_put(tensors[name]) for name in about["weights"]["order"]]
    cache = [jax.numpy.zeros(entry["shape"], entry["dtype"]) for entry in about["cache"]]
    ids, start, name = [*prompt], 0, "prefill"
    while len(ids) < len(prompt) + tokens:
        part = np.zeros((1, about["programs"][name]["tokens"]), np.int32)
        count = min(part.size, len(ids) - start)
        part[0, :count] = ids[start : start + count]
        logits, cache = run[name](weights, cache, part, np.int32(start), np.int32(count))
        start += count
        if start == len(ids):
            name, ids = "decode", [*ids, int(logits.argmax())]
            yield ids[-1]


if __name__ == "__main__":
    times, parser = [time.perf_counter()], argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    for token in generate(Path(__file__).parent, **vars(parser.parse_args())):
        print(token, end=" ", flush=True)
        times.append(time.perf_counter())
    steps = np.diff(times)
    print(f"\nfirst in {steps[0]:.1f} s, {1 / np.median(steps):.1f} tokens/s", file=sys.stderr)
