"""The commands of `python -m jaxgpt`: generate, chat, serve, classify, translate, export and
more."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import tyro

from jaxgpt import __version__, config, diagnosis, strict_json, synonyms, terminal
from jaxgpt.accelerators import check_device
from jaxgpt.data import DataConfig, texts
from jaxgpt.data.tables import lines_of
from jaxgpt.data.textfile import TextFile
from jaxgpt.display import printable
from jaxgpt.errors import InputError
from jaxgpt.evaluation.config import EvaluationConfig
from jaxgpt.evaluation.inspect import inspect_prompt
from jaxgpt.evaluation.judge import (
    ServerJudge,
    answer_records,
    judge_examples,
    model_judge,
    summary,
)
from jaxgpt.evaluation.measure import Evaluator, mean_centered, spread, table
from jaxgpt.evaluation.report import write_report
from jaxgpt.generation.config import TEMPERATURE, GenerationConfig
from jaxgpt.generation.sampling import NEUTRAL
from jaxgpt.objectives import Classify, Translate
from jaxgpt.paths import expand, is_url, keep_compiled_programs, regular_file
from jaxgpt.pretrained import generation
from jaxgpt.pretrained.export import to_hf, to_peft
from jaxgpt.pretrained.gguf_export import to_gguf
from jaxgpt.pretrained.litert import to_litert
from jaxgpt.pretrained.load import check_exists, load
from jaxgpt.pretrained.push import Target
from jaxgpt.pretrained.stablehlo import to_stablehlo
from jaxgpt.pretrained.trained import Dtype, Trained
from jaxgpt.serve import ServeConfig
from jaxgpt.serve import run as run_server
from jaxgpt.signals import Signals, python_handlers
from jaxgpt.tokenizer import TokenizerConfig, build
from jaxgpt.tokenizer import report as report_tokenizer
from jaxgpt.training import runs
from jaxgpt.training.checkpoint import fetch_records
from jaxgpt.training.command import main as train_main
from jaxgpt.training.estimate import from_command_line as predict
from jaxgpt.training.estimate import own_options_first
from jaxgpt.training.estimate import report as prediction
from jaxgpt.training.sweep import sweep as run_sweep
from jaxgpt.training.tasks import read_tasks


@dataclass(frozen=True)
class Options(GenerationConfig):
    """The options of `generate` and `chat`: those of generation, and how to load the model."""

    stop: tuple[str, ...] = ()
    """Stop strings: the text ends before the first of them."""
    choices: tuple[str, ...] = ()
    """Constrained decoding: the text is one of these strings."""
    schema: str = ""  # type: ignore[assignment]  # the file of the JSON schema
    """Constrained decoding: a file with a JSON schema, which the text, as JSON, fits."""
    draft: str = ""
    """The draft model of speculative decoding: a smaller model with the same tokenizer. It does not
    change the text, only the speed."""
    adapter: str = ""
    """A folder with a LoRA adapter in PEFT's format, to fold into the model."""
    dtype: Dtype = "float32"
    """The format of the weights: bfloat16 takes half the memory of float32; int8 a quarter, and is
    faster, with nearly the same results; int4 an eighth for the blocks (embeddings are int8), with
    results that are a little worse."""

    def load(self, path: str) -> tuple[Trained, GenerationConfig]:
        """The model at `path`, and how it generates."""
        trained = _ready(path, self.adapter, self.dtype)
        own = {field.name: getattr(self, field.name) for field in fields(GenerationConfig)}
        own["schema"] = _json(self.schema) if self.schema else None
        own["draft"] = load(self.draft, dtype=self.dtype) if self.draft else None
        if self.beam == 1:
            defaults = {**NEUTRAL, "temperature": TEMPERATURE}
            for line in generation.notes(trained.generation_config, self, defaults):
                print(line, file=sys.stderr)
        return trained, GenerationConfig(**own)


Flat = Annotated[Options, tyro.conf.arg(name="")]


def generate(
    path: tyro.conf.Positional[str],
    prompt: tyro.conf.Positional[str] = "",
    tokens: int = 200,
    options: Flat = Options(),
) -> None:
    """Generate text from a prompt.

    Args:
        path: A run (RUN@best for its best checkpoint), a Hugging Face folder or name, or a GGUF
            file.
        prompt: The text to continue.
        tokens: The most tokens to generate; the text may end earlier.
        options: How to generate.
    """
    trained, how = options.load(path)
    _, stopped = terminal.say(lambda: trained.stream(prompt, tokens, **vars(how)), before=prompt)
    if stopped:
        raise KeyboardInterrupt


