"""What the command lines add to tyro: the right name for another program's option, tidy help."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

TRAINING = {
    "model.L": "layers n_layer n_layers num_layers num_hidden_layers",
    "model.D": "width dim d_model n_embd hidden_size",
    "model.N": "heads n_head n_heads num_heads num_attention_heads",
    "model.K": "kv_heads n_kv_heads num_key_value_heads",
    "model.H": "head_dim",
    "model.F": "d_ff ffn_dim intermediate_size",
    "model.T": "block_size context_length max_seq_len seq_len n_ctx",
    "tokenizer.vocab_size": "vocab_size",
    "optim.learning_rate": "lr learning_rate",
    "optim.warmup": "warmup_steps warmup_iters",
    "optim.weight_decay": "weight_decay",
    "optim.clip": "grad_clip max_grad_norm",
    "optim.name": "optimizer",
    "train.batch": "batch_size per_device_train_batch_size",
    "train.steps": "steps max_steps num_steps max_iters",
    "train.epochs": "epochs num_epochs num_train_epochs",
    "train.micro": "grad_accum gradient_accumulation_steps",
    "train.eval_every": "eval_interval eval_steps",
    "checkpoint.every": "save_steps save_every",
    "data.paths": "data dataset train_file data_dir",
    "runs": "out_dir output_dir",
    "start": "init_from pretrained model_name_or_path",
    "tune.rank": "lora_rank lora_r",
}
"""Options of `train.py`, and their names in other trainers."""

GENERATION = {
    "tokens": "max_new_tokens max_tokens max_length length n_predict",
    "temperature": "temp",
    "top_k": "topk",
    "top_p": "topp",
    "min_p": "minp",
    "system": "system_prompt",
    "beam": "num_beams beams beam_size",
    "draft": "assistant_model draft_model",
    "context": "max_model_len ctx_size n_ctx",
    "slots": "max_num_seqs parallel",
    "repetition_penalty": "repeat_penalty",
}
"""Options of `python -m jaxgpt`, and their names in other programs."""

MODULES = {
    "jaxgpt.checkpoint": "jaxgpt.training.checkpoint",
    "jaxgpt.decode": "jaxgpt.generation.decode",
    "jaxgpt.export": "jaxgpt.pretrained.export",
    "jaxgpt.guide": "jaxgpt.generation.constrained",
    "jaxgpt.loop": "jaxgpt.training.loop",
    "jaxgpt.optim": "jaxgpt.training.optim",
    "jaxgpt.parallel": "jaxgpt.sharding",
    "jaxgpt.run": "jaxgpt.training.setup",
    "jaxgpt.sampling": "jaxgpt.generation.sampling",
    "jaxgpt.step": "jaxgpt.training.step",
    "jaxgpt.telemetry": "jaxgpt.training.telemetry",
    "jaxgpt.trained": "jaxgpt.pretrained.trained",
    "jaxgpt.tune": "jaxgpt.training.finetune",
    "jaxgpt.writing": "jaxgpt.generation.stream",
}
"""Modules that have moved, for config files that were written before."""


@contextmanager
def suggest(args: Sequence[str], table: Mapping[str, str]) -> Iterator[None]:
    """Prints the right name for each option of another program, if parsing the options fails.

    Args:
        args: The command-line arguments.
        table: For each option, its names in other programs, separated by spaces.
    """
    try:
        yield
    except SystemExit as end:
        if end.code == 2:
            names = {other: ours for ours, others in table.items() for other in others.split()}
            for arg in args:
                name = arg.removeprefix("--").partition("=")[0].replace("-", "_")
                ours = names.get(name.rpartition(".")[2], name)
                if arg.startswith("--") and ours != name:
                    print(f"--{name}: use --{ours}", file=sys.stderr)
        raise


@contextmanager
def joined_help() -> Iterator[None]:
    """Joins the lines of help texts, which tyro would break where their docstrings do."""
    import docstring_parser  # tyro's parser of docstrings

    def joining(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **options: Any) -> Any:
            found = parse(*args, **options)
            for param in found.params:
                param.description = " ".join((param.description or "").split()) or None
            return found

        return parsed

    kept = {name: getattr(docstring_parser, name) for name in ("parse", "parse_from_object")}
    try:
        for name, parse in kept.items():
            setattr(docstring_parser, name, joining(parse))
        yield
    finally:
        for name, parse in kept.items():
            setattr(docstring_parser, name, parse)
