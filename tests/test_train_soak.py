"""A long run of tiny steps: memory, file descriptors, threads and process groups stay what they were."""

import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

STEPS, WARM_UP = 1600, 1000
"""oneDNN compiles a BF16 product for each number of rows that an expert is given and keeps up to 1024 of them, some
half a MiB each on AMX: memory is flat once all numbers were seen, by step 900."""
GROWTH_BYTES = 8 * 2**20
"""Over the 600 steps that follow. One logit tensor leaked a step (4 sequences x 32 tokens x 320 logits, FP32) would be
94 MiB, an expert's weights and their gradient (6 x 32 x 32, FP32) 14 MiB; the allocator alone wanders by 4 MiB."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak(ranks, tmp_path):
    root = write_corpus(tmp_path)
    config = tiny_run(
        root,
        2,
        model={"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
        data={"sequence_length": 32},
        precision={"name": "bf16"},
        parallel={"expert": 2},
        train={"steps": STEPS, "eval_every": 100, "log_every": 10},
        checkpoint={"every_steps": 100},
    )
    for samples in ranks(2).run(run_tasks.soak, config, root / "run", 100, timeout_s=800):
        assert [sample["step"] for sample in samples] == list(range(100, STEPS + 1, 100))
        warm = [sample for sample in samples if sample["step"] >= WARM_UP]
        first = warm[0]
        for sample in warm:
            for what in ("descriptors", "threads", "process_groups"):
                assert sample[what] == first[what], (what, sample)
            assert sample["resident_bytes"] - first["resident_bytes"] < GROWTH_BYTES, samples
        assert len(samples) == STEPS // 100