def chat(
    path: tyro.conf.Positional[str],
    system: str = "",
    tokens: int = 512,
    options: Flat = Options(),
) -> None:
    """Chat with a model. A model without a chat format continues your text instead.

    Args:
        path: A run (RUN@best for its best checkpoint), a Hugging Face folder or name, or a GGUF
            file.
        system: The system message.
        tokens: The most tokens of an answer.
        options: How to generate.
    """
    trained, how = options.load(path)
    conversation = terminal.Conversation(trained, system, tokens, how)
    with python_handlers():  # Ctrl-C at the prompt does not end the conversation
        terminal.converse(conversation)


def serve(
    path: tyro.conf.Positional[str],
    options: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig(),  # noqa: B008
) -> None:
    """Serve a model with an OpenAI-compatible API and a chat page.

    Args:
        path: A run (RUN@best for its best checkpoint), a Hugging Face folder or name, or a GGUF
            file.
        options: The address, and the limits.
    """
    check_exists(path)
    _start_devices()
    with python_handlers():  # the server handles signals itself
        run_server(path, options)


def _ready(path: str, adapter: str = "", dtype: Dtype = "float32") -> Trained:
    """The model; and compiled programs are cached from now on."""
    _start_devices()
    return load(path, adapter, dtype=dtype)


def _start_devices() -> None:
    """Starts JAX, and warns if it does not use the accelerators of this machine."""
    keep_compiled_programs()
    check_device()


def _json(path: str) -> dict[str, Any]:
    try:
        found = strict_json.loads(regular_file(expand(path)).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}; a schema is an object")
    return found


def classify(
    path: tyro.conf.Positional[str],
    texts: tyro.conf.Positional[tuple[str, ...]] = (),
    file: str = "",
) -> None:
    """Classify texts: prints a line with label, probability and text for each.

    Args:
        path: A run that was trained with configs/classify.py.
        texts: The texts.
        file: A file with a text on each line; "-" is the standard input.
    """
    trained, objective = _trained(path, Classify)
    given = _given(texts, file)
    for text, p_C in zip(given, objective.predict(trained, given), strict=True):
        label = printable(objective.labels[int(p_C.argmax())])
        print(f"{label}\t{p_C.max():.4f}\t{text}")


def translate(
    path: tyro.conf.Positional[str],
    texts: tyro.conf.Positional[tuple[str, ...]] = (),
    file: str = "",
    beam: int = 5,
) -> None:
    """Translate texts: prints a line for each.

    Args:
        path: A run that was trained with configs/translate.py.
        texts: The texts.
        file: A file with a text on each line; "-" is the standard input.
        beam: The beam width; 1: greedy decoding.
    """
    trained, objective = _trained(path, Translate)
    given = _given(texts, file)
    found = objective.translate(trained, given, beam=beam)
    print(*map(printable, found), sep="\n")


def _trained(path: str, kind: type[Any]) -> tuple[Trained, Any]:
    """A model and its objective. Raises InputError if it was trained with another one."""
    trained = _ready(path)
    objective = trained.config.objective
    if not isinstance(objective, kind):
        raise InputError(
            f"{path} was trained with {type(objective).__name__}, and this needs {kind.__name__}; "
            f"train one with configs/{kind.command}.py"
        )
    return trained, objective


def _given(texts: tuple[str, ...], file: str) -> list[str]:
    """The texts and the lines of a file. Raises InputError if there are none."""
    given = [*texts]
    if file:
        try:
            text = sys.stdin.read() if file == "-" else "".join(TextFile(str(expand(file))))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as text: {error}") from None
        given += lines_of(text.removeprefix("\ufeff"))
    if not given:
        raise InputError("there is no text; pass texts after the run, or --file")
    return given


def tokenize(
    paths: tyro.conf.Positional[tuple[str, ...]] = ("python",),
    fields: tuple[str, ...] = (),
    encoding: str = "utf-8",
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = TokenizerConfig(),  # noqa: B008
) -> None:
    """Report the compression and the speed of a tokenizer on some text.

    Args:
        paths: Files, folders, globs, 'tfds:NAME', or 'python' for the standard library.
        fields: text=COLUMN names the field with the text in JSON lines, parquet or CSV
            (data.fields).
        encoding: The encoding of files without a byte order mark (data.encoding).
        tokenizer: The tokenizer to report on.
    """
    cfg = DataConfig(paths=paths, fields=fields, encoding=encoding)
    cfg.check()
    print(report_tokenizer(build(tokenizer, texts(cfg, held_out=True)), texts(cfg, held_out=True)))


