"""What HCCL is told by the environment, and what stays as the user has set it."""

from datetime import timedelta

import pytest

from octofold.backends import hccl
from octofold.backends.base import Backend
from octofold.backends.config import BackendConfig
from octofold.backends.cpu import CpuBackend
from octofold.backends.errors import ConfigError
from octofold.backends.process_group import RankInfo, joined


@pytest.mark.parametrize(("timeout_s", "exec_s", "connect_s"), [(600.0, 600, 600), (1.2, 2, 120), (9e4, 90000, 7200)])
def test_timeouts_fit_together(timeout_s, exec_s, connect_s):
    config = BackendConfig(timeout_s=timeout_s)
    added = hccl.variables(config, {}, deterministic=False)
    assert added == {"HCCL_EXEC_TIMEOUT": str(exec_s), "HCCL_CONNECT_TIMEOUT": str(connect_s)}
    assert hccl.watchdog_timeout(config, added) == timedelta(seconds=exec_s + 60)


def test_buffers_and_determinism_are_told_where_asked_for():
    added = hccl.variables(BackendConfig(hccl_buffer_mb=64), {}, deterministic=True)
    assert (added["HCCL_BUFFSIZE"], added["HCCL_DETERMINISTIC"]) == ("64", "true")


def test_what_the_user_has_set_stays():
    own = {"HCCL_EXEC_TIMEOUT": "1000", "HCCL_CONNECT_TIMEOUT": "200", "HCCL_DETERMINISTIC": "strict"}
    assert hccl.variables(BackendConfig(), own, deterministic=True) == {}
    assert hccl.watchdog_timeout(BackendConfig(), own) == timedelta(seconds=1060)


@pytest.mark.parametrize("said", ["0", "", "soon"])
def test_where_hccl_never_gives_up_the_watchdog_does(said):
    assert hccl.watchdog_timeout(BackendConfig(timeout_s=600), {"HCCL_EXEC_TIMEOUT": said}) == timedelta(seconds=600)


def test_two_sizes_of_buffers_are_refused():
    same = {"HCCL_BUFFSIZE": "64"}
    assert "HCCL_BUFFSIZE" not in hccl.variables(BackendConfig(hccl_buffer_mb=64), same, deterministic=False)
    with pytest.raises(ConfigError, match=r"backend.hccl_buffer_mb=32 HCCL_BUFFSIZE=64"):
        hccl.variables(BackendConfig(hccl_buffer_mb=32), same, deterministic=False)


@pytest.mark.parametrize("said", ["true", "TRUE", "strict"])
def test_determinism_is_asked_for_in_both_places(said):
    assert "HCCL_DETERMINISTIC" not in hccl.variables(BackendConfig(), {"HCCL_DETERMINISTIC": said}, deterministic=True)


@pytest.mark.parametrize("said", ["false", "False", ""])
def test_determinism_that_the_environment_denies_is_refused(said):
    own = {"HCCL_DETERMINISTIC": said}
    with pytest.raises(ConfigError, match=rf"(?s)train.deterministic=true HCCL_DETERMINISTIC={said}\n.*remedy: unset"):
        hccl.variables(BackendConfig(), own, deterministic=True)
    assert "HCCL_DETERMINISTIC" not in hccl.variables(BackendConfig(), own, deterministic=False)


def test_other_backends_are_told_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "HCCL_EXEC_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    backend: Backend = CpuBackend()
    with joined(backend, BackendConfig(threads=1), RankInfo()):
        assert backend.group_settings() == {}
