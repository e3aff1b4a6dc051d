"""Hub streaming, on local folders: order, ranks, exact resume, passes, corruption, validation."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from octofold.backends.errors import UserError
from octofold.train.data.build import build_data
from octofold.train.data.config import DataConfig
from octofold.train.data.loader import Loader
from octofold.train.data.ngram import ngram_baselines
from octofold.train.data.split import document_key, plan_split
from octofold.train.data.stream import StreamLoader

S = 16
TEXTS = [f"document {i} " + "xyz" * (i % 23) for i in range(120)] + ["long " * 60]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "hub"
    made.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:50]}), made / "a.parquet", row_group_size=20)
    pq.write_table(pa.table({"text": TEXTS[50:]}), made / "b.parquet")
    return made


def build(folder, sequences=4, **changes):
    config = DataConfig(
        **{
            "source": "hub",
            "path": str(folder),
            "sequence_length": S,
            "validation_share": 0.2,
            "mask_documents": True,
            **changes,
        }
    )
    return build_data(config, seed=0, run_dir=folder.parent / "run", validation_sequences=sequences)


def loader(data, rank=0, ranks=1, **changes):
    return data.loader(
        **{"global_batch_size": 4, "micro_batch_size": 1, "data_rank": rank, "data_ranks": ranks, **changes}
    )


def rows(batches):
    """Each sequence of these batches with its labels, positions and document ids."""
    return [tuple(tensor[i].tolist() for tensor in vars(b).values()) for b in batches for i in range(len(b.tokens_BS))]


def take(loader, steps):
    return [rows(loader.next_step()) for _ in range(steps)]


def by_hand(texts):
    """What the training documents pack to."""
    tokens, ids = [], []
    for d, text in enumerate(texts):
        tokens += [*text.encode(), 256]
        ids += [d] * (len(text) + 1)
    return tokens, ids


def test_sequences_are_the_training_documents_in_order(folder):
    data = build(folder)
    assert data.train is None
    limit = plan_split(0.2).limit
    training = [text for text in TEXTS if document_key(text) >= limit]
    assert 0 < len(training) < len(TEXTS)
    tokens, ids = by_hand(training * 2)
    steps = len(by_hand(training)[0]) * 2 // S // 4
    for i, (tokens_S, labels_S, _, doc_ids_S) in enumerate(row for step in take(loader(data), steps) for row in step):
        start = i * S
        assert list(tokens_S) == tokens[start : start + S]
        assert list(doc_ids_S) == [d - ids[start] for d in ids[start : start + S]]
        following = zip(tokens[start + 1 :], ids[start + 1 :], ids[start:], strict=False)
        assert list(labels_S) == [t if a == b else -100 for t, a, b in list(following)[:S]]


def test_ranks_share_the_stream(folder):
    data = build(folder)
    whole = take(loader(data), 6)
    for ranks, micro in ((2, 1), (2, 2), (4, 1)):
        parts = [take(loader(data, rank=r, ranks=ranks, micro_batch_size=micro), 6) for r in range(ranks)]
        for step in range(6):
            micros = 4 // micro // ranks
            assert whole[step] == [
                row for m in range(micros) for r in range(ranks) for row in parts[r][step][m * micro :][:micro]
            ]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_resume_is_exact_from_every_step(folder, batch):
    """Over two passes, so that every kind of place occurs: in a long document, at a shard's and at a pass's end."""
    data = build(folder)
    whole_loader = loader(data, global_batch_size=batch)
    states, steps = [json.dumps(whole_loader.state_dict())], []
    for _ in range(700 // batch):
        steps.append(rows(whole_loader.next_step()))
        states.append(json.dumps(whole_loader.state_dict()))
    assert max(map(len, states)) < 2000
    resumed = loader(data, global_batch_size=batch)
    for start in range(0, len(steps) - 3, 7):
        resumed.load_state_dict(json.loads(states[start]))
        assert resumed.samples_seen == start * batch
        assert json.loads(json.dumps(resumed.state_dict()))["samples_seen"] == start * batch
        assert take(resumed, 2) == steps[start : start + 2]
        # A state saved by the resumed loader works as well.
        again = json.dumps(resumed.state_dict())
        resumed.load_state_dict(json.loads(again))
        assert take(resumed, 1) == steps[start + 2 : start + 3]


def test_resume_by_count_alone_and_with_other_ranks(folder):
    data = build(folder)
    first = loader(data)
    whole = take(first, 3)
    state = first.state_dict()
    whole += take(first, 2)
    assert take(loader(data, samples_seen=12), 2) == whole[3:]
    halves = [loader(data, rank=r, ranks=2) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    first_step = [rows(half.next_step()) for half in halves]
    assert [first_step[0][0], first_step[1][0], first_step[0][1], first_step[1][1]] == whole[3]


def test_what_is_left_out_comes_no_more(folder):
    """The second step's batch of four and half of the fourth's; resumed in the middle, on one rank or two."""
    data = build(folder)
    whole = [row for step in take(loader(data), 6) for row in step]
    kept = [row for number, row in enumerate(whole) if number not in {4, 5, 6, 7, 14, 15}]
    expected = [kept[first : first + 4] for first in range(0, 16, 4)]
    first = loader(data)
    first.leave_out([(14, 16), (4, 8)])
    assert take(first, 2) == expected[:2]
    state = json.loads(json.dumps(first.state_dict()))
    assert state["left_out"] == [[4, 8], [14, 16]]
    assert first.samples_seen == 12
    resumed = loader(data)
    resumed.load_state_dict(state)
    assert take(resumed, 2) == expected[2:4]
    assert resumed.samples_AB.flatten().tolist() == [18, 19, 20, 21]
    assert resumed.origin(18) == {"sample": 18}
    halves = [loader(data, rank=rank, ranks=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    steps = [rows(half.next_step()) for half in halves]
    assert [steps[0][0], steps[1][0], steps[0][1], steps[1][1]] == expected[2]


def test_a_cursor_of_files_is_refused(folder):
    with pytest.raises(UserError, match="not one of a stream"):
        loader(build(folder)).load_state_dict({"samples_seen": 4})


def test_interface_equals_the_loaders():
    public = {name for name in vars(Loader) if not name.startswith("_")}
    assert public == {name for name in vars(StreamLoader) if not name.startswith("_")}


def test_validation_is_the_first_held_out_documents(folder):
    data = build(folder, sequences=3)
    assert data.validation is not None
    assert len(data.validation) >= 3
    held_out = list(data.texts("validation"))
    assert held_out == [text for text in TEXTS if document_key(text) < plan_split(0.2).limit][: len(held_out)]
    assert not set(held_out) & set(data.texts("train"))
    batches = list(data.validation_batches(sequences=3, micro_batch_size=2, data_rank=0, data_ranks=1))
    assert [len(b.tokens_BS) for b in batches] == [2, 2]
    assert torch.all(batches[1].labels_BS[1] == -100)
    assert 0.5 < data.bytes_per_token < 1
    baselines = ngram_baselines(data)
    assert baselines["trigram"] < baselines["unigram"]
    assert json.loads((folder.parent / "run" / "ngram.json").read_text()) == baselines


def test_no_validation_and_too_little(folder):
    data = build(folder, validation_share=0.0)
    assert data.validation is None
    assert ngram_baselines(data) == {}
    assert data.bytes_per_token is None
    with pytest.raises(UserError, match=r"validation split holds \d+ tokens in \d+ documents"):
        build(folder, sequence_length=5000)


def test_bpe_is_trained_on_the_stream(folder):
    data = build(folder, tokenizer="bpe", bpe_vocab_size=280)
    assert data.tokenizer.kind == "bpe-280"
    batches = [batch for _ in range(3) for batch in loader(data).next_step()]
    text = data.tokenizer.decode(batches[0].tokens_BS[0].tolist())
    assert "".join(data.texts("train")).startswith(text)


def test_jsonl_folder_with_bad_records_and_a_bad_shard(tmp_path, caplog):
    folder = tmp_path / "hub"
    folder.mkdir()
    good = [json.dumps({"text": f"document {i} of these"}) + "\n" for i in range(30)]
    (folder / "a.jsonl").write_text("".join([*good[:10], '{"text": null}\n', *good[10:20]]))
    (folder / "b.jsonl").write_text('{"text": "cut\n')
    (folder / "c.jsonl").write_text("".join(good[20:]))
    data = build(folder, max_corrupt_share=0.5)
    assert sorted([*data.texts("train"), *data.texts("validation")])[:2] == [
        "document 0 of these",
        "document 1 of these",
    ]
    seen = loader(data, global_batch_size=40)
    (step,) = take(seen, 1)
    assert len(step) == 40
    assert (data.corrupt.bad_records, data.corrupt.bad_files) == (1, 1)
    assert "shard 1: " in caplog.text
    assert "not a string but NoneType" in caplog.text
    with pytest.raises(UserError, match="1 of 3 files"):
        take(loader(build(folder, sequences=1, max_corrupt_share=0.1), global_batch_size=80), 1)


def test_a_share_of_bad_shards_does_not_grow_with_passes(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"document {name} " * 5}) + "\n")
    (folder / "c.jsonl").write_text("{\n")
    data = build(folder, validation_share=0.0, max_corrupt_share=0.25)
    take(loader(data, global_batch_size=400), 1)
    assert data.corrupt.bad_files > 10


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_truncated_shard_is_skipped(tmp_path, kind):
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in "abc":
        texts = [random.Random(f"{name}{i}").randbytes(20).hex() for i in range(500)]
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet")
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            (folder / f"{name}.{kind}").write_bytes(gzip.compress(lines))
    broken = folder / f"b.{kind}"
    broken.write_bytes(broken.read_bytes()[:-5000])
    data = build(folder, validation_share=0.0, max_corrupt_share=0.5)
    assert len(list(data.texts("train"))) >= 1000
    take(loader(data, global_batch_size=4000), 1)
    assert data.corrupt.bad_files >= 1


def test_a_shard_that_vanishes_stops_the_run(folder):
    texts = build(folder, validation_share=0.0).texts("train")
    assert next(texts) == TEXTS[0]
    (folder / "b.parquet").unlink()
    with pytest.raises(UserError, match=r"(?s)stopped in shard 1.*b\.parquet"):
        list(texts)


def test_wrong_key_dataset_split_and_shape(folder, tmp_path):
    with pytest.raises(UserError, match="no field 'body'"):
        build(folder, text_key="body")
    with pytest.raises(UserError, match=r"(?s)data.split=nope: cannot be opened.*train"):
        build(folder, split="nope")
    with pytest.raises(UserError, match="cannot be opened"):
        build(folder, path=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="multiple of micro batch"):
        loader(build(folder), ranks=3)


def test_a_stream_without_training_documents_ends(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    pq.write_table(pa.table({"text": [""] * 5}), folder / "a.parquet")
    with pytest.raises(UserError, match="no training document"):
        loader(build(folder, validation_share=0.0)).next_step()


def test_one_short_document_fills_sequences(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["ab"]}), folder / "a.parquet")
    (step,) = take(loader(build(folder, validation_share=0.0)), 1)
    assert np.array_equal(step[0][0], [97, 98, 256] * 5 + [97])