GGUFDtype = Literal[
    "float32", "bfloat16", "float16", "f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"
]
EXPORTS: dict[str, tuple[str, ...]] = {
    "hf": ("float32", "bfloat16", "float16"),
    "peft": ("float32",),
    "gguf": get_args(GGUFDtype),
    "stablehlo": ("float32", "bfloat16", "int8"),
    "litert": ("float32",),
}
"""The formats of `export`, and the dtypes of weights that each can have."""


def export(
    path: tyro.conf.Positional[str],
    folder: tyro.conf.Positional[str],
    to: Literal["hf", "peft", "gguf", "stablehlo", "litert"] = "hf",
    dtype: GGUFDtype | Literal["int8"] = "float32",
    adapter: str = "",
    base: str = "",
    context: int = 0,
    license: str = "",
    push: str = "",
    private: bool = False,
) -> None:
    """Export a model, or only its LoRA adapter, in another format.

    Args:
        path: A run, a checkpoint, or any other model that `generate` takes.
        folder: The folder to create; gguf: the file to create, such as model.gguf.
        to: hf: the whole model for transformers, with tokenizer and model card; peft: only the LoRA
            adapter, for PEFT; gguf: a file for llama.cpp, and a Modelfile for Ollama; stablehlo:
            programs for prefill and decoding that run with jax alone on CPU, GPU and TPU, with
            weights and tokenizer; litert: a file for Android and iOS.
        dtype: The dtype of the weights. hf: float32, bfloat16, float16; gguf: these, also as f32,
            bf16 and f16, and q8_0, q5_1, q5_0, q4_1 and q4_0, which are 8 to 4 bits in blocks of 32
            weights; stablehlo: float32, bfloat16, int8; peft, litert: float32.
        adapter: A folder with a LoRA adapter in PEFT's format, to fold into the model.
        base: peft: the model that the adapter belongs to, a Hugging Face folder or name; by default
            the model that the run started from.
        context: stablehlo, litert: the positions of the KV cache; 0: the model's context length.
        license: hf, peft: the license's identifier for the model card, such as apache-2.0.
        push: hf, peft: OWNER/NAME on the Hugging Face hub, to which the folder is uploaded too. It
            needs a token with write access, in HF_TOKEN or from `hf auth login`.
        private: push: whether a new repository is private.
    """
    expand(folder)  # raises for a URL
    check_exists(path)
    if dtype not in EXPORTS[to]:
        raise InputError(f"dtype={dtype}: --to {to} has {', '.join(EXPORTS[to])}; use one of them")
    if to == "peft" and adapter:
        raise InputError(f"adapter={adapter} is for whole models, which merge it; remove it")
    if to != "peft" and base:
        raise InputError(f"base={base} is for --to peft: a whole model has no base; remove it")
    if to not in ("stablehlo", "litert") and context:
        raise InputError(f"context={context} is for --to stablehlo and litert; remove it")
    for name, value in (("license", license), ("push", push)):
        if value and to not in ("hf", "peft"):
            raise InputError(f"{name}={value} is for --to hf and peft; remove it")
    if private and not push:
        raise InputError("private is for --push OWNER/NAME; set both, or remove --private")
    target = Target(push, private) if push else None  # raises before the files are written
    if to == "peft":
        files = to_peft(path, folder, base, license=license, name=push)
    elif to == "hf":
        files = to_hf(path, folder, adapter=adapter, dtype=dtype, license=license, name=push)
    elif to == "gguf":
        files = to_gguf(path, folder, adapter=adapter, dtype=dtype)
    elif to == "litert":
        files = to_litert(path, folder, adapter=adapter, context=context)
    else:
        kind = cast(Dtype, dtype)
        files = to_stablehlo(path, folder, adapter=adapter, dtype=kind, context=context)
    for file in files:
        print(f"{file.stat().st_size:>16,} bytes  {file}")
    if target:
        print(f"\nuploaded to {target.upload(expand(folder))}")


