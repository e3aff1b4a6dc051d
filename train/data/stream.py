"""`data=hub`: documents streamed in order by Hugging Face `datasets`, tokenised and packed on the way.

Every rank walks the same stream and keeps its own sequences, so that packing does not depend on the ranks.
Shape suffixes: B sequences, T = S + 1 stored tokens of a sequence.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from octofold.backends.errors import UserError
from octofold.train.data.batch import Batch, make_batch
from octofold.train.data.config import DataConfig
from octofold.train.data.corrupt import CorruptReport
from octofold.train.data.dataset import PackedDataset
from octofold.train.data.loader import micro_batches_per_step
from octofold.train.data.skipping import LeftOut
from octofold.train.data.sources import accept, missing_key_reason
from octofold.train.data.split import document_key, plan_split
from octofold.train.data.tokenizer import Tokenizer
from octofold.train.data.tokens import tokenise


class HubDocuments:
    """The documents of one split of a hub dataset or local folder, pass after pass, with a position that can be saved.

    The dataset's shards are read one after another: one that breaks on its content is skipped from there and entered
    in the report. A failing connection is no corruption and stops the run, since ranks must see the same stream.
    One thing escapes: `datasets` takes a truncated .zst for a shorter one (data=jsonl notices).
    """

    def __init__(self, config: DataConfig, report: CorruptReport, *, validation: bool) -> None:
        """
        Args:
            report: takes the counts; its share rule is checked as it says, the end of a pass being the end.
            validation: read the documents held out, else the others.

        Raises:
            UserError: the dataset cannot be opened.
        """
        import datasets

        self._config, self._report, self._validation = config, report, validation
        self._split = plan_split(config.validation_share)
        try:
            self._dataset = datasets.load_dataset(config.path, name=config.subset, split=config.split, streaming=True)
        except Exception as error:  # the library raises whatever the file formats and the network raise
            raise self._error("cannot be opened", error) from error
        self._shards: int = self._dataset.num_shards
        report.files += self._shards
        self.load_state_dict({"shard": 0, "stream": None})

    def read(self) -> str | None:
        """The next document, or None at the end of a pass; the read after that begins the next pass.

        Raises:
            UserError: too much is corrupt, or the stream cannot be read.
        """
        while self._shard < self._shards:
            text = self._next_text()
            self._report.check(self._config.max_corrupt_share, final=False)
            if text:
                part = self._split.part(text, document_key(text), validation=self._validation)
                if part is not None:
                    return part
        self._report.check(self._config.max_corrupt_share, final=True)
        self._report.files += self._shards
        self.load_state_dict({"shard": 0, "stream": None})
        return None

    def texts(self) -> Iterator[str]:
        """The documents up to the end of the pass."""
        while (text := self.read()) is not None:
            yield text

    def state_dict(self) -> dict:
        """The position after the last document read (JSON)."""
        return {"shard": self._shard, "stream": self._stream.state_dict() if self._started else self._stream_start}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved position."""
        self._open(state["shard"], state["stream"])

    def _open(self, shard: int, stream_start: dict | None) -> None:
        # The library's own state says nothing until the first row is read: until then ours is where we started.
        self._shard, self._stream_start, self._started = shard, stream_start, False
        if shard < self._shards:
            self._stream = self._dataset.shard(num_shards=self._shards, index=shard)
            if stream_start is not None:
                self._stream.load_state_dict(stream_start)
            self._rows = iter(self._stream)

    def _next_text(self) -> str | None:
        """The next row's text; None if the row is bad or the shard ends, the next shard then being open."""
        import pyarrow as pa
        import zstandard

        place = f"{self._config.path} shard {self._shard}"
        try:
            row = next(self._rows, None)
        except (ValueError, EOFError, pa.ArrowException, zlib.error, zstandard.ZstdError) as error:
            self._report.bad_file(place, f"{type(error).__name__}: {error}")
            row = None
        except Exception as error:  # the library raises whatever the network raises
            raise self._error(f"stopped in shard {self._shard}", error) from error
        if row is None:
            self._open(self._shard + 1, None)
            return None
        self._started = True
        place = f"{place} record {self._report.records}"
        if self._config.text_key not in row:
            self._report.bad_record(place, missing_key_reason(self._config.text_key, list(row)))
            return None
        return accept(row[self._config.text_key], place, self._report)

    def _error(self, what: str, error: Exception) -> UserError:
        config = self._config
        return UserError(
            f"data.path={config.path} data.subset={config.subset} data.split={config.split}: {what}\n"
            f"    {type(error).__name__}: {error}\n"
            f"  rule:   data=hub streams a dataset of the Hugging Face hub or a local folder\n"
            f"  remedy: check the three keys and the connection; resume=auto continues a run that has started"
        )


