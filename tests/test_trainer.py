"""The training loop: the same at every layout, and what it must refuse."""

import pytest

from tests.layouts import LAYOUTS, ONE_RANK, Layout, ProbeResult


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(
    probe_results: dict[Layout, ProbeResult], layout: Layout
) -> None:
    for one, other in zip(
        probe_results[ONE_RANK].metrics, probe_results[layout].metrics, strict=True
    ):
        for name in ("loss", "optim/grad_norm", "loss/student_topk_mass", "loss/teacher_entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
        assert other["rollout/tokens"] == one["rollout/tokens"]
        assert other["rollout/reward"] == one["rollout/reward"]


def test_realised_kl_follows_the_budget(probe_results: dict[Layout, ProbeResult]) -> None:
    metrics = probe_results[ONE_RANK].metrics
    assert [m["behavior/kl_budget"] for m in metrics] == pytest.approx([0.05, 0.025, 0.0])
    for m in metrics:
        assert m["behavior/kl_per_token"] == pytest.approx(m["behavior/kl_budget"], rel=1e-3)
        assert m["behavior/kl_per_sequence"] == pytest.approx(
            m["behavior/kl_per_token"] * m["rollout/response_length"]
        )
