"""Readers: every file source, what is corrupt in them, and the split."""

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.config import DataConfig, check
from octofold.train.data.corrupt import CorruptReport
from octofold.train.data.sources import list_files, read_documents
from octofold.train.data.split import document_key, plan_split, settle_split


def read(max_corrupt_share=0.99, **config):
    """The documents and the report."""
    data = DataConfig(max_corrupt_share=max_corrupt_share, **config)
    report = CorruptReport()
    return list(read_documents(data, list_files(data), report)), report


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_stdlib_holds_its_modules_and_no_tests():
    files = list_files(DataConfig())
    names = {file.name for file in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not {"site-packages", "test", "idle_test"} & {part for file in files for part in file.parts}
    assert files == sorted(files)
    report = CorruptReport()
    documents = read_documents(DataConfig(), files[:20], report)
    assert all("\x00" not in text for text in documents)
    assert (report.records, report.bad_records) == (20, 0)


def test_text_file_folder_glob_and_compression(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "h.txt").write_text("hidden")
    (folder / "a.txt").write_text("Äpfel\r\n")
    (folder / "b.md.gz").write_bytes(gzip.compress(b"zipped"))
    (folder / "c.txt.zst").write_bytes(zstandard.compress(b"zst") + zstandard.compress(b"andard"))
    (folder / "deep" / "d.py").write_text("deep")
    (folder / "empty.txt").write_text("")
    assert read(source="text", path=str(folder / "a.txt"))[0] == ["Äpfel\r\n"]
    documents, report = read(source="text", path=str(folder))
    assert documents == ["Äpfel\r\n", "zipped", "zstandard", "deep"]
    assert (report.files, report.records, report.bad_records) == (5, 5, 0)
    assert read(source="text", path=str(folder / "*.zst"))[0] == ["zstandard"]
    assert read(source="text", path=str(folder / "**" / "*.py"))[0] == ["deep"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(lines({"body": "three"}, {"body": ""})))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(
        pack(b"\xef\xbb\xbf" + lines({"body": "one", "n": 1}) + b"\n" + lines({"body": "two"}))
    )
    (tmp_path / "notes.txt").write_text("not read")
    documents, report = read(source="jsonl", path=str(tmp_path), text_key="body")
    assert documents == ["one", "two", "three"]
    assert (report.files, report.records, report.bad_records) == (2, 4, 0)


def test_parquet(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    pq.write_table(pa.table({"text": texts[:600], "n": range(600)}), tmp_path / "a.parquet", row_group_size=100)
    pq.write_table(pa.table({"text": texts[600:], "n": range(400)}), tmp_path / "b.parquet")
    documents, report = read(source="parquet", path=str(tmp_path))
    assert documents == texts
    assert (report.files, report.records) == (2, 1000)


def test_nothing_matches(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="found no file"):
        list_files(DataConfig(source="jsonl", path=str(tmp_path)))


def test_corrupt_lines_are_counted_and_named(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    bad = [
        (b'{"text": "cut', "JSONDecodeError"),
        (b'{"other": 1, "more": 2}', "no field 'text' (data.text_key); it has: other, more"),
        (b'{"text": 5}', "not a string but int"),
        (b'{"text": null}', "not a string but NoneType"),
        (b'{"text": "\xff\xfe"}', "UnicodeDecodeError"),
        (b'{"text": "\\ud800"}', "UnicodeEncodeError"),
        (b'["text"]', "not a JSON object"),
        (b"[" * 100_000, "RecursionError"),
    ]
    content = b"".join(lines({"text": f"good {i}"}) + line + b"\n" for i, (line, _) in enumerate(bad))
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "octofold.data"):
        documents, report = read(source="jsonl", path=str(file))
    assert documents == [f"good {i}" for i in range(len(bad))]
    assert (report.records, report.bad_records, report.bad_files) == (2 * len(bad), len(bad), 0)
    for number, (_, reason) in enumerate(bad):
        assert f"{file}:{2 * number + 2}: {reason}" in caplog.text


def test_only_ten_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"x\n" * 30 + lines({"text": "good"}))
    _, report = read(source="jsonl", path=str(file))
    assert (report.bad_records, len(report.examples)) == (30, 10)


def test_corrupt_text_files(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-12])
    (tmp_path / "d.txt.zst").write_bytes(b"")
    documents, report = read(source="text", path=str(tmp_path))
    assert documents == ["good"]
    assert (report.files, report.bad_files, report.records, report.bad_records) == (4, 2, 4, 3)
    for name in ("b.txt", "c.txt.gz", "d.txt.zst"):
        assert str(tmp_path / name) in caplog.text


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncated_shard_keeps_what_was_read(tmp_path, suffix, pack):
    import random

    texts = [random.Random(i).randbytes(30).hex() for i in range(20_000)]
    whole = pack(lines(*({"text": text} for text in texts)))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "after"}))
    documents, report = read(source="jsonl", path=str(tmp_path))
    assert 1000 < len(documents) < 20_000
    assert documents[:-1] == texts[: len(documents) - 1]
    assert documents[-1] == "after"
    assert report.bad_files == 1
    assert f"{file}: OSError: Truncated" in report.examples[0]


