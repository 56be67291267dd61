"""BOFT with several butterfly factors, which peft makes only beside its CUDA extension."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import BOFTConfig, PeftConfig

from tests.adapters.cases.basic import LINEARS
from tests.adapters.conftest import TinyBase
from tests.adapters.test_method_parity import assert_parity
from tests.support.adapters import make_adapter
from weft.adapters.methods import compile_adapter

CONFIGS: dict[str, PeftConfig] = {
    "two": BOFTConfig(boft_n_butterfly_factor=2, target_modules=LINEARS, init_weights=False),
    "three": BOFTConfig(
        boft_block_size=2, boft_n_butterfly_factor=3, target_modules=LINEARS, init_weights=False, bias="boft_only"
    ),
    "by_count": BOFTConfig(
        boft_block_size=0, boft_block_num=8, boft_n_butterfly_factor=3, target_modules=["o_proj"], init_weights=False
    ),
    "four": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=4, target_modules=["k_proj"], init_weights=False),
}


def _block_diagonal(blocks: torch.Tensor) -> list[torch.Tensor]:
    return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the extension, of which peft uses nothing but this."""
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", SimpleNamespace(forward=_block_diagonal))


@pytest.mark.parametrize("case", CONFIGS)
def test_butterfly_factors_equal_peft(case: str, llama: TinyBase, tmp_path: Path) -> None:
    folder = make_adapter(llama.folder, tmp_path / "adapter", CONFIGS[case])
    assert_parity(llama, folder)
    config = CONFIGS[case]
    assert isinstance(config, BOFTConfig)
    for path, forms in compile_adapter(folder, llama.base, version="v").sites.items():
        size = config.boft_block_size or llama.base.sites[path].in_features // config.boft_block_num
        assert forms.rotate_in is not None and forms.rotate_in.shape[0] == size << (config.boft_n_butterfly_factor - 1)
