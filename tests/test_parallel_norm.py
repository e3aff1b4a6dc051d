"""The global norm over parameters on several meshes equals the norm of the unsplit tensors."""

from dataclasses import replace

import pytest
import rank_tasks
from tiny_models import SMALL


@pytest.mark.parametrize(
    ("n", "expert", "experts"),
    [
        pytest.param(1, 1, 4, id="one rank"),
        pytest.param(2, 2, 4, id="experts split"),
        pytest.param(4, 1, 4, id="experts sharded over data only"),
        pytest.param(4, 2, 4, id="experts sharded over expert_data x expert"),
        pytest.param(4, 2, 6, id="three experts over two shards"),
        pytest.param(4, 4, 4, id="an expert a rank"),
        pytest.param(4, 2, 2, id="an expert for two ranks"),
    ],
)
def test_global_norm(ranks, n, expert, experts):
    model = replace(SMALL, n_routed_experts=experts, hidden_size=25)
    outcomes = ranks(n).run(rank_tasks.norms, model, expert)
    assert outcomes == [outcomes[0]] * n
    norm, exact = outcomes[0]
    assert norm == pytest.approx(exact, rel=1e-12)
