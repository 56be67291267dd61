"""``weft check``, on adapters saved by the AdapterHub library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner, Result

from tests.support.hub import FOLDER, base_of
from weft.adapters.store import digest
from weft.server.cli import create_cli

LLAMA = FOLDER / "llama"


def check(*arguments: object) -> Result:
    return CliRunner().invoke(create_cli(), ["check", *map(str, arguments)])


def test_a_bottleneck() -> None:
    adapter = LLAMA / "double_seq_bn"
    result = check(adapter, "--base", base_of("llama"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1:4] == ["method   AdapterHub bottleneck", "forms    Bottleneck", "rank     0"]
    assert lines[5:] == [
        f"version  {digest(adapter)}",
        "sites    6",
        "  model.layers.*.self_attn  Bottleneck, rank 0  (×3)",
        "  model.layers.*.mlp  Bottleneck, rank 0  (×3)",
    ]


def test_a_fusion_and_a_union() -> None:
    fused = json.loads(check(LLAMA / "fusion_dynamic", "--base", base_of("llama"), "--json").stdout)
    assert (fused["method"], fused["forms"], len(fused["sites"])) == ("AdapterHub fusion", ["Fusion"], 3)
    mam = json.loads(check(LLAMA / "mam", "--base", base_of("llama"), "--json").stdout)
    assert (mam["forms"], mam["virtual_tokens"], mam["position_offset"]) == (["PrefixKV", "Bottleneck"], 5, 0)


def test_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(LLAMA / "par_bn", folder)
    result = check(folder)
    assert result.exit_code == 1 and "names no base model; pass --base" in result.stderr
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_name": str(base_of("llama"))}))
    assert check(folder).stdout.startswith(f"{folder} on {base_of('llama')} can be served\n")


def test_gates() -> None:
    shown = json.loads(check(LLAMA / "unipelt", "--base", base_of("llama"), "--json").stdout)
    assert shown["whole_prompts"] is True
    assert (shown["forms"], shown["virtual_tokens"]) == (["GatedLowRank", "JointPrefix", "Bottleneck"], 0)
