"""The real ProcessGroupHCCL between real processes, over the software NPU's HCCL: results, and what goes wrong."""

import pytest
from ascend_ranks import start, values

from octofold.backends.rank_table_writer import Host, table_of

pytestmark = pytest.mark.ascend


def expected(rank: int, ranks: int) -> dict[str, object]:
    """What `collectives` finds on a rank."""
    counts = [(rank + other) % 3 for other in range(ranks)]
    exchanged = [4.0 * other + rank for other, count in enumerate(counts) for _ in range(count)]
    total = sum(range(ranks))
    found: dict[str, object] = {
        "group": "ProcessGroupHCCL",
        "max": [ranks - 1.0] * 3,
        "all_gather": [float(other) for other in range(ranks) for _ in range(2)],
        "reduce_scatter": [ranks * 2.0 * rank, ranks * (2.0 * rank + 1)],
        "broadcast": [ranks - 1.0] * 4,
        "ring": [float((rank - 1) % ranks)] * 2,
        "subgroup": [float(sum(range(rank % 2, ranks, 2)))],
        "objects": [{"rank": other} for other in range(ranks)],
    }
    for dtype in ("float32", "bfloat16", "float16", "int64"):
        found[f"all_reduce torch.{dtype}"] = [ranks * i + total for i in range(5)]
    for dtype in ("float32", "bfloat16", "float8_e4m3fn", "uint8"):
        found[f"all_to_all torch.{dtype}"] = exchanged
    return found | ({"received": [7.0, 7.0]} if rank == 1 else {})


@pytest.mark.parametrize(("ranks", "asynchronous"), [(2, "0"), (4, "0"), (4, "1")])
def test_every_collective(ranks, asynchronous):
    found = values("ascend_hccl_tasks:collectives", ranks, ASYNC=asynchronous, DELAY_US="500")
    for rank in range(ranks):
        assert found[rank] == expected(rank, ranks)


SUMS = "all_reduce number 1 (16 bytes of FP32, sum)"
GIVES = "broadcast number 1 (16 bytes of FP32, root 0)"
FAULTS = {
    "other_size": (SUMS, "rank 1 is in all_reduce number 1 (12 bytes of FP32, sum)"),
    "other_dtype": (SUMS, "rank 1 is in all_reduce number 1 (16 bytes of INT32, sum)"),
    "other_order": (SUMS, "rank 1 is in broadcast number 1 (16 bytes of FP32, root 1)"),
    "other_root": (GIVES, "rank 1 is in broadcast number 1 (16 bytes of FP32, root 1)"),
    "other_kind": (GIVES, "rank 1 is in reduce number 1 (16 bytes of FP32, sum, root 0)"),
    "killed_peer": (SUMS, "rank 1 is gone"),
    "absent_peer": (SUMS, "waited 3 s for rank 1"),
}
"""What rank 0 is in, and what it is told."""


@pytest.mark.parametrize(
    ("fault", "asynchronous"), [*((fault, "0") for fault in FAULTS), ("other_size", "1"), ("killed_peer", "1")]
)
def test_ranks_that_disagree_or_die_are_named_with_their_call(fault, asynchronous):
    ran = start(f"ascend_hccl_tasks:{fault}", 2, ASYNC=asynchronous, HCCL_EXEC_TIMEOUT="3")
    assert "rank 0 in {}: {}".format(*FAULTS[fault]) in ran[0].value
    assert ran[1].status == (-9 if fault == "killed_peer" else 0), ran[1].errors


def test_a_rank_that_stops_before_it_takes_what_it_is_sent_is_named():
    ran = start("ascend_hccl_tasks:stopped_peer", 2, HCCL_EXEC_TIMEOUT="3")
    assert "in all_reduce number " in ran[0].value
    assert "(16777216 bytes of FP32, sum): waited 3 s for rank 1" in ran[0].value, ran[0].errors
    assert ran[1].status == 0, ran[1].errors


def test_a_rank_that_never_joins_a_group_is_named_by_all_others():
    ran = start("ascend_hccl_tasks:absent_from_group", 3, HCCL_EXEC_TIMEOUT="30", HCCL_CONNECT_TIMEOUT="3")
    for rank in (0, 2):
        expected = f"rank {rank} of a new group of 3: waited 3 s for rank 1 of 3 in its group"
        assert expected in ran[rank].value, ran[rank].errors
    assert ran[1].status == 0, ran[1].errors


def test_a_missing_wait_and_a_wrong_stream_give_wrong_results():
    for found in values("ascend_hccl_tasks:waits", 2, ASYNC="1", DELAY_US="100000", SEED="3"):
        assert found["good"] == found["right_stream"] == 6.0
        assert found["missing"] != 6.0
        assert found["wrong_stream"] != 6.0


def test_pauses_of_chance_change_no_bit():
    runs = [values("ascend_hccl_tasks:bits", 2, ASYNC=a, DELAY_US="300", SEED=seed) for a, seed in ("00", "11", "12")]
    for run in runs:
        assert run == runs[0]
        assert [len(bits) for bits in run] == [1, 1]


def test_groups_are_told_buffer_timeouts_and_determinism():
    """By torch_npu, in HcclCommConfig, or by the environment, which HCCL reads for what stands in no config."""
    shown = {"HCCL_BUFFSIZE": "64", "HCCL_CONNECT_TIMEOUT": "120", "HCCL_DETERMINISTIC": "true"}
    for ran in start("ascend_hccl_tasks:settings", 2):
        assert ran.status == 0, ran.errors
        told = [64, 1, 91, 120]
        for_sends = [20, *told[1:]]
        assert sorted(ran.value["groups"]) == [for_sends, told, told]
        assert ran.value["watchdog_s"] == 151.0
        assert ran.value["shown"] == {**shown, "HCCL_EXEC_TIMEOUT": "91"}
        assert "timeout" not in ran.errors, "torch_npu warns where its watchdog is quicker than HCCL"


def test_groups_are_those_of_a_rank_table(tmp_path):
    """Written by Octofold, read by torch_npu, which makes the default group of it, and other groups of that one."""
    table = tmp_path / "table.json"
    table.write_text(table_of([Host("127.0.0.1", tuple((f"10.0.0.{i}", "") for i in range(1, 5)))]), encoding="utf-8")
    table.chmod(0o640)
    found = values("ascend_hccl_tasks:groups_of_a_table", 4, RANK_TABLE_FILE=str(table), SOC="Ascend910B2")
    for rank, groups in enumerate(found):
        world, half = groups["world"], groups["half"]
        assert world[0].startswith("table-")
        assert half[0].startswith(f"{world[0]}.")
        assert world[1] == [10.0] * 3
        assert half[1] == [4.0 + 2 * (rank % 2)] * 3


def test_what_the_user_has_set_stays():
    own = {"HCCL_EXEC_TIMEOUT": "0", "HCCL_CONNECT_TIMEOUT": "300", "HCCL_DETERMINISTIC": "strict"}
    for found in values("ascend_hccl_tasks:settings", 2, **own):
        assert found["shown"] == {**own, "HCCL_BUFFSIZE": "64"}
        assert found["watchdog_s"] == 90.5
