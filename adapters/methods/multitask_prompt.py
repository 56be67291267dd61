"""Multitask prompt tuning (arXiv 2303.02861): a shared prompt, each task's a low-rank product times it, element by
element: P ⊙ (C[task] R[task])."""

from __future__ import annotations

from weft.adapters.base import Base
from weft.adapters.checkpoint import Checkpoint
from weft.adapters.choices import Choice
from weft.adapters.config_fields import FieldTable
from weft.adapters.forms import SoftPrompt
from weft.adapters.methods import prompts
from weft.adapters.methods.prompt_fields import take_embeddings

MAX_TASKS = 1 << 20
MAX_RANKS = 1 << 14

FIELDS = prompts.FIELDS["PROMPT_TUNING"] | FieldTable(
    honoured=("num_ranks", "num_tasks"),
    ignored={
        "prompt_tuning_init_state_dict_path": "how the prompt was initialised before training",
        "prompt_tuning_init_task": "how the prompt was initialised before training",
    },
)
"""Every field of peft 0.21.2's MultitaskPromptTuningConfig."""


def compile_prompt(checkpoint: Checkpoint, base: Base) -> SoftPrompt:
    """See ``Method.compile_prompt``. The prompt is that of the chosen task."""
    shared = take_embeddings(checkpoint, FIELDS, base.hidden_size)
    tasks = checkpoint.config.integer("num_tasks", 1, low=1, high=MAX_TASKS)
    ranks = checkpoint.config.integer("num_ranks", 1, low=1, high=MAX_RANKS)
    task = checkpoint.per_request.choose(Choice("task_id", 0, tasks - 1))
    columns = checkpoint.tensors.take("prefix_task_cols", (tasks, len(shared), ranks))[task].float()
    rows = checkpoint.tensors.take("prefix_task_rows", (tasks, ranks, base.hidden_size))[task].float()
    return SoftPrompt(shared * (columns @ rows))