class StreamLoader:
    """`Loader` for a stream: global sample g is the stream's g-th sequence, pass after pass."""

    def __init__(
        self,
        documents: HubDocuments,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        mask_documents: bool,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_ranks: int,
        samples_seen: int = 0,
    ) -> None:
        """
        Args:
            documents: the training documents, at their start.
            samples_seen: sequences to walk past; `load_state_dict` is the quick way.

        Raises:
            UserError: the batch sizes do not divide, or the stream cannot be read.
        """
        self._accumulation = micro_batches_per_step(
            global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, data_ranks=data_ranks
        )
        self._documents, self._tokenizer = documents, tokenizer
        self._sequence_length, self._mask_documents = sequence_length, mask_documents
        self._micro, self._rank, self._ranks = micro_batch_size, data_rank, data_ranks
        self._load(documents.state_dict(), tokens=[], doc_ids=[], skip=0)
        for _ in range(samples_seen):
            self._next_sequence()
        self._samples_seen = samples_seen
        self._left_out = LeftOut()
        self.samples_AB = np.empty((0, micro_batch_size), dtype=np.int64)
        """See `Loader`."""

    @property
    def samples_seen(self) -> int:
        """See `Loader`."""
        return self._samples_seen

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """See `Loader`."""
        return self._left_out.ranges

    def leave_out(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `Loader`."""
        for first, end in ranges:
            self._left_out.add(first, end)

    def origin(self, sample: int) -> dict[str, Any]:
        """Where a global sample comes from: a stream knows its place alone."""
        return {"sample": sample}

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch.

        Raises:
            UserError: the stream cannot be read, or holds no training document.
        """
        batches, samples = [], []
        for _ in range(self._accumulation):
            share = [self._next_sample() for _ in range(self._ranks * self._micro)]
            own, tokens, doc_ids = zip(*share[self._rank * self._micro : (self._rank + 1) * self._micro], strict=True)
            batches.append(make_batch(np.stack(tokens), np.stack(doc_ids), mask_documents=self._mask_documents))
            samples.append(own)
        self.samples_AB = np.array(samples, dtype=np.int64)
        return batches

    def state_dict(self) -> dict:
        """The cursor, for a checkpoint (JSON): where the stream was when the sequences now being cut were read.

        It holds less than one sequence of tokens, however long a document is.
        """
        left_out = {"left_out": [list(pair) for pair in self.left_out]} if self.left_out else {}
        return {"samples_seen": self._samples_seen, "sequences_to_skip": self._cut, **left_out, **self._refill}

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly behind the sequences that the saving loader gave out; ranks may differ.

        Raises:
            UserError: the state is that of another kind of source.
        """
        if "documents" not in state:
            raise UserError("the checkpoint's data cursor is not one of a stream; resume with the data.source it had")
        self._load(state["documents"], state["tokens"], state["doc_ids"], skip=state["sequences_to_skip"])
        self._samples_seen = state["samples_seen"]
        self._left_out = LeftOut(state.get("left_out", []))

    def close(self) -> None:
        """Nothing to stop; for symmetry with `Loader`."""

    def _load(self, position: dict, tokens: list[int], doc_ids: list[int], *, skip: int) -> None:
        self._documents.load_state_dict(position)
        self._tokens, self._doc_ids = np.array(tokens, dtype=np.int64), np.array(doc_ids, dtype=np.int64)
        self._mark()
        for _ in range(skip):
            self._next_sequence()

    def _mark(self) -> None:
        """Note the state before reading; sequences cut from here on are counted."""
        doc_ids = self._doc_ids - (self._doc_ids[0] if len(self._doc_ids) else 0)
        documents = self._documents.state_dict()
        self._refill = {"documents": documents, "tokens": self._tokens.tolist(), "doc_ids": doc_ids.tolist()}
        self._cut = 0

    def _next_sample(self) -> tuple[int, np.ndarray, np.ndarray]:
        """The next global sample that is not left out, its tokens [T] and document numbers [T]."""
        while True:
            sample, sequence = self._samples_seen, self._next_sequence()
            self._samples_seen += 1
            if sample not in self._left_out:
                return sample, *sequence

    def _next_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T] and document numbers [T] of the next sequence."""
        if len(self._tokens) <= self._sequence_length:
            self._mark()
            self._read()
        stored = self._sequence_length + 1
        sequence = self._tokens[:stored], self._doc_ids[:stored]
        # The last token stored is only a label here; it is the next sequence's first.
        self._tokens, self._doc_ids = self._tokens[stored - 1 :], self._doc_ids[stored - 1 :]
        self._cut += 1
        return sequence

    def _read(self) -> None:
        """Append whole documents until a sequence can be cut."""
        tokens, doc_ids = [self._tokens], [self._doc_ids]
        doc_id = int(self._doc_ids[-1]) if len(self._doc_ids) else -1
        waiting, ends_of_pass = len(self._tokens), 0
        while waiting <= self._sequence_length:
            text = self._documents.read()
            if text is None:
                ends_of_pass += 1
                if ends_of_pass > 1 and len(tokens) == 1:
                    raise UserError("the stream holds no training document; check data.text_key and validation_share")
                continue
            (ids,) = tokenise([text], self._tokenizer)
            doc_id += 1
            tokens.append(ids)
            doc_ids.append(np.full(len(ids), doc_id, dtype=np.int64))
            waiting += len(ids)
        self._tokens, self._doc_ids = np.concatenate(tokens), np.concatenate(doc_ids)


def gather_validation(config: DataConfig, tokenizer: Tokenizer, *, sequences: int) -> tuple[PackedDataset, list[str]]:
    """The first held-out documents of the stream: packed, enough for so many sequences if it has them, and their text.

    Walks the stream from its start, so the fewer documents are held out the longer it takes.

    Raises:
        UserError: the stream cannot be read.
    """
    wanted_tokens = sequences * config.sequence_length + 1
    texts: list[str] = []
    parts: list[np.ndarray] = []
    gathered_tokens = 0
    for text in HubDocuments(config, CorruptReport(), validation=True).texts():
        texts.append(text)
        parts.extend(tokenise([text], tokenizer))
        gathered_tokens += len(parts[-1])
        if gathered_tokens >= wanted_tokens:
            break
    dataset = PackedDataset(
        tokens=np.concatenate([np.empty(0, np.int64), *parts]),
        doc_offsets=np.cumsum([0, *map(len, parts)], dtype=np.int64),
        sequence_length=config.sequence_length,
        mask_documents=config.mask_documents,
        text_bytes=sum(len(text.encode()) for text in texts),
    )
    return dataset, texts
