"""The data of a run from its configuration: tokenizer, splits and loaders."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.batch import Batch
from octofold.train.data.cache import build_once
from octofold.train.data.config import DataConfig
from octofold.train.data.corrupt import CorruptReport
from octofold.train.data.dataset import PackedDataset
from octofold.train.data.documents import Documents, load_documents
from octofold.train.data.loader import Loader, validation_batches
from octofold.train.data.stream import HubDocuments, StreamLoader, gather_validation
from octofold.train.data.tokenizer import Tokenizer, bpe_kind, load_saved_tokenizer, load_tokenizer
from octofold.train.data.tokens import TokenSplit, load_tokens

logger = logging.getLogger("octofold.data")


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on."""

    config: DataConfig
    seed: int
    tokenizer: Tokenizer
    train: PackedDataset | None
    """None for data=hub, which has no length."""
    validation: PackedDataset | None
    """None with data.validation_share=0."""
    corrupt: CorruptReport
    texts: Callable[[str], Iterator[str]]
    """The documents' text of "train" or "validation", from the start."""
    ngram_cache: Path
    """Where `ngram_baselines` keeps its result."""

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text a token (training split, else validation): nats a token ÷ this = nats a byte."""
        dataset = self.train or self.validation
        return dataset.bytes_per_token if dataset else None

    def loader(
        self,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_ranks: int,
        samples_seen: int = 0,
    ) -> Loader | StreamLoader:
        """The training batches of one data rank; arguments and errors as `Loader` and `StreamLoader` have them."""
        if self.train is None:
            return StreamLoader(
                HubDocuments(self.config, self.corrupt, validation=False),
                self.tokenizer,
                sequence_length=self.config.sequence_length,
                mask_documents=self.config.mask_documents,
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                data_rank=data_rank,
                data_ranks=data_ranks,
                samples_seen=samples_seen,
            )
        return Loader(
            self.train,
            seed=self.seed,
            shuffle=self.config.shuffle,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_rank=data_rank,
            data_ranks=data_ranks,
            workers=self.config.workers,
            samples_seen=samples_seen,
        )

    def validation_batches(
        self, *, sequences: int, micro_batch_size: int, data_rank: int, data_ranks: int
    ) -> Iterator[Batch]:
        """See `loader.validation_batches`; nothing where there is no validation split."""
        if self.validation is None:
            return iter(())
        return validation_batches(
            self.validation,
            sequences=sequences,
            micro_batch_size=micro_batch_size,
            data_rank=data_rank,
            data_ranks=data_ranks,
        )


def build_data(
    config: DataConfig,
    *,
    seed: int,
    run_dir: Path,
    validation_sequences: int = 64,
    log: Callable[[str], None] = logger.info,
) -> Data:
    """Read, split and tokenise a source, or take it from the cache; called once in each process.

    Processes may call it at the same moment: one does the work. The tokenizer is kept in `run_dir/tokenizer`; a run
    that is resumed uses the one it finds there.

    Args:
        seed: of the order of samples.
        validation_sequences: how many sequences data=hub gathers for evaluation; other sources keep all they have.
        log: told in a line what takes time.

    Raises:
        UserError: the source cannot be read, too much of it is corrupt, or a split holds no whole sequence.
    """
    if config.source == "hub":
        return _build_stream(config, seed, run_dir, validation_sequences, log)
    documents = load_documents(config, log)

    def texts(split: str) -> Iterator[str]:
        return chain.from_iterable(documents.text_batches(validation=split == "validation"))

    tokenizer = _run_tokenizer(config, run_dir, lambda: _shared_tokenizer(config, documents, texts("train"), log))
    train_tokens, validation_tokens = load_tokens(documents, tokenizer, log)
    return Data(
        config=config,
        seed=seed,
        tokenizer=tokenizer,
        train=_packed(train_tokens, config, "training"),
        validation=_packed(validation_tokens, config, "validation") if config.validation_share else None,
        corrupt=documents.corrupt,
        texts=texts,
        ngram_cache=documents.folder / "ngram.json",
    )


def _build_stream(
    config: DataConfig, seed: int, run_dir: Path, validation_sequences: int, log: Callable[[str], None]
) -> Data:
    def train_texts() -> Iterator[str]:
        return HubDocuments(config, CorruptReport(), validation=False).texts()

    tokenizer = _run_tokenizer(config, run_dir, lambda: load_tokenizer(config, train_texts()))
    validation, validation_texts = None, list[str]()
    if config.validation_share:
        log(f"data: gathering {validation_sequences} validation sequences from {config.path}")
        validation, validation_texts = gather_validation(config, tokenizer, sequences=validation_sequences)
        _check_length(validation, config, "validation")
    return Data(
        config=config,
        seed=seed,
        tokenizer=tokenizer,
        train=None,
        validation=validation,
        corrupt=CorruptReport(),
        texts=lambda split: train_texts() if split == "train" else iter(validation_texts),
        ngram_cache=run_dir / "ngram.json",
    )


def _run_tokenizer(config: DataConfig, run_dir: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of the run folder, made and saved there by the first who asks."""
    folder = build_once(run_dir / "tokenizer", lambda partial: make().save(partial))
    tokenizer = load_saved_tokenizer(folder)
    wanted = {"bytes": "bytes", "bpe": bpe_kind(config.bpe_vocab_size)}.get(config.tokenizer, "file")
    if tokenizer.kind != wanted:
        rule = f"the run in {run_dir} was begun with a tokenizer of kind {tokenizer.kind}; this asks for {wanted}"
        raise ConfigError("data.tokenizer", config.tokenizer, rule, "the run's own data.tokenizer, or another run_dir")
    return tokenizer


def _shared_tokenizer(
    config: DataConfig, documents: Documents, training_texts: Iterator[str], log: Callable[[str], None]
) -> Tokenizer:
    """`load_tokenizer`, a trained BPE being kept beside the documents that it learned from."""
    if config.tokenizer != "bpe":
        return load_tokenizer(config, training_texts)

    def build(partial: Path) -> None:
        log(f"data: training a BPE of {config.bpe_vocab_size} tokens")
        load_tokenizer(config, training_texts).save(partial)

    return load_saved_tokenizer(build_once(documents.folder / bpe_kind(config.bpe_vocab_size), build))


def _packed(split: TokenSplit, config: DataConfig, name: str) -> PackedDataset:
    dataset = PackedDataset(
        split.tokens,
        split.doc_offsets,
        sequence_length=config.sequence_length,
        mask_documents=config.mask_documents,
        text_bytes=split.text_bytes,
    )
    _check_length(dataset, config, name)
    return dataset


def _check_length(dataset: PackedDataset, config: DataConfig, name: str) -> None:
    if len(dataset):
        return
    tokens, needed = len(dataset.tokens), config.sequence_length + 1
    shown = (
        f"data.sequence_length={config.sequence_length} data.validation_share={config.validation_share}: the {name} "
        f"split holds {tokens} tokens in {len(dataset.doc_offsets) - 1} documents"
    )
    rule = f"each split holds at least one sequence of {needed} tokens"
    direction = "smaller" if name == "training" else "larger (0: no validation)"
    remedy = f"more text, a shorter data.sequence_length, or a {direction} data.validation_share"
    raise UserError(f"{shown}\n  rule:   {rule}\n  remedy: {remedy}")