def test_corrupt_parquet(tmp_path, caplog):
    table = pa.table({"text": [f"document {i}" for i in range(300)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="none", write_page_checksum=True)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0)
    content[group.data_page_offset : group.data_page_offset + 8] = b"\xff" * 8
    (tmp_path / "a.parquet").write_bytes(content)
    (tmp_path / "b.parquet").write_bytes(bytes(content[:500]))
    pq.write_table(pa.table({"body": ["x", "y"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": ["good", None]}), tmp_path / "d.parquet")
    undecodable = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": undecodable}), tmp_path / "e.parquet")
    documents, report = read(source="parquet", path=str(tmp_path))
    assert documents == [f"document {i}" for i in [*range(100), *range(200, 300)]] + ["good"]
    assert (report.files, report.bad_files) == (5, 3)
    assert (report.records, report.bad_records) == (305, 104)
    for text in (
        "a.parquet: row group 1: ",
        "b.parquet: ",
        "it has: body",
        "d.parquet:1: not a string",
        "e.parquet:0: Unic",
    ):
        assert text in caplog.text


def test_share_is_taken_literally(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*({"text": str(i)} for i in range(9))) + b"bad\n")
    assert len(read(source="jsonl", path=str(file), max_corrupt_share=0.1)[0]) == 9
    with pytest.raises(UserError, match=r"1 of 10 records cannot be read \(10.00%\)") as stop:
        read(source="jsonl", path=str(file), max_corrupt_share=0.09)
    assert f"{file}:10: JSONDecodeError" in str(stop.value)
    assert "data.max_corrupt_share=0.11" in str(stop.value)


def test_share_of_files_counts_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": str(i)} for i in range(900))))
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="1 of 2 files"):
        read(source="jsonl", path=str(tmp_path), max_corrupt_share=0.1)


def test_a_hopeless_source_stops_early(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"bad\n" * 5000)
    with pytest.raises(UserError, match="1000 of 1000 records"):
        read(source="jsonl", path=str(tmp_path), max_corrupt_share=0.5)


@settings(max_examples=50, deadline=None)
@given(texts=st.sets(st.text(max_size=8), min_size=2, max_size=30), share=st.floats(0.001, 0.999))
def test_split_leaves_no_side_empty_and_shares_no_document(texts, share):
    keys = [document_key(text) for text in texts]
    split = settle_split(share, least_key=min(keys), greatest_key=max(keys))
    sides = {
        side: {part for text in texts if (part := split.part(text, document_key(text), validation=side)) is not None}
        for side in (True, False)
    }
    assert sides[True]
    assert sides[False]
    assert not sides[True] & sides[False]
    assert sides[True] | sides[False] == texts


def test_split_follows_the_share():
    split = plan_split(0.25)
    held_out = sum(document_key(f"document {i}") < split.limit for i in range(4000))
    assert held_out == pytest.approx(1000, abs=120)
    assert settle_split(0.0, least_key=1, greatest_key=9).limit == 0


def test_a_single_document_is_cut_between_lines():
    text = "".join(f"line {i}\n" for i in range(100))
    key = document_key(text)
    split = settle_split(0.1, least_key=key, greatest_key=key)
    head, tail = (split.part(text, key, validation=side) for side in (False, True))
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.08 < len(tail) / len(text) < 0.15
    assert "".join(split.part("x" * 100, 0, validation=side) for side in (False, True)) == "x" * 100


def test_config_refuses_a_bpe_without_its_bytes():
    with pytest.raises(ConfigError, match="bpe_vocab_size=256"):
        check(DataConfig(tokenizer="bpe", bpe_vocab_size=256))


def test_config_names_a_missing_path():
    with pytest.raises(ConfigError, match="no file matches"):
        check(DataConfig(source="text", path=str(Path("/nonexistent") / "*.txt")))
