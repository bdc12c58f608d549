"""Small models, tokenizers and folders that several test files use."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np

from jaxgpt import model, pretrained
from jaxgpt.config import Config
from jaxgpt.model import ComputeConfig, GPTConfig
from jaxgpt.pretrained.trained import Trained
from jaxgpt.tokenizer import BPE, EOT, PATTERN, HuggingFace
from jaxgpt.tokenizer.huggingface import write_tokenizer

ROOT = Path(__file__).parents[1]

PLAIN = ComputeConfig("float32", "unrolled", "none", "plain")
GPT2 = GPTConfig(L=2, D=16, N=4, T=24, V=50)
LLAMA = GPTConfig(
    **{"L": 2, "D": 32, "N": 4, "K": 2, "F": 48, "T": 32, "V": 200, "position": "rotary"},
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
)
MODERN = replace(
    LLAMA,
    **{"D": 24, "H": 8, "F": 40, "T": 24, "V": 50, "tied": False, "qk_norm": True, "window": 5},
    rope_theta=100.0,
    global_every=2,
    logit_softcap=3.0,
)
"""Every option of an architecture that a decoder has: grouped heads, windows, a soft cap."""


@cache
def random_params(gpt, seed=1, std=0.3, norm=1.0):
    """A tree of random numpy arrays, also for leaves that `init` fills with zeros or ones.

    The scales of norms have the mean `norm`. Scanned layers hold the numbers of unrolled ones.
    Callers share the arrays: copy them to change them.
    """
    if gpt.compute.layers == "scan":
        unrolled = gpt.clone(compute=replace(gpt.compute, layers="unrolled"))
        with jax.ensure_compile_time_eval():  # numbers, also in a function that is being traced
            return jax.device_get(model.stack(random_params(unrolled, seed, std, norm)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return np.float32(std * rng.standard_normal(leaf.shape) + norm * (path[-1].key == "scale"))

    shapes = jax.eval_shape(partial(model.init, gpt), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_model(cfg, tokenizer, **random):
    """A loaded model of `random_params`, as `jaxgpt.load` returns one."""
    config = Config(name="tiny", model=replace(cfg, V=tokenizer.vocab_size))
    return Trained(config, random_params(config.model.build(PLAIN), **random), tokenizer)


def write_hugging_face(folder, cfg, tokenizer, params=None):
    """Writes a model and its tokenizer in Hugging Face's layout; random parameters by default."""
    folder.mkdir(parents=True, exist_ok=True)
    pretrained.write_model(folder, cfg, params or random_params(cfg.build(PLAIN)))
    write_tokenizer(tokenizer, folder, cfg.T)
    return folder


# Tokens that end inside a character, begin inside one, or hold several.
PIECES = [
    *("é".encode(), b"a\xc3", b"\xa9b", "€".encode()[:2], "🙂".encode()[:3], b"\x99\x82"),
    *(b"ab", b"abc", b" a", b"ba", "天天".encode(), b"\n\n", b"  ", "\ufffd".encode()),
]


def bpe(pieces=(), specials=(EOT,)):
    """A BPE of the 256 bytes, then `pieces`, then special tokens."""
    ranks = [*(bytes([byte]) for byte in range(256)), *pieces]
    return BPE("bpe", ranks, PATTERN, {name: len(ranks) + i for i, name in enumerate(specials)})


def sentencepiece_library(pairs, letters):
    """A `tokenizers.Tokenizer` in the shape of Llama 2's.

    A word has its space in front, as U+2581, and what has no token is spelled in bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*letters, *(a + b for a, b in pairs)]
    ids = {name: i for i, name in enumerate(names)}
    library = Tokenizer(
        models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    library.decoder = decoders.Sequence(
        [
            *(decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def sentencepiece(letters):
    """A tokenizer in the shape of Llama 2's, with a few tokens of `a` and `b`."""
    pairs = [("a", "b"), ("\u2581", "ab"), ("\u2581", "a")]
    library = sentencepiece_library(pairs, letters)
    return HuggingFace(library.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})
