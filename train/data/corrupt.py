"""Bad records and files: counted, named in the log, and a reason to stop only above a configured share."""

import logging
from dataclasses import dataclass, field

from octofold.backends.errors import UserError

logger = logging.getLogger("octofold.data")

_NAMED = 10
_EARLY_RECORDS = 1000


@dataclass
class CorruptReport:
    """What could not be read of a source.

    The share rule: bad records ÷ records read, and bad files ÷ files of the source, must each be at most the
    configured share, taken literally (one bad record of ten is 10%). It is checked when all has been read and, so
    that a hopeless source stops early, at every record from the 1000th on.
    """

    files: int = 0
    """Files of the source, bad ones included (of a stream: once a pass)."""
    bad_files: int = 0
    records: int = 0
    """Records read, bad ones included. A record is a line of jsonl, a row of parquet, a file of text."""
    bad_records: int = 0
    examples: list[str] = field(default_factory=list)
    """The first bad records and files: place and reason."""

    def bad_record(self, place: str, reason: str) -> None:
        """Count a bad record (also as a record) and name it."""
        self.records += 1
        self.bad_records += 1
        self._name(f"{place}: {reason}")

    def bad_file(self, path: str, reason: str, *, lost_records: int = 0) -> None:
        """Count a file that could not be read, or not to its end, with the records known to be lost in it."""
        self.bad_files += 1
        self.records += lost_records
        self.bad_records += lost_records
        self._name(f"{path}: {reason}")

    def check(self, max_share: float, *, final: bool) -> None:
        """Raise UserError if more than the allowed share is bad; before the end only from 1000 records on."""
        if not final and self.records < _EARLY_RECORDS:
            return
        for bad, total, what in (
            (self.bad_records, self.records, "records"),
            (self.bad_files, self.files, "files"),
        ):
            if bad > max_share * total:
                listed = "".join(f"\n    {example}" for example in self.examples)
                raise UserError(
                    f"{bad} of {total} {what} cannot be read ({bad / total:.2%}):{listed}\n"
                    f"  rule:   at most data.max_corrupt_share={max_share} of the records and of the files\n"
                    f"  remedy: mend or remove them, check data.text_key, or allow data.max_corrupt_share="
                    f"{min(0.99, round(bad / total + 0.01, 2))}"
                )

    def log_summary(self) -> None:
        """Log the counts if anything was bad."""
        if self.bad_records or self.bad_files:
            logger.warning(
                "skipped %d of %d records and could not read (all of) %d of %d files; the first: %s",
                self.bad_records,
                self.records,
                self.bad_files,
                self.files,
                "; ".join(self.examples),
            )

    def _name(self, example: str) -> None:
        if len(self.examples) < _NAMED:
            self.examples.append(example)
            logger.warning("skipped %s", example)
