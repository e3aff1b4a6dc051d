"""Tokenizers: bytes, any of the `tokenizers` library (a file, a transformers folder), and BPE trained on the spot."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.cache import write_json
from octofold.train.data.config import DataConfig

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger("octofold.data")

_META = "octofold_tokenizer.json"
_NEW_EOS = "<|endoftext|>"
_KNOWN_EOS = [_NEW_EOS, "</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "<|eos|>", "[EOS]", "[SEP]"]
_BPE_TRAINING_CHARS = 64 * 2**20
"""BPE learns from at most this much of the training text: word counts, and so memory, stay bounded."""


class Tokenizer(Protocol):
    """Text to token ids and back. Ids lie in [0, vocab_size)."""

    kind: str
    """bytes, bpe-SIZE or file."""
    vocab_size: int
    eos_id: int
    """Follows each document; never comes out of `encode`."""
    fingerprint: str
    """Equal exactly for tokenizers that encode alike."""

    def encode(self, text: str) -> np.ndarray:
        """int64 ids of a text, without special tokens; special tokens spelled in the text are plain text."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; special tokens and ids outside the vocabulary give nothing."""

    def save(self, folder: Path) -> None:
        """Write what `load_saved_tokenizer` needs into a folder, made if absent."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, then EOS."""

    kind, vocab_size, eos_id, fingerprint = "bytes", 257, 256, "bytes-1"

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _META, {"kind": self.kind})


class FileTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, inner: "tokenizers.Tokenizer", *, kind: str, eos: str | None) -> None:
        """
        Args:
            inner: taken over: padding and truncation are switched off.
            eos: its end-of-text token; None looks for a usual one and adds one if there is none.
        """
        inner.no_padding()
        inner.no_truncation()
        # A document that spells "<|endoftext|>" must not end there.
        inner.encode_special_tokens = True
        self.kind, self._inner = kind, inner
        self.eos_id = _eos_id(inner, eos)
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(f"{self.eos_id} {inner.to_str()}".encode()).hexdigest()[:32]

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(folder / "tokenizer.json"))
        write_json(folder / _META, {"kind": self.kind, "eos": self._inner.id_to_token(self.eos_id)})


def load_tokenizer(config: DataConfig, training_texts: Iterator[str]) -> Tokenizer:
    """The tokenizer that a config names.

    Args:
        training_texts: documents of the training split; read only to train BPE.

    Raises:
        UserError: it cannot be read, or needs an extra that is not installed.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        return train_bpe(training_texts, vocab_size=config.bpe_vocab_size)
    if os.path.isdir(config.tokenizer):
        return _load_auto(config.tokenizer)
    return _load_file(Path(config.tokenizer), kind="file", eos=_declared_eos(Path(config.tokenizer)))


def load_saved_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote.

    Raises:
        UserError: the folder holds none.
    """
    try:
        meta = json.loads((folder / _META).read_text())
        kind = meta["kind"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: no saved tokenizer there ({error})\n"
            f"  rule:   a run keeps its tokenizer in RUN/tokenizer\n"
            f"  remedy: name the folder of a run that has trained"
        ) from error
    return ByteTokenizer() if kind == "bytes" else _load_file(folder / "tokenizer.json", kind=kind, eos=meta["eos"])


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> FileTokenizer:
    """A byte-level BPE of `vocab_size` tokens (fewer where the text has too few pairs); the same text, the same BPE."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_NEW_EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_bounded(texts), trainer)
    return FileTokenizer(inner, kind=bpe_kind(vocab_size), eos=_NEW_EOS)


def bpe_kind(vocab_size: int) -> str:
    """`Tokenizer.kind` of a BPE trained for this size."""
    return f"bpe-{vocab_size}"


def _bounded(texts: Iterator[str]) -> Iterator[str]:
    left_chars = _BPE_TRAINING_CHARS
    for text in texts:
        yield text[:left_chars]
        left_chars -= len(text)
        if left_chars <= 0:
            logger.info("BPE learns from the first %d characters", _BPE_TRAINING_CHARS)
            return


def _load_file(path: Path, *, kind: str, eos: str | None) -> FileTokenizer:
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        rule = f"not a tokenizer.json of the tokenizers library ({error})"
        raise ConfigError("data.tokenizer", str(path), rule, "data.tokenizer=bytes, or another file") from error
    return FileTokenizer(inner, kind=kind, eos=eos)


def _load_auto(folder: str) -> FileTokenizer:
    """A folder as transformers reads it, kept as a tokenizer.json, so that a run needs transformers only once."""
    from tokenizers import Tokenizer as Inner

    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        rule = "a folder is read by transformers, which is not installed"
        remedy = f"pip install 'octofold[hf]', or data.tokenizer={os.path.join(folder, 'tokenizer.json')}"
        raise ConfigError("data.tokenizer", folder, rule, remedy) from error
    try:
        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        rule = f"transformers' AutoTokenizer cannot read it ({str(error).splitlines()[0]})"
        raise ConfigError("data.tokenizer", folder, rule, "a folder that save_pretrained wrote") from error
    backend = getattr(auto, "backend_tokenizer", None)
    if backend is None:
        rule = f"{type(auto).__name__} has no fast version, and only those are used"
        raise ConfigError("data.tokenizer", folder, rule, "convert it to a tokenizer.json")
    return FileTokenizer(Inner.from_str(backend.to_str()), kind="file", eos=auto.eos_token)


def _declared_eos(path: Path) -> str | None:
    """What the tokenizer_config.json beside a tokenizer.json names as end of text, if it is there and does."""
    config = path.with_name("tokenizer_config.json")
    if not config.exists():
        return None
    try:
        token = json.loads(config.read_text())["eos_token"]
    except KeyError:
        return None
    except (OSError, ValueError, TypeError) as error:
        rule = f"{config.name} beside it is no JSON object ({error})"
        raise ConfigError("data.tokenizer", str(path), rule, f"mend or remove {config}") from error
    return token["content"] if isinstance(token, dict) else token


def _eos_id(inner: "tokenizers.Tokenizer", declared: str | None) -> int:
    for token in [declared] if declared else _KNOWN_EOS:
        if (token_id := inner.token_to_id(token)) is not None:
            return token_id
    token = declared or _NEW_EOS
    logger.warning("the tokenizer has no end-of-text token; %s is added to its vocabulary", token)
    inner.add_special_tokens([token])
    added = inner.token_to_id(token)
    assert added is not None
    return added
