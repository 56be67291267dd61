"""What weft's kernels and decode steps do on the GPU at hand, in one bounded run:

    python benchmarks/gpu_suite.py                                    all sections in at most nine minutes
    python benchmarks/gpu_suite.py --sections bandwidth --vllm-ops …/vllm/lora/ops/triton_ops

1. correctness: every Triton kernel against fp64 amid NaN; the engine's tokens against transformers and peft alone
2. bandwidth: grouped LoRA over true-rank bytes as a share of a device copy, the peers' kernels beside; a linear and its
   updates in one launch, in two, and beside each other
3. attention: every backend that is there against fp64, timed beside weft's own kernel
4. decode: steps of Llama-3-8B's and Qwen3-4B's shapes with random weights, against what the bytes allow

It runs from a plain checkout: weft need not be installed, and nothing of the HTTP server is imported. Results lie in
``$OUT`` or ``benchmarks/results`` as ``<device>-<date>.json`` and a picture, and are written after every section.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [folder for folder in [str(Path(__file__).resolve().parent)] if folder not in sys.path]

from gpu.checkout import make_importable  # noqa: E402

make_importable()

import torch  # noqa: E402
import transformers  # noqa: E402
import triton  # noqa: E402
from gpu.budget import Results, Share, result_path  # noqa: E402
from gpu.plot import draw  # noqa: E402

# Of the time that is left when a section begins.
SHARES = {"correctness": 0.4, "bandwidth": 0.42, "attention": 0.3, "decode": 0.95}


def main() -> int:
    """Run the sections that were asked for; the status is 1 if a result was wrong or a section broke."""
    args = parse()
    began, device = time.monotonic(), torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    results = Results(result_path(args.out, name), head(name, args))
    print(f"{name}: {results.path}", flush=True)
    whole = Share(began + args.limit_seconds)
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, args.limit_seconds)
    broken = False
    for section in args.sections:
        last = section == args.sections[-1]
        share = whole.part(0.95 if last else SHARES[section])
        print(f"{section}: {share.seconds_left:.0f} s", flush=True)
        started = time.monotonic()
        try:
            figures = RUN[section](args, share, device)
        except Exception as error:  # the other sections are worth having
            share.skip(f"{section}: what was left when it broke off")
            traceback.print_exc()
            figures, broken = {"broken": f"{type(error).__name__}: {error}"}, True
        figures["seconds"], figures["skipped"] = time.monotonic() - started, list(share.skipped)
        share.skipped.clear()
        results.add(section, figures)
        report(section, figures)
        broken = broken or failed(figures)
    picture = draw(results.data["sections"], results.path)
    print(f"written: {results.path}{f' and {picture}' if picture else ''}", flush=True)
    return int(broken)


def _time_is_up(*_: object) -> None:
    """Sections keep to their shares; this ends one that does not, a compiler's run for instance."""
    raise TimeoutError("the time limit of the whole run is reached")


def correctness(args: argparse.Namespace, share: Share, device: torch.device) -> dict[str, Any]:
    from gpu.correctness import DTYPES, KERNELS, check_kernels
    from gpu.endtoend import check_engine

    try:
        engine = check_engine(share.part(0.3), device, seed=args.seed, adapters=args.adapters)
    except Exception as error:  # the kernels' errors may say why
        traceback.print_exc()
        engine = {"broken": f"{type(error).__name__}: {error}"}
    kernels, dtypes = args.kernels or list(KERNELS), args.dtypes or list(DTYPES)
    checked = check_kernels(share, device, kernels=kernels, dtypes=dtypes, rounds=args.rounds, seed=args.seed)
    return {"engine": engine, **checked}


def bandwidth(args: argparse.Namespace, share: Share, device: torch.device) -> dict[str, Any]:
    from gpu import ways
    from gpu.bandwidth import BATCHES, measure
    from gpu.peers import Peer, Sglang, Vllm

    peers: list[Peer] = [Vllm(args.vllm_ops)] if args.vllm_ops else []
    peers += [Sglang(args.sglang_ops)] if args.sglang_ops else []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batches = args.batches or BATCHES
    timed = ways.measure(share.part(0.25), device, models=args.models, batches=batches, dtype=dtype)
    figures = measure(share, device, peers, models=args.models, batches=batches, dtype=dtype)
    return {**figures, "ways": timed, "ways_of_two_launches": ways.totals(timed)}


def attention(args: argparse.Namespace, share: Share, device: torch.device) -> dict[str, Any]:
    from gpu.attention import measure

    with torch.inference_mode():
        return measure(share, device, models=args.models, rounds=args.rounds, seed=args.seed)


