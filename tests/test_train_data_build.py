"""From configuration to data: each source end to end, the cache, its safety, and the run's tokenizer."""

import gzip
import json
import logging
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from octofold.backends.errors import ConfigError, UserError
from octofold.train.data.build import build_data
from octofold.train.data.cache import build_once, cache_root
from octofold.train.data.config import DataConfig
from octofold.train.data.ngram import ngram_baselines, ngram_cross_entropy
from octofold.train.data.tokenizer import train_bpe

TEXTS = [f"def function_{i}():\n    return {i}  # ☃\n" for i in range(100)]


def config(tmp_path, **changes):
    return DataConfig(
        **{
            "source": "jsonl",
            "path": str(tmp_path / "text.jsonl"),
            "sequence_length": 32,
            "validation_share": 0.1,
            "cache_dir": str(tmp_path / "cache"),
            **changes,
        }
    )


@pytest.fixture
def corpus(tmp_path):
    """A jsonl file that holds each text twice."""
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS * 2]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path


def build(tmp_path, run="run", log=None, **changes):
    return build_data(config(tmp_path, **changes), seed=0, run_dir=tmp_path / run, log=log or (lambda line: None))


def documents_of(dataset, tokenizer):
    """The texts that the tokens spell, checking that each ends with its EOS."""
    ends = dataset.doc_offsets[1:] - 1
    assert np.all(dataset.tokens[ends] == tokenizer.eos_id)
    return [
        tokenizer.decode(dataset.tokens[start:end]) for start, end in zip(dataset.doc_offsets[:-1], ends, strict=True)
    ]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_splits_hold_every_document_once_and_share_none(corpus, tokenizer):
    data = build(corpus, tokenizer=tokenizer, bpe_vocab_size=300)
    train, validation = (documents_of(dataset, data.tokenizer) for dataset in (data.train, data.validation))
    assert sorted(train + validation) == sorted(TEXTS * 2)
    assert not set(train) & set(validation)
    assert train == list(data.texts("train"))
    assert validation == list(data.texts("validation"))
    assert train == [text for text in TEXTS * 2 if text in set(train)]
    text_bytes = sum(len(text.encode()) for text in train)
    assert data.train.bytes_per_token == data.bytes_per_token == text_bytes / len(data.train.tokens)


def test_bpe_learns_from_training_documents_only(corpus):
    data = build(corpus, tokenizer="bpe", bpe_vocab_size=300)
    assert data.tokenizer.fingerprint == train_bpe(data.texts("train"), vocab_size=300).fingerprint
    assert data.tokenizer.fingerprint != train_bpe(iter(TEXTS * 2), vocab_size=300).fingerprint


def test_every_file_source_gives_the_same_documents(corpus):
    (corpus / "folder").mkdir()
    for i, text in enumerate(TEXTS):
        (corpus / "folder" / f"{i:03}.txt.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.table({"text": TEXTS}), corpus / "text.parquet")
    for source, path in (("text", corpus / "folder"), ("parquet", corpus / "*.parquet")):
        data = build(corpus, source=source, path=str(path))
        assert documents_of(data.train, data.tokenizer) == [text for text in TEXTS if text in set(data.texts("train"))]


def test_standard_library_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOFOLD_CACHE", str(tmp_path / "cache"))
    data = build_data(DataConfig(), seed=0, run_dir=tmp_path / "run")
    assert len(data.train) > 10_000
    assert 50 < len(data.validation) < 0.1 * len(data.train)
    baselines = ngram_baselines(data)
    assert baselines["unigram"] == pytest.approx(3.26, abs=0.15)
    assert baselines["bigram"] == pytest.approx(2.48, abs=0.15)
    assert baselines["trigram"] == pytest.approx(1.85, abs=0.15)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir()) == [
        "documents",
        "tokens",
    ]


def test_loader_reads_the_training_split(corpus):
    data = build(corpus, workers=1, mask_documents=True)
    batches = data.loader(global_batch_size=4, micro_batch_size=2, data_rank=0, data_ranks=1)
    (first, second) = batches.next_step()
    assert first.tokens_BS.shape == second.labels_BS.shape == (2, 32)
    assert (first.doc_ids_BS.max(), first.positions_BS.max()) < (32, 32)
    batches.close()


def test_no_validation(corpus):
    data = build(corpus, validation_share=0.0)
    assert data.validation is None
    assert len(documents_of(data.train, data.tokenizer)) == 200
    assert list(data.validation_batches(sequences=4, micro_batch_size=1, data_rank=0, data_ranks=1)) == []
    assert ngram_baselines(data) == {}


def test_ngrams_count_the_text_and_are_kept(corpus):
    data = build(corpus, tokenizer="bpe", bpe_vocab_size=300)
    expected = ngram_cross_entropy(*("".join(data.texts(split)).encode() for split in ("train", "validation")))
    assert ngram_baselines(data) == expected
    data.ngram_cache.write_text('{"unigram": 1.0}')
    assert ngram_baselines(build(corpus, run="other")) == {"unigram": 1.0}


