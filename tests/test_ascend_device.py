"""The software NPU as a device, under the unmodified torch_npu: memory, operators, random state, streams."""

import shutil

import ascend_device_tasks as tasks
import pytest
from ascend_ranks import start, values

from octofold.backends.errors import UserError
from octofold.backends.software_npu import build

pytestmark = pytest.mark.ascend


def test_tensors_travel_and_fresh_memory_is_poisoned():
    (found,) = values("ascend_device_tasks:device", DEVICES="3", SOC="Ascend910B2")
    assert found["name"] == "Ascend910B2"
    assert found["devices"] == 3
    assert found["device"] == "npu:1"
    assert found["back"] == [[10.0, 1.0, 2.0], [13.0, 4.0, 5.0]]
    assert found["out"] == [[20.0, 2.0, 4.0], [26.0, 8.0, 10.0]]
    assert found["fp8"] == [[10.0, 1.0, 2.0], [13.0, 4.0, 5.0]]
    assert found["poison"] == [0xCD]
    assert found["held"]


def test_more_than_a_device_holds_is_torch_npus_own_error():
    (told,) = values("ascend_device_tasks:out_of_memory", MEMORY_MB="64")
    kind, message, after = told
    assert kind == "OutOfMemoryError"
    assert "NPU out of memory" in message
    assert "64.00 MiB total capacity" in message
    assert after == "[0.0, 0.0, 0.0, 0.0]"


def test_the_generator_of_the_device():
    (found,) = values("ascend_device_tasks:random_state")
    assert found == dict.fromkeys(found, True)


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_training_equals_the_cpus_bit_for_bit(asynchronous):
    (found,) = values("ascend_device_tasks:train", ASYNC=asynchronous, DELAY_US="200")
    on_npu, on_cpu = found
    assert on_npu == on_cpu
    assert len(on_npu) == tasks.STEPS
    assert on_npu[-1] < 0.9 * on_npu[0]


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_an_event_orders_two_streams(asynchronous):
    (found,) = values("ascend_device_tasks:streams", ASYNC=asynchronous, DELAY_US="50000")
    assert found["late"] == tasks.QUEUED << 16
    assert found["complete"]
    assert found["elapsed_ms"] >= 0
    if asynchronous == "1":
        assert found["early"] < tasks.QUEUED << 16
        assert not found["complete at once"]
    else:
        assert found["early"] == tasks.QUEUED << 16
        assert found["complete at once"]


def test_who_waits_for_an_event_is_not_deceived_by_a_later_recording():
    assert values("ascend_device_tasks:recorded_twice", ASYNC="1", DELAY_US="20000") == [tasks.QUEUED]


def test_memory_that_is_freed_under_another_stream_is_overwritten_unless_that_was_said():
    (found,) = values("ascend_device_tasks:given_away", ASYNC="1", DELAY_US="20000")
    assert found == {"not recorded": 2.0, "recorded": 1.0}


def test_copies_that_do_not_wait_see_what_is_there_in_their_turn():
    (found,) = values("ascend_device_tasks:copies", ASYNC="1", DELAY_US="20000")
    assert found.pop("at once") != [tasks.QUEUED]
    assert found == {"later": [tasks.QUEUED], "changed": [8.0, 7.0, 2 * tasks.QUEUED]}


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_an_operator_that_fails_is_named_where_the_host_waits(asynchronous):
    ((in_the_call, where_it_waits),) = values("ascend_device_tasks:late_error", ASYNC=asynchronous)
    assert ("out of range" in in_the_call) == (asynchronous == "0")
    assert ("aten::index_select: index out of range" in where_it_waits) == (asynchronous == "1")


def test_who_waits_lets_go_of_pythons_lock():
    (found,) = values("ascend_device_tasks:waits_with_pythons_lock", ASYNC="1", DELAY_US="5000", MEMORY_MB="96")
    assert found == {"row": True, "elapsed": True}


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_work_is_on_the_stream_of_its_device(asynchronous):
    n = tasks.QUEUED + 1.0
    assert values("ascend_device_tasks:two_devices", ASYNC=asynchronous, DELAY_US="5000") == [[n, n + tasks.QUEUED, n]]


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_odd_calls_give_the_same_on_streams(asynchronous):
    (found,) = values("ascend_device_tasks:odd_calls", ASYNC=asynchronous)
    for turn in ("first", "again"):
        assert found[f"mixed {turn}"] == [1.0, 1.0]
        assert found[f"norm {turn}"]
        assert found[f"dtypes {turn}"] == ["torch.float32", "torch.float64", [0.0, 0.5, 1.0]]


def test_what_a_signal_raises_comes_to_the_caller():
    assert values("ascend_device_tasks:signals", ASYNC="1") == [tasks.SIGNALS]


def test_memory_is_freed_after_the_work_that_uses_it():
    """As CANN's aclrtFree does; what it says is the stream's state, which is complete (0)."""
    assert values("ascend_device_tasks:freed", ASYNC="1", DELAY_US="5000") == [[0]]


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTOFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("g++") is None
    with pytest.raises(UserError, match=r"(?s)g\+\+\n.*remedy: apt-get install g\+\+"):
        build.build()
    assert [path.suffix for path in (tmp_path / "software_npu").iterdir()] in ([], [".lock"])


def test_a_source_the_compiler_refuses_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTOFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    for part in ("acl", "hccl", "operators"):
        (tmp_path / "sources" / part).mkdir(parents=True)
    (tmp_path / "sources/acl/wrong.cpp").write_text("int f( {", encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)wrong\.cpp.*error:.*remedy"):
        build.build()
    assert [path.suffix for path in (tmp_path / "cache/software_npu").iterdir()] == [".lock"]


def test_a_process_that_ends_badly_shows_why():
    (ran,) = start("ascend_device_tasks:no_such_function")
    assert ran.status == 1
    assert "no_such_function" in ran.errors
