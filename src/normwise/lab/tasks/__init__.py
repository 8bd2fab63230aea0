"""The tasks that the lab knows, by name."""

from normwise.lab.tasks.digits import DIGITS
from normwise.lab.tasks.task import Data, Task

__all__ = ["TASKS", "Data", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS,)}