def verify(path: tyro.conf.Positional[str]) -> int:
    """Verify the hashes of all files of a run; the exit status is 1 if any is damaged.

    Args:
        path: A run's folder (checkpoints, cached tokens, metrics), a checkpoint, or an export.
    """
    began = time.perf_counter()
    found = runs.verify(path)
    print(runs.show_verified(found, time.perf_counter() - began))
    return int(any(one.damage for one in found))


def list_runs(folder: tyro.conf.Positional[str] = "runs", verify: bool = True) -> None:
    """List the runs in a folder with their steps, losses, sizes and damaged files.

    Args:
        folder: The folder of runs.
        verify: Verify the hashes of all checkpoints, which takes about a second per GB.
    """
    print(runs.show_runs(runs.list_runs(folder, verify)))


def evaluate(
    path: tyro.conf.Positional[str],
    tasks: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    shots: int | None = None,
    limit: int = 0,
    seeds: tuple[int, ...] = (0,),
    chat: bool = False,
    json_file: Annotated[str, tyro.conf.arg(name="json")] = "",
    details: str = "",
    lm_eval: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    adapter: str = "",
    dtype: Dtype = "float32",
) -> None:
    """Measure a model on tasks, and print a table with standard errors.

    Args:
        path: A run (RUN@best for its best checkpoint), a Hugging Face folder or name, or a GGUF
            file.
        tasks: Tasks by name: python, a suite from the standard library, which is the default; core,
            DCLM's CORE; gsm8k, grade school math (these two are downloaded). Or task files (JSON
            Lines), or folders of evaluation bundles in CORE's format.
        shots: The number of solved examples in each prompt; by default as the task says.
        limit: The most examples of each task; 0: all.
        seeds: Seeds with which solved examples are drawn; with several, the table has the means and
            the standard deviations over seeds.
        chat: Whether queries and answers are messages of a conversation in the model's chat format,
            as a chat model was trained on them.
        json_file: A file to write the results to, as JSON.
        details: A file to write what was measured for each example to, as JSON Lines.
        lm_eval: Tasks of lm-evaluation-harness instead, by name or as YAML files. It needs
            `pip install 'jaxgpt[eval]'`, and downloads the data of its tasks.
        adapter: A folder with a LoRA adapter in PEFT's format, to fold into the model.
        dtype: The format of the weights.
    """
    for file in (json_file, details):
        expand(file)  # raises for a URL
    if lm_eval:
        given = {"tasks": tasks, "details": details, "seeds": seeds != (0,)}
        if wrong := [name for name, value in given.items() if value]:
            raise InputError(f"{wrong[0]} is not for lm_eval's tasks; remove it", field=wrong[0])
        trained = _ready(path, adapter, dtype)
        _evaluate_with_harness(trained, lm_eval, shots, limit, chat, json_file)
        return
    chosen = read_tasks(EvaluationConfig(tasks or ("python",), -1 if shots is None else shots))
    trained = _ready(path, adapter, dtype)
    results = []
    for task in chosen:
        with terminal.clock(f"evaluating on {task.name}"):
            measured = [
                Evaluator(trained, seed=seed, limit=limit, chat=chat).measure(task)
                for seed in (seeds if task.shots and not task.fixed else seeds[:1])
            ]
        results.append(spread(measured) if len(measured) > 1 else measured[0])
    print(table(results))
    if len(results) > 1 and (score := mean_centered(results)):
        print(f"\nmean of the centered scores: {score.value:.4f} ± {score.error:.4f}")
    if json_file:
        listed = [{**result.as_json(), "model": trained.origin} for result in results]
        _write_text(json_file, json.dumps(listed, indent=2))
    if details:
        lines = [
            json.dumps({"task": result.task.name, **one})
            for result in results
            for one in result.details
        ]
        _write_text(details, "\n".join(lines))


def sweep(
    path: tyro.conf.Positional[str],
    options: tyro.conf.Positional[tuple[str, ...]] = (),
    values: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = (),
    seeds: tuple[int, ...] = (),
    name: str = "",
) -> int:
    """Train with several values of some options, and compare the validation losses.

    Args:
        path: A config file.
        options: After --, options of train.py for all runs: -- --train.steps 200.
        values: An option of train.py and its values: --values optim.learning_rate 1e-3 3e-3. Given
            several times, every combination is trained.
        seeds: Random seeds; each combination is trained with all of them, and the table has the
            mean and the standard deviation. By default the seed of the config.
        name: The name of the sweep, which is its folder under `runs`; by default the config's name
            with -sweep. Repeating the command skips what is finished and resumes the rest.
    """
    keep_compiled_programs()
    return run_sweep(path, values, seeds, options, name)


