"""`python -m jaxgpt COMMAND`: what one does with a trained model, and with text."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxgpt.data import DataConfig, texts
from jaxgpt.data.records import lines_of
from jaxgpt.errors import InputError
from jaxgpt.export import to_hf, to_peft
from jaxgpt.objectives import Classify, Translate
from jaxgpt.tokenizer import TokenizerConfig, build, report
from jaxgpt.trained import Trained, load


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


def classify(
    path: tyro.conf.Positional[str],
    texts: tyro.conf.Positional[tuple[str, ...]] = (),
    file: str = "",
) -> None:
    """Say what texts are: for each a line of its label, how sure that is, and the text.

    Args:
        path: A run that was trained to classify.
        texts: The texts.
        file: A file with a text on each line; "-" is the standard input.
    """
    trained, objective = _trained(path, Classify)
    given = _given(texts, file)
    for text, p_C in zip(given, objective.predict(trained, given), strict=True):
        print(f"{objective.labels[int(p_C.argmax())]}\t{p_C.max():.4f}\t{text}")


def translate(
    path: tyro.conf.Positional[str],
    texts: tyro.conf.Positional[tuple[str, ...]] = (),
    file: str = "",
    beam: int = 5,
) -> None:
    """Translate texts, each to a line.

    Args:
        path: A run that was trained to translate.
        texts: The texts.
        file: A file with a text on each line; "-" is the standard input.
        beam: Translations kept on the way; 1: the likeliest token each time.
    """
    trained, objective = _trained(path, Translate)
    given = _given(texts, file)
    print(*objective.translate(trained, given, beam=beam), sep="\n")


def _trained(path: str, kind: type[Any]) -> tuple[Trained, Any]:
    """A model and its objective; InputError where it is not of this kind."""
    trained = load(path)
    objective = trained.config.objective
    if not isinstance(objective, kind):
        raise InputError(
            f"{path} was trained with {type(objective).__name__}, and this needs {kind.__name__}; "
            f"train one with configs/{kind.command}.py"
        )
    return trained, objective


def _given(texts: tuple[str, ...], file: str) -> list[str]:
    """The texts, and the lines of a file; InputError where there are none."""
    given = [*texts]
    if file:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as text: {error}") from None
        given += lines_of(text)
    if not given:
        raise InputError("there is no text; give some after the run, or --file")
    return given


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
    to: Literal["hf", "peft"] = "hf",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a model, or its LoRA adapter alone, in the layout of Hugging Face.

    Args:
        path: A run's folder, a checkpoint's, or whatever else `generate` takes.
        folder: A new folder.
        to: The whole model with tokenizer and card, adapters merged; or the adapter, for PEFT.
        dtype: Of the parameters in the files of a whole model.
    """
    if to == "peft" and dtype != "float32":
        raise InputError(f"dtype={dtype}: an adapter is written in float32; leave dtype out")
    for file in to_peft(path, folder) if to == "peft" else to_hf(path, folder, dtype=dtype):
        print(f"{file.stat().st_size:>16,} bytes  {file}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "classify": classify,
    "translate": translate,
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
