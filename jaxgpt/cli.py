"""`python -m jaxgpt COMMAND`: what one does with a trained model, and with text."""

import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

from jaxgpt.data import DataConfig, texts
from jaxgpt.errors import InputError
from jaxgpt.export import to_hf
from jaxgpt.tokenizer import TokenizerConfig, build, report
from jaxgpt.trained import load


def generate(
    path: tyro.conf.Positional[str],
    prompt: tyro.conf.Positional[str],
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> None:
    """Write on from a prompt.

    Args:
        path: A run's folder, a checkpoint's, a folder of Hugging Face's layout, or a name there.
        prompt: The text to go on from.
        tokens: How many tokens to write.
        temperature: 0 takes the likeliest token; 1 draws as the model says.
        top_k: Draw among so many of the likeliest; 0: among all.
        seed: Another seed, another text.
    """
    print(load(path)(prompt, tokens, temperature=temperature, top_k=top_k, seed=seed))


def tokenize(
    paths: tyro.conf.Positional[tuple[str, ...]] = ("python",),
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = TokenizerConfig(),  # noqa: B008
) -> None:
    """Report how small and how fast a tokenizer makes a text.

    Args:
        paths: Files, folders, globs, 'tfds:NAME', or 'python' for the standard library.
        tokenizer: The tokenizer to report on.
    """
    cfg = DataConfig(paths=paths)
    print(report(build(tokenizer, texts(cfg, held_out=True)), texts(cfg, held_out=True)))


def export(
    path: tyro.conf.Positional[str],
    folder: tyro.conf.Positional[str],
    to: Literal["hf"] = "hf",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a model in the layout of Hugging Face, which transformers and others load.

    Args:
        path: A run's folder, a checkpoint's, or whatever else `generate` takes.
        folder: A new folder.
        to: The layout: config.json, safetensors, tokenizer files, a model card.
        dtype: Of the parameters in the files.
    """
    for file in to_hf(path, folder, dtype=dtype):
        print(f"{file.stat().st_size:>16,} bytes  {file}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "tokenize": tokenize,
    "export": export,
}


def main(args: list[str]) -> int:
    """Runs a command; returns the exit status."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m jaxgpt", args=args, use_underscores=True
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
