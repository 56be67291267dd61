"""One training loop for the base model and every adapter: deterministic, in bfloat16 autocast on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from weft.server.demo.batches import Batch

SEED = 20
WARMUP_STEPS = 50
ATTENTION = "eager"
"""On short rows the CPU's fused attention is slower, backward above all."""


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak rate at a step: a short warm-up, a plateau, a linear way down over the last quarter."""
    return min(1.0, (step + 1) / WARMUP_STEPS, 4 * (1 - step / steps))


def fit(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    steps: int,
    rate: float,
    decay: float,
    label: str,
    before_zero: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the parameters of `model` that require a gradient.

    `before_zero` is called after every step while its gradients are still there; AdaLoRA prunes by them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    start = time.monotonic()
    model.train()
    for step, batch in enumerate(islice(batches, steps), 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch._asdict()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        before_zero(step)
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            seconds = time.monotonic() - start
            print(f"{label}: step {step}/{steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    model.eval()
