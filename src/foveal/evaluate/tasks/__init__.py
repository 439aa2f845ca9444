"""Questions with known answers, as long as is wanted: to evaluate on, and to make training data of."""

from foveal.evaluate.tasks.counting import CWE, FWE
from foveal.evaluate.tasks.needles import NIAH_MULTIKEY_2, NIAH_MULTIKEY_3, NIAH_SINGLE_1, PASSKEY
from foveal.evaluate.tasks.sample import NOISE, Haystack, Sample, Setting, Task
from foveal.evaluate.tasks.tracing import VT

RULER = {task.name: task for task in (NIAH_SINGLE_1, NIAH_MULTIKEY_2, NIAH_MULTIKEY_3, VT, CWE, FWE)}
"""The tasks of RULER (arXiv 2404.06654) that need no data."""
TASKS = {"passkey": PASSKEY, **RULER}

__all__ = ["NOISE", "PASSKEY", "RULER", "TASKS", "Haystack", "Sample", "Setting", "Task"]
