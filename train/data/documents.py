"""The documents of a source kept as one Arrow file of Hugging Face `datasets`, read back memory-mapped.

Reading a source is slow (decompression, JSON) and needed more than once: to train a tokenizer, to tokenise with each
tokenizer, to count n-grams. What was corrupt is remembered beside it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from octofold.backends.errors import UserError
from octofold.train.data.cache import build_once, cache_root, fingerprint, write_json
from octofold.train.data.config import DataConfig
from octofold.train.data.corrupt import CorruptReport
from octofold.train.data.sources import list_files, read_documents
from octofold.train.data.split import Split, document_key, settle_split

_FORMAT = 1
_BATCH_CHARS = 4 * 2**20


@dataclass(frozen=True)
class Documents:
    """Every document of a source, with the rule that splits them."""

    folder: Path
    split: Split
    corrupt: CorruptReport

    def text_batches(self, *, validation: bool) -> Iterator[list[str]]:
        """The texts of one split in the source's order, in lists of some megabytes (or one larger text)."""
        from datasets import Dataset

        # Record batches were cut to size when written, so that at most one is in memory.
        for rows in Dataset.from_file(str(self.folder / "documents.arrow")).data.to_batches():
            pairs = zip(rows["text"].to_pylist(), rows["key"].to_pylist(), strict=True)
            parts = (self.split.part(text, key, validation=validation) for text, key in pairs)
            if texts := [part for part in parts if part is not None]:
                yield texts


def load_documents(config: DataConfig, log: Callable[[str], None]) -> Documents:
    """The documents of a source of files, from the cache or read now.

    The cache is keyed by each file's path, size and time of change, and by what decides how they are read.

    Raises:
        UserError: too much is corrupt, there is no text, or the cache cannot be written.
    """
    files = list_files(config)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = f"documents-{fingerprint(_FORMAT, config.source, config.text_key, config.validation_share, stats)}"

    def build(partial: Path) -> None:
        log(f"data: reading {len(files)} files ({sum(size for _, size, _ in stats) / 1e6:.1f} MB)")
        _build(config, files, partial)

    folder = build_once(cache_root(config.cache_dir) / name, build)
    meta = json.loads((folder / "meta.json").read_text())
    corrupt = CorruptReport(**meta["corrupt"])
    corrupt.log_summary()
    # The share is no part of the key: the same files may be read again under a stricter one.
    corrupt.check(config.max_corrupt_share, final=True)
    return Documents(folder, Split(**meta["split"]), corrupt)


def _build(config: DataConfig, files: list[Path], folder: Path) -> None:
    import pyarrow as pa
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    report = CorruptReport()
    keys: list[int] = []
    least, greatest = 2**63, -1
    texts: list[str] = []
    # large_string: a batch may exceed the 2 GiB that 32-bit offsets reach.
    features = Features({"text": Value("large_string"), "key": Value("int64")})
    with ArrowWriter(path=str(folder / "documents.arrow"), features=features) as writer:

        def flush() -> None:
            writer.write_table(
                pa.table({"text": pa.array(texts, pa.large_string()), "key": pa.array(keys, pa.int64())})
            )
            texts.clear()
            keys.clear()

        waiting_chars = 0
        for text in read_documents(config, files, report):
            texts.append(text)
            keys.append(document_key(text))
            least, greatest = min(least, keys[-1]), max(greatest, keys[-1])
            waiting_chars += len(text)
            if waiting_chars >= _BATCH_CHARS:
                flush()
                waiting_chars = 0
        if greatest < 0:
            raise UserError(
                f"data.source={config.source} data.path={config.path}: {len(files)} files hold no text\n"
                f"  rule:   at least one document that is not empty\n"
                f"  remedy: name other files in data.path"
            )
        flush()
        writer.finalize()
    split = settle_split(config.validation_share, least_key=least, greatest_key=greatest)
    write_json(folder / "meta.json", {"split": asdict(split), "corrupt": asdict(report)})
