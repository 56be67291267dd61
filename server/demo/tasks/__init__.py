"""The demo's tasks: generators of prompts and completions, pure Python and deterministic."""

from weft.server.demo.tasks.arithmetic import ARITHMETIC
from weft.server.demo.tasks.classify import CLASSIFY
from weft.server.demo.tasks.data2text import DATA2TEXT
from weft.server.demo.tasks.extract import EXTRACT
from weft.server.demo.tasks.formal import FORMAL
from weft.server.demo.tasks.sql import SQL
from weft.server.demo.tasks.task import Example, Pair, Split, Task, held_out
from weft.server.demo.tasks.translate import TRANSLATE

TASKS = {task.id: task for task in (SQL, CLASSIFY, DATA2TEXT, EXTRACT, FORMAL, ARITHMETIC, TRANSLATE)}

__all__ = ["TASKS", "Example", "Pair", "Split", "Task", "held_out"]