def estimate(
    path: tyro.conf.Positional[str],
    options: tyro.conf.Positional[tuple[str, ...]] = (),
    device: str = "here",
    price: float = 0.0,
    quick: bool = False,
    format: Literal["text", "json"] = "text",
) -> int:
    """Predict memory, speed, time and cost of a run before it starts, on any machine.

    It compiles the real training step for the device and prints what it needs, whether it fits and
    which options make it fit. Options of train.py follow the config: --train.micro 4.

    Args:
        path: A config file.
        options: Options of train.py.
        device: v5e-1, v5e-8, v5e-256, v6e-1, v5p-8 (4 chips), h100, h200, a100, l4, rtx4090, or
            several, such as h100-8; cpu; here: the devices of this machine. TPUs need `pip install
            libtpu` at the version that an error names, and no TPU.
        price: What a device costs per hour, in any currency, for the cost of the run; 0: no cost.
        quick: Trace the step and do not compile it, which takes seconds instead of minutes; its
            memory is then less exact.
        format: text for people, or json.
    """
    found = predict(path, options, device, price, quick)
    print(json.dumps(found.as_json(), indent=2) if format == "json" else prediction(found))
    return int(not found.memory.fits)


def _evaluate_with_harness(
    trained: Trained,
    tasks: tuple[str, ...],
    shots: int | None,
    limit: int,
    chat: bool,
    json_file: str,
) -> None:
    try:
        from jaxgpt.evaluation import harness
    except ImportError:
        raise InputError(
            "lm_eval needs lm-evaluation-harness: pip install 'jaxgpt[eval]'", field="lm_eval"
        ) from None
    results = harness.measure(trained, tasks, shots=shots, limit=limit, chat=chat)
    print(harness.table(results))
    if json_file:
        _write_text(json_file, json.dumps(results["results"], indent=2, default=str))


def judge(
    path: tyro.conf.Positional[str],
    records: str,
    judge: str,
    judge_model: str = "",
    limit: int = 0,
    tokens: int = 256,
    parallel: int = 4,
    timeout: float = 60.0,
    output: str = "",
    adapter: str = "",
    dtype: Dtype = "float32",
) -> int:
    """Let another model score a model's answers from 0 to 100, and print the mean score.

    Args:
        path: The model whose answers are scored: a run (RUN@best for its best checkpoint), a
            Hugging Face folder, or a Hugging Face name.
        records: A file of instructions with reference answers, or of conversations.
        judge: The judge: another model, or the address of an OpenAI-compatible API, such as
            https://api.openai.com/v1; its key is read from OPENAI_API_KEY.
        judge_model: The name of the judge's model at that address.
        limit: The most records; 0: all.
        tokens: The most tokens of an answer.
        parallel: How many requests to send to a server at the same time.
        timeout: The most seconds to wait for a reply of a server.
        output: A file to write each answer to, with the judge's reply and the score, as JSON Lines.
        adapter: A folder with a LoRA adapter in PEFT's format, to fold into the model.
        dtype: The format of the weights.
    """
    is_server = judge.startswith(("http://", "https://"))
    if not is_server:
        check_exists(judge)
    server = ServerJudge(judge, judge_model, timeout, parallel) if is_server else None
    with terminal.clock("the model answers"):
        examples = answer_records(_ready(path, adapter, dtype), records, tokens, limit)
    ask = server or model_judge(_ready(judge, dtype=dtype))
    judged = []
    try:
        with terminal.clock("the judge scores"):
            for example in judge_examples(examples, ask):
                judged.append(example)
    finally:  # what there is, also if the server ends in the middle
        if output:
            _write_text(output, "\n".join(json.dumps(vars(example)) for example in judged))
    print(summary(judged))
    return int(all(example.score is None for example in judged))


