"""What the CPU backend changes in torch, and what it must leave alone."""

import subprocess
import sys

import pytest
import torch

CHECKS = """
import torch
from trb_megatron.distributed import cpu_backend
assert cpu_backend.install() and cpu_backend.install()
for create in (torch.zeros, torch.ones, torch.empty):
    assert create(2, device="cuda").device.type == "cpu"
    assert create(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert create(2, device="meta").device.type == "meta"
assert torch.tensor([1], device="cuda").tolist() == [1]
assert torch.full((2,), 3, device="cuda").tolist() == [3, 3]
assert torch.zeros(1).cuda().device.type == "cpu"
assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
assert torch.zeros(1).type(torch.int32).dtype is torch.int32
assert torch.cuda.current_device() == torch.device("cpu")
# transformers builds models inside such a context, and takes what is not on "meta" for loaded.
with torch.device("meta"):
    for made in (torch.zeros(2), torch.full((2,), 1.0), torch.tensor([1]), torch.empty(2)):
        assert made.device.type == "meta"
state = torch.cuda.get_rng_state()
drawn = torch.rand(2)
torch.set_rng_state(state)
assert torch.equal(torch.rand(2), drawn)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is inert on a GPU")
def test_calls_for_cuda_are_answered_by_the_cpu() -> None:
    # In a process of its own: what is installed stays.
    subprocess.run([sys.executable, "-c", CHECKS], check=True, timeout=120)