def test_one_document_is_enough(tmp_path):
    (tmp_path / "book.txt").write_text("".join(TEXTS))
    data = build(tmp_path, source="text", path=str(tmp_path / "book.txt"))
    train, validation = (documents_of(dataset, data.tokenizer) for dataset in (data.train, data.validation))
    assert "".join(train + validation) == "".join(TEXTS)
    assert len(validation[0]) == pytest.approx(0.1 * len("".join(TEXTS)), rel=0.3)


def test_too_little_text_names_counts_and_remedy(corpus):
    with pytest.raises(UserError, match=r"validation split holds \d+ tokens in \d+ documents") as stop:
        build(corpus, sequence_length=3000)
    assert "one sequence of 3001 tokens" in str(stop.value)
    assert "data.validation_share" in str(stop.value)
    with pytest.raises(UserError, match="training split"):
        build(corpus, sequence_length=100_000)
    (corpus / "text.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="hold no text"):
        build(corpus)


def test_cache_is_reused_and_follows_its_sources(corpus):
    lines = []
    first = build(corpus, log=lines.append)
    assert [line.split()[1] for line in lines] == ["reading", "tokenising"]
    again = build(corpus, run="again", log=lines.append)
    assert len(lines) == 2
    assert np.array_equal(first.train.tokens, again.train.tokens)
    assert isinstance(again.train.tokens, np.memmap)
    build(corpus, run="bpe", tokenizer="bpe", bpe_vocab_size=270, log=lines.append)
    assert [line.split()[1] for line in lines[2:]] == ["training", "tokenising"]
    with (corpus / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "appended " * 9}) + "\n")
    changed = build(corpus, run="changed", log=lines.append)
    assert [line.split()[1] for line in lines[4:]] == ["reading", "tokenising"]
    assert len(changed.train.doc_offsets) + len(changed.validation.doc_offsets) == 203


def test_corruption_is_reported_on_reuse_and_judged_again(corpus, caplog):
    with (corpus / "text.jsonl").open("a") as file:
        file.write("not JSON\n")
    assert build(corpus).corrupt.bad_records == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "octofold.data"):
        assert build(corpus).corrupt.bad_records == 1
    assert "skipped 1 of 201 records" in caplog.text
    assert "text.jsonl:201: JSONDecodeError" in caplog.text
    with pytest.raises(UserError, match="1 of 201 records"):
        build(corpus, max_corrupt_share=0.0)


def test_a_failed_build_leaves_nothing_and_is_repeated(tmp_path):
    def fail(partial):
        (partial / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "thing", fail)
    assert not (tmp_path / "thing").exists()
    build_once(tmp_path / "thing", lambda partial: (partial / "whole").write_text("whole"))
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["whole"]


def test_a_place_that_cannot_be_written_is_named(corpus):
    (corpus / "file").write_text("")
    with pytest.raises(UserError, match="name another folder"):
        build(corpus, cache_dir=str(corpus / "file"))


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OCTOFOLD_CACHE", raising=False)
    assert cache_root(None) == tmp_path / ".cache" / "octofold"
    monkeypatch.setenv("OCTOFOLD_CACHE", str(tmp_path / "env"))
    assert cache_root(None) == tmp_path / "env"
    assert cache_root("~/named") == tmp_path / "named"


PROGRAM = """
import os, pathlib, signal, sys, time
from octofold.train.data.build import build_data
from octofold.train.data.config import DataConfig

root, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
def log(line):
    print(line, flush=True)
    if mode == "die" and "tokenising" in line:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)  # long enough for the other process to come
(root / f"ready-{os.getpid()}").touch()
while mode == "race" and not (root / "go").exists():
    time.sleep(0.01)
config = DataConfig(source="jsonl", path=str(root / "text.jsonl"), sequence_length=32, validation_share=0.1,
                    tokenizer="bpe", bpe_vocab_size=300, cache_dir=str(root / "cache"))
data = build_data(config, seed=0, run_dir=root / "run", log=log)
print("result", len(data.train), len(data.validation), int(data.train.tokens.astype("int64").sum()))
"""


def start(root, mode):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(root), mode], stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_repeated(corpus):
    killed = start(corpus, "die")
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    assert list((corpus / "cache").glob("tokens-*.partial"))
    data = build(corpus, tokenizer="bpe", bpe_vocab_size=300)
    assert sorted(documents_of(data.train, data.tokenizer) + documents_of(data.validation, data.tokenizer)) == sorted(
        TEXTS * 2
    )
    assert not list((corpus / "cache").glob("*.partial"))


def test_two_processes_build_once(corpus):
    processes = [start(corpus, "race") for _ in range(2)]
    while len(list(corpus.glob("ready-*"))) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (corpus / "go").touch()
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    work = [line.split()[1] for lines in outputs for line in lines if line.startswith("data:")]
    assert sorted(work) == ["reading", "tokenising", "training"]


def test_a_resumed_run_keeps_its_tokenizer(corpus):
    first = build(corpus, tokenizer="bpe", bpe_vocab_size=300)
    with (corpus / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "zebra " * 100}) + "\n")
    resumed = build(corpus, tokenizer="bpe", bpe_vocab_size=300)
    assert resumed.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert build(corpus, run="new", tokenizer="bpe", bpe_vocab_size=300).tokenizer.fingerprint != (
        first.tokenizer.fingerprint
    )
    with pytest.raises(ConfigError, match="begun with a tokenizer of kind bpe-300"):
        build(corpus, tokenizer="bytes")