def _write_text(path: str, text: str) -> None:
    try:
        expand(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def report(
    folders: tyro.conf.Positional[tuple[str, ...]],
    price: float = 0.0,
    output: str = "",
) -> None:
    """Write a report on a run, or one that compares several: report.html and report.md.

    Args:
        folders: The folders or the URLs of runs.
        price: What a device costs per hour, in any currency, for the cost of the runs; 0: no cost.
        output: The folder to write to; by default that of the run, or of several runs the folder
            that holds the first one. Of runs at URLs it has to be given.
    """
    if not folders:
        raise InputError("there is no run; pass the folder of one or more, such as runs/default")
    if not output and (urls := [folder for folder in folders if is_url(folder)]):
        raise InputError(f"{urls[0]} is read only; set --output to a folder for the report")
    if output:
        expand(output)  # raises for a URL
    paths = [fetch_records(each) if is_url(each) else expand(each) for each in folders]
    own = paths[0] if len(paths) == 1 else paths[0].resolve().parent
    print(write_report(paths, expand(output) if output else own, price))


def inspect(
    path: tyro.conf.Positional[str],
    prompt: tyro.conf.Positional[str],
    top: int = 5,
    output: str = "",
    adapter: str = "",
    dtype: Dtype = "float32",
) -> None:
    """Look inside a model: its attention weights and its likely next tokens for a prompt.

    Args:
        path: A run (RUN@best for its best checkpoint), a Hugging Face folder or name, or a GGUF
            file.
        prompt: The prompt.
        top: How many of the most likely next tokens to show.
        output: A folder to draw pictures into, attention.png and next_tokens.png; by default there
            are none.
        adapter: A folder with a LoRA adapter in PEFT's format, to fold into the model.
        dtype: The format of the weights.
    """
    found = inspect_prompt(_ready(path, adapter, dtype), prompt, top)
    print(found.table())
    if output:
        print(*found.draw(expand(output), Path(path).name), sep="\n")


def train(options: tyro.conf.Positional[tuple[str, ...]] = ()) -> int:
    """Train: a config, by name or as a file, and options; `train --help` explains them.

    Args:
        options: A config file, or the name of one that comes with jaxgpt, and any field of it as
            --a.b value; by default the config default.
    """
    return train_main([*options])


def new(name: tyro.conf.Positional[str], like: str = "default") -> None:
    """Write a config file to start from, a copy of one that comes with jaxgpt.

    Args:
        name: The name of the new config, which is also that of its run; NAME.py is written.
        like: The config to copy: its name, or a file.
    """
    target = expand(name if name.endswith(".py") else f"{name}.py")
    source = config.find_file(like)
    if not source.is_file():
        known = ", ".join(sorted(file.stem for file in config.CONFIGS.glob("*.py")))
        raise InputError(f"like={like}: there is no such config; use a file, or one of {known}")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise InputError(f"{target} exists; choose another name, or remove it") from None
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    print(f"{target} is a copy of {source.stem}; edit it, and train it:  jaxgpt train {target}")


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "tcsh"]]) -> None:
    """Print a script that completes commands and options in a shell.

    For bash: `jaxgpt completion bash > ~/.local/share/bash-completion/completions/jaxgpt`.

    Args:
        shell: The shell.
    """
    _parse(["--tyro-print-completion", shell], prog=PROGRAM)


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "new": new,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "classify": classify,
    "translate": translate,
    "tokenize": tokenize,
    "eval": evaluate,
    "sweep": sweep,
    "estimate": estimate,
    "judge": judge,
    "report": report,
    "inspect": inspect,
    "export": export,
    "verify": verify,
    "runs": list_runs,
    "doctor": diagnosis.run,
    "completion": completion,
}
PROGRAM = "jaxgpt"
"""The console command."""


def _parse(args: list[str], prog: str) -> Any:
    """Runs the command of some arguments, and returns what it returns."""
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog=prog, args=args, use_underscores=True
    )


def main(args: list[str]) -> int:
    """Runs a command; returns the exit status."""
    if args[:1] == ["train"]:
        return train_main(args[1:])
    if args == ["--version"]:
        print(f"jaxgpt {__version__}")
        return 0
    args = own_options_first(args) if args[:1] == ["estimate"] else args
    prog = PROGRAM if Path(sys.argv[0]).stem == PROGRAM else "python -m jaxgpt"
    try:
        try:
            suggest = synonyms.suggest(args, synonyms.GENERATION)
            with Signals(), synonyms.joined_help(), suggest:
                status = _parse(args, prog)
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is not None:  # of another file than the output
            raise
        # Nothing more can be written, also when Python flushes the output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has left, as `| head` does
            return 128 + signal.SIGPIPE
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return status or 0
