"""From text to batches: a path names documents, a tokenizer makes them streams, steps cut rows.

corpus = prepare(cfg, tokenizer)
batches = Batches(corpus, cfg, context=1024, batch=16, seed=0)
batches.batch(step)                        # pure: the same rows whenever it is asked
for batch in prefetch(batches.batch, start=step): ...
for batch in eval_batches(corpus.val, cfg, context=1024, batch=16): ...
"""

from jaxgpt.data.batches import Batches, eval_batches, streams
from jaxgpt.data.corpus import (
    Corpus,
    DataConfig,
    prepare,
    refuse_changed,
    texts,
    token_entries,
)
from jaxgpt.data.dataset import Dataset
from jaxgpt.data.examples import examples
from jaxgpt.data.prefetch import prefetch
from jaxgpt.data.records import Reader, Record, RecordsConfig, read_splits, strings
from jaxgpt.data.tokens import TokenStream, find_entry_damage

__all__ = [
    "Batches",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Reader",
    "Record",
    "RecordsConfig",
    "TokenStream",
    "eval_batches",
    "examples",
    "find_entry_damage",
    "prefetch",
    "prepare",
    "read_splits",
    "refuse_changed",
    "streams",
    "strings",
    "texts",
    "token_entries",
]
