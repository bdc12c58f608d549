"""Exports a model as a LiteRT file (.tflite), which Android and iOS run.

`litert-converter` takes the StableHLO of `stablehlo.programs`, and needs neither TensorFlow nor
torch. The weights become constants of the file, which both of its programs share.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import InputError
from jaxgpt.model import count
from jaxgpt.paths import expand
from jaxgpt.pretrained.export import PLAIN, decoder, new_folder, write_text_files
from jaxgpt.pretrained.foreign import PROGRAMS
from jaxgpt.pretrained.stablehlo import Programs, checked_context, programs

FILE = "model.tflite"
INPUTS = ("tokens", "start", "count")
LARGEST = 2**31  # bytes: offsets in the file are signed 32-bit numbers
PLATFORM = "cuda"  # of which the programs have none of the detours for XLA on a CPU or a TPU


def to_litert(
    path: str | Path, folder: str | Path, *, adapter: str | Path = "", context: int = 0
) -> list[Path]:
    """Exports a model as `model.tflite`, with the tokenizer's files.

    The file has two signatures, `prefill` and `decode`, with inputs `tokens` int32 [1, T], `start`
    and `count` int32, and `cache_0`, `cache_1` and so on, and outputs `logits` [V] and the same
    caches, as `programs.json` describes.

    Args:
        path: The model, as for `jaxgpt.load`.
        folder: A folder that does not exist or is empty.
        adapter: A folder with a LoRA adapter in PEFT's layout to merge into the model.
        context: The positions of the KV cache; 0: the model's context length.

    Returns:
        The files.

    Raises:
        InputError: The converter is not installed, the model is not decoder-only, the context is
            too long, the weights are too large, or the folder cannot be written.
    """
    try:
        import litert_converter  # noqa: F401
    except ImportError:
        raise InputError(
            "--to litert needs LiteRT's converter: pip install 'jaxgpt[litert]'", field="to"
        ) from None
    found, params = decoder(path, adapter)
    cfg = found.config.model
    context = checked_context(cfg, context)
    size = 4 * count(cfg.build(PLAIN), padded=True)
    if size >= LARGEST:
        raise InputError(
            f"{path} has {size / 1e9:.1f} GB of weights, and a LiteRT file has at most "
            f"{LARGEST / 1e9:.1f}; use a smaller model, or another format",
            field="to",
        )
    with new_folder(expand(folder)) as draft:
        write_text_files(found, draft)
        made = programs(cfg, params(), context, (PLATFORM,))
        (draft / FILE).write_bytes(convert(made))
        (draft / PROGRAMS).write_text(json.dumps(describe(made, cfg.V), indent=2) + "\n")
    return sorted(expand(folder).iterdir())


def convert(made: Programs) -> bytes:
    """The LiteRT file of a model's programs."""
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        modules = []
        for name in made.tokens:
            module = ir.Module.parse(getattr(made, name).mlir_module())
            main = next(each for each in module.body if each.name.value == "main")
            _make_weights_constant(main, made)
            main.attributes["sym_name"] = ir.StringAttr.get(name)
            caches = cache_names(made)
            converter.set_signature(main, name, [*caches, *INPUTS], ["logits", *caches])
            modules.append(module)
        whole = converter.merge_modules(modules)
        passes, config = passmanager.PassManager(), converter.ConvertToTFLConfig()
        converter.run_convert_to_tfl_passes(whole, passes, config)
        file: bytes = converter.export_flatbuffer_to_bytes(whole.operation)
        return file


def describe(made: Programs, V: int) -> dict[str, object]:
    """What `programs.json` says: the inputs and outputs of both signatures."""
    return {
        "file": FILE,
        "signatures": {name: {"tokens": T} for name, T in made.tokens.items()},
        "inputs": {
            "tokens": "int32 [1, T], padded at the right; T is in `signatures`",
            "start": "int32: the position of the first token; the first of a text is at 0",
            "count": "int32: how many of the tokens are not padding",
            **{name: "the KV cache, at first zeros" for name in cache_names(made)},
        },
        "outputs": {
            "logits": f"float32 [{V}], of the token after these",
            **{name: "the KV cache, for the next call" for name in cache_names(made)},
        },
        "context": made.context,
        "versions": {name: version(name) for name in ("jax", "litert-converter")},
    }


def cache_names(made: Programs) -> list[str]:
    """The names of the arrays of the KV cache among the inputs and the outputs."""
    return [f"cache_{number}" for number in range(len(made.cache))]


def _make_weights_constant(main: Any, made: Programs) -> None:
    """Replaces the first arguments of a program, the weights, by constants."""
    from litert_converter.mlir import ir

    block = main.regions[0].blocks[0]
    with ir.InsertionPoint.at_block_begin(block):
        for argument, leaf in zip(block.arguments, made.weights.values(), strict=False):
            value = {"value": ir.DenseElementsAttr.get(np.asarray(leaf))}
            constant = ir.Operation.create("stablehlo.constant", [argument.type], [], value)
            argument.replace_all_uses_with(constant.result)
    for _ in made.weights:
        block.erase_argument(0)
    inputs = [argument.type for argument in block.arguments]
    outputs = main.type.results
    main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(inputs, outputs))
    if "arg_attrs" in main.attributes:
        del main.attributes["arg_attrs"]
