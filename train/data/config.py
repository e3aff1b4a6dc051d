"""Where text comes from, how it becomes tokens and how tokens become sequences. Torch-free."""

from dataclasses import dataclass

from octofold.backends.errors import ConfigError, unknown_name_error

SOURCES = ["stdlib", "text", "jsonl", "parquet", "hub"]


@dataclass(frozen=True)
class DataConfig:
    """The `data` group."""

    source: str = "stdlib"
    """stdlib (source text of the running Python's standard library), text, jsonl, parquet, or hub (streaming)."""
    path: str | None = None
    """text, jsonl, parquet: a file, a folder or a glob; hub: a dataset's name or local folder."""
    subset: str | None = None
    """hub: the dataset's configuration name."""
    split: str = "train"
    """hub: the split to stream."""
    text_key: str = "text"
    """jsonl, parquet, hub: the field or column that holds the text."""
    tokenizer: str = "bytes"
    """bytes; bpe (trained on this data); a tokenizer.json; or a folder that transformers' AutoTokenizer reads."""
    bpe_vocab_size: int = 8192
    sequence_length: int = 512
    """Tokens a sequence that the model sees (one more is stored, for the last label)."""
    mask_documents: bool = False
    """True: a token attends only inside its own document."""
    validation_share: float = 0.02
    """Share of documents held out, chosen by a hash of their text."""
    max_corrupt_share: float = 0.01
    """Stop when more than this share of the records (or of the files) cannot be read."""
    shuffle: bool = True
    """Random order from the seed; hub always streams in order."""
    workers: int = 0
    """Threads a rank that prepare coming steps; the order of samples does not depend on it."""
    cache_dir: str | None = None
    """Where tokenised data is kept; null: $OCTOFOLD_CACHE, else ~/.cache/octofold."""


def check(data: DataConfig) -> None:
    """Raise `ConfigError` for a source that cannot be read; looks at paths, opens nothing."""
    import glob
    import os

    if data.source not in SOURCES:
        raise unknown_name_error("data.source", data.source, SOURCES)
    if data.source != "stdlib" and not data.path:
        raise ConfigError("data.path", "null", f"data={data.source} reads from data.path", "data.path=FILE_OR_GLOB")
    if data.path and data.source in ("text", "jsonl", "parquet"):
        matches = [data.path] if os.path.exists(data.path) else glob.glob(data.path, recursive=True)
        if not matches:
            rule = f"no file matches it (looked from {os.getcwd()})"
            raise ConfigError("data.path", data.path, rule, "an existing file, folder or quoted glob")
        if unreadable := [m for m in matches if not os.access(m, os.R_OK)]:
            raise ConfigError("data.path", unreadable[0], "the file cannot be read", "change its permissions")
    is_name = data.tokenizer in ("bytes", "bpe")
    if not is_name and not os.path.exists(data.tokenizer):
        rule = "a tokenizer is bytes, bpe, a tokenizer.json, or a folder that AutoTokenizer reads"
        raise ConfigError("data.tokenizer", data.tokenizer, rule, "data.tokenizer=bytes, or an existing path")
    if data.sequence_length < 2:
        raise ConfigError("data.sequence_length", data.sequence_length, "at least 2 tokens", "data.sequence_length=512")
    for name in ("validation_share", "max_corrupt_share"):
        share = getattr(data, name)
        if not 0 <= share < 1:
            raise ConfigError(f"data.{name}", share, "a share lies in [0, 1)", f"data.{name}=0.01")
    if data.bpe_vocab_size < 257:
        rule = "a byte-level BPE begins with the 256 bytes and an end-of-text token"
        raise ConfigError("data.bpe_vocab_size", data.bpe_vocab_size, rule, "data.bpe_vocab_size=8192")
    if data.workers < 0:
        raise ConfigError("data.workers", data.workers, "a number of threads", "data.workers=0")
