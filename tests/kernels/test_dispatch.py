import pytest
import torch

from weft.kernels.dispatch import backend


def test_torch_serves_the_cpu_and_nothing_serves_other_devices() -> None:
    assert backend(torch.zeros(1)) == "torch"
    with pytest.raises(ValueError, match="meta"):
        backend(torch.zeros(1, device="meta"))
