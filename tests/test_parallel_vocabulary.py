"""Cross-entropy over a vocabulary that ranks split, against torch's over the whole, forward and backward in FP64."""

import pytest
import sequence_tasks
import torch
import torch.nn.functional as F

from octofold.train.loss import IGNORED

LABELS = {
    "all counted": [[0, 1, 7, 3], [6, 4, 2, 5]],
    "some ignored": [[0, IGNORED, 7, IGNORED], [IGNORED, 4, 2, 2]],
    "none counted": [[IGNORED] * 4] * 2,
}


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["small", "large"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("n", [2, 4])
def test_split_cross_entropy(ranks, n, labels, scale):
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor(labels)
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (3.0 * expected).backward()
    assert whole.grad is not None
    for rank, (loss, gradient) in enumerate(ranks(n).run(sequence_tasks.cross_entropy, logits, labels)):
        assert loss == pytest.approx(expected.item(), rel=1e-13)
        assert torch.allclose(gradient, whole.grad.chunk(n, dim=-1)[rank], rtol=1e-12, atol=1e-14)
