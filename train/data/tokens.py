"""The tokens of a corpus: one flat memory-mapped file a split, each document followed by EOS, and where each begins."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from octofold.train.data.cache import build_once, fingerprint, write_json
from octofold.train.data.documents import Documents
from octofold.train.data.tokenizer import Tokenizer

_FORMAT = 1


@dataclass(frozen=True)
class TokenSplit:
    """One split, tokenised."""

    tokens: np.ndarray
    """uint16 or uint32, by the size of the vocabulary."""
    doc_offsets: np.ndarray
    """int64 [documents + 1]: where each document begins, then the number of tokens."""
    text_bytes: int
    """Length of the documents' text in UTF-8."""


def tokenise(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each text, its EOS at the end."""
    for ids in tokenizer.encode_batch(texts):
        yield np.append(ids, tokenizer.eos_id)


def load_tokens(
    documents: Documents, tokenizer: Tokenizer, log: Callable[[str], None]
) -> tuple[TokenSplit, TokenSplit]:
    """The training and the validation split, from the cache or tokenised now.

    Raises:
        UserError: the cache cannot be written.
    """

    def build(partial: Path) -> None:
        log(f"data: tokenising with {tokenizer.kind} (vocabulary {tokenizer.vocab_size})")
        counts = {name: _write_split(documents, tokenizer, partial, name) for name in ("train", "validation")}
        write_json(partial / "meta.json", counts)

    name = f"tokens-{documents.folder.name.removeprefix('documents-')}-{fingerprint(_FORMAT, tokenizer.fingerprint)}"
    folder = build_once(documents.folder.with_name(name), build)
    text_bytes = json.loads((folder / "meta.json").read_text())
    train, validation = (
        TokenSplit(
            tokens=_map(folder / f"{name}.tokens", _dtype(tokenizer)),
            doc_offsets=_map(folder / f"{name}.offsets", np.dtype(np.int64)),
            text_bytes=text_bytes[name],
        )
        for name in ("train", "validation")
    )
    return train, validation


def _write_split(documents: Documents, tokenizer: Tokenizer, folder: Path, name: str) -> int:
    """Write one split as raw arrays; returns its bytes of text. Memory stays within a batch of documents."""
    text_bytes = end = 0
    with (folder / f"{name}.tokens").open("wb") as tokens, (folder / f"{name}.offsets").open("wb") as offsets:
        np.zeros(1, np.int64).tofile(offsets)
        for texts in documents.text_batches(validation=name == "validation"):
            ids = list(tokenise(texts, tokenizer))
            np.concatenate(ids).astype(_dtype(tokenizer)).tofile(tokens)
            ends = end + np.cumsum([len(i) for i in ids], dtype=np.int64)
            ends.tofile(offsets)
            end = ends[-1]
            text_bytes += sum(len(text.encode()) for text in texts)
    return text_bytes


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
