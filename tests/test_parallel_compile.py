"""Compiled and uncompiled runs agree; what cannot be compiled is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_tasks
from run_configs import tiny_run, write_corpus

from octofold.backends.errors import ConfigError
from octofold.parallel.compile import apply_compile
from octofold.parallel.config import ParallelConfig, resolve


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compile_on_and_off_agree(recompute, tmp_path):
    """Losses, gradients of the first step, and weights and moments after two, in FP64."""
    write_corpus(tmp_path)

    def run(*, compiled: bool) -> dict[str, Any]:
        parallel = {"compile": compiled, "recompute": recompute}
        config = tiny_run(tmp_path, parallel=parallel, train={"steps": 2}, model={"num_hidden_layers": 2})
        return run_tasks.alone(run_tasks.run_with_gradients, config, tmp_path / str(compiled))

    found, expected = run(compiled=True), run(compiled=False)
    assert [r["loss"] for r in found["records"]] == pytest.approx([r["loss"] for r in expected["records"]], rel=1e-9)
    for part in ("gradients", "tensors"):
        assert found[part].keys() == expected[part].keys()
        for name, array in expected[part].items():
            difference = np.abs(found[part][name] - array).max() / max(np.abs(array).max(), 1e-30)
            assert difference < 1e-9, f"{part}: {name} differs by {difference:.1e}"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(ConfigError, match=r"parallel.compile=true\n.*no-compiler is not there"):
        apply_compile(None, None, "cpu")  # type: ignore[arg-type]


def test_on_ascend_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^parallel.compile=true backend=ascend\n"):
        apply_compile(None, None, "npu")  # type: ignore[arg-type]


def test_selective_recompute_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^parallel.compile=true parallel.recompute=selective\n"):
        resolve(ParallelConfig(compile=True, recompute="selective"), 1)
