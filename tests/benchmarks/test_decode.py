"""The benchmark of decoding runs, and prints what it measured."""

import re
from collections.abc import Callable


def test_it_prints_rates_of_prefill_and_decoding(run_script: Callable[..., str]) -> None:
    options = ["--rows", 2, "--prompt", 5, "--output", 4, "--layers", 1, "--adapters", 2, "--rounds", 1]
    printed = run_script("decode.py", *options, "--threads", 1, "--breakdown")
    for kind in ("base", "mixed"):
        for what in ("prefill", "decode "):
            assert re.search(rf"^{kind} +{what} +\d+ tok/s", printed, re.MULTILINE), printed
        assert f"{kind}, operators of a decoding step" in printed
    assert "mixed / base, decode: " in printed
    # Who computes the linears of the base depends on the processor.
    assert "paged_attention::decode" in printed
    # Where there are matrix tiles, few rows' adapters are served in the linear's own call.
    assert "packed_linear::linear" in printed or ("aten::mm" in printed and "grouped_lora::lora_of_rows" in printed)