def decode(args: argparse.Namespace, share: Share, device: torch.device) -> dict[str, Any]:
    from gpu.decode import BATCHES, measure

    with torch.inference_mode():
        return measure(share, device, models=args.models, batches=args.batches or BATCHES, context=args.context)


RUN: dict[str, Callable[[argparse.Namespace, Share, torch.device], dict[str, Any]]] = {
    "correctness": correctness,
    "bandwidth": bandwidth,
    "attention": attention,
    "decode": decode,
}


def failed(figures: dict[str, Any]) -> bool:
    """A kernel was wrong, or a row's tokens; a token that was preferred by next to nothing is no fault."""
    modes = [value for value in figures.get("engine", {}).values() if isinstance(value, dict)]
    wrong = [row for mode in modes for row in mode["differ"] if row["preferred_by"] > 1e-3]
    return bool(figures.get("failures") or wrong or "broken" in figures.get("engine", {}))


def report(section: str, figures: dict[str, Any]) -> None:
    """A few lines of what was found."""
    if "broken" in figures:
        print(f"  BROKEN: {figures['broken']}")
    for kernel, by_dtype in figures.get("kernels", {}).items():
        errors = ", ".join(f"{dtype} {each['largest_error']:.1e}" for dtype, each in by_dtype.items())
        print(f"  {kernel:22} largest error {errors}")
    for failure in figures.get("failures", ()):
        print(f"  WRONG {failure['case']}: {failure['problem']}")
    if "broken" in figures.get("engine", {}):
        print(f"  BROKEN engine: {figures['engine']['broken']}")
    for mode in ("eager", "with CUDA graphs"):
        if mode in figures.get("engine", {}):
            outcome = figures["engine"][mode]
            print(f"  engine {mode}: {outcome['equal']} of {outcome['rows']} rows equal; {outcome['differ'] or ''}")
    for who, shares in figures.get("median_share", {}).items():
        print(f"  {who:8} median share of a copy: {', '.join(f'{k} {v:.2f}' for k, v in shares.items())}")
    for way, ratio in figures.get("ways_of_two_launches", {}).items():
        print(f"  {way:22} {ratio:.2f} of the time of two launches after a product")
    for row in figures.get("attention", ()):
        what = f"{row['decoding']:3} decoding, {row['prompts']} x {row['tokens']} new of {row['context']}"
        each = ", ".join(f"{name} {_figure(found)}" for name, found in row["backends"].items())
        print(f"  {row['model']} pages of {row['page_size']:3} {what}: {each}")
    for name, model in figures.get("models", {}).items():
        for step in model["steps"]:
            of = step.get("measured_of_ideal", step.get("share_of_roofline"))
            what = f"{step['adapters']:3} x r{step['rank'] or 'mix'}" if step["adapters"] else "base"
            ratio = "" if of is None else f"{of:.2f} of what the bytes allow"
            print(
                f"  {name} {step['mode']:6} {what:10} {step['batch']:4} rows {1e3 * step['seconds']:8.2f} ms  {ratio}"
            )
    sys.stdout.flush()


def _figure(found: dict[str, Any]) -> str:
    """Of one backend and workload."""
    if "seconds" not in found:
        return found.get("unfit") or found["failed"]
    return f"{1e6 * found['seconds']:.0f} us ({found['share']:.2f} of a copy)"


def head(device: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of."""
    return {
        "device": device,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "limit_seconds": args.limit_seconds,
        "seed": args.seed,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=RUN, default=list(RUN))
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="for all sections together")
    parser.add_argument(
        "--device", default="cuda", help="cuda; cpu, under Triton's interpreter, is for trying this out"
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all inputs; default: another each time")
    parser.add_argument("--rounds", type=int, default=1000, help="cases of each kernel and dtype at most")
    parser.add_argument("--kernels", nargs="+", help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "fp16", "bf16"), help="default: all")
    parser.add_argument("--adapters", type=int, default=99, help="of the engine's check at most")
    parser.add_argument(
        "--models", nargs="+", choices=("llama-3-8b", "qwen3-4b", "tiny"), default=["llama-3-8b", "qwen3-4b"]
    )
    parser.add_argument("--batches", nargs="+", type=int, help="rows; default: 1 to 256")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row in decode steps")
    parser.add_argument("--vllm-ops", type=Path, help="vllm/lora/ops/triton_ops of a vLLM checkout")
    parser.add_argument("--sglang-ops", type=Path, help="sglang/srt/lora/triton_ops of an SGLang checkout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
