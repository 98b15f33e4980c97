"""The parts, in the order of what matters most, and each in a process of its own.

A GPU's fault is the end of its process (`app/cuda.py`), a library may crash, a call may never return: what one part
does to its process, and to the memory that it took, leaves the others as they were.
"""

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench, Found, Task, make_bundles
from benchmarks.gpu.device import answers, ceiling, options
from benchmarks.gpu.memory import DURATION_S, LEAST_S, START_S, memory
from benchmarks.gpu.memory import END_S as MEMORY_END_S
from benchmarks.gpu.served import one, peers, photos, tensors
from benchmarks.peers.servers import end_servers_when_ended

END_S = 25.0
"""From being asked to end, until all that a part has started has ended."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured, and about how long it takes: `fixed_s`, and `each` times the seconds of a measurement."""

    measure: Callable[[Bench], None]
    fixed_s: float
    each: float = 0.0

    def cost_s(self, seconds: float) -> float:
        """Return how many seconds it takes, guessed for a machine with one GPU."""
        return self.fixed_s + self.each * seconds


BUNDLES = Part(make_bundles, 60)
PARTS: dict[str, Part] = {
    "ceiling": Part(ceiling, 45, 18),
    "answers": Part(answers, 45),
    "photos": Part(photos, 45, 2),
    "tensors": Part(tensors, 40, 1),
    "one": Part(one, 35, 6),
    "options": Part(options, 100, 22),
    "memory": Part(memory, START_S + LEAST_S + MEMORY_END_S),
    "peers": Part(peers, 90, 3),
}
ELASTIC = {"memory": DURATION_S}
"""Parts that fill what time there is, up to so many seconds."""


def perform(part: Part, name: str, task: Task, file: Path) -> None:
    """Do a part in this process; whatever it raises is what the part has found."""
    found = Found(name, file)
    try:
        part.measure(Bench(task, found))
    except Exception as error:
        found.give_up(error)
    found.keep()


def _perform_here(part: Part, name: str, task: Task, file: Path) -> None:
    end_servers_when_ended()
    perform(part, name, task, file)


def perform_apart(part: Part, name: str, task: Task) -> dict[str, Any]:
    """Do a part in another process, and return what it has found, however that process ended."""
    with tempfile.TemporaryDirectory(prefix="convoy-gpu-") as folder:
        file = Path(folder) / "found.json"
        process = multiprocessing.get_context("spawn").Process(target=_perform_here, args=(part, name, task, file))
        process.start()
        try:
            process.join(task.limit_s)
            in_time = not process.is_alive()
        finally:
            process.terminate()
            process.join(END_S)
            process.kill()
            process.join()
        found = json.loads(file.read_text()) if file.exists() else {"skipped": "", "rows": [], "evidence": {}}
    if not in_time:
        found["skipped"] = f"It was ended after {task.limit_s:.0f} s."
    elif process.exitcode and not found["skipped"]:
        found["skipped"] = f"Its process ended with {process.exitcode}."
    return dict(found)


def limit_s(name: str, part: Part, seconds: float, left_s: float) -> float:
    """Return how long a part may take of the time that is left; 0: it does not fit.

    Three times of what is guessed: a part that hangs must not take what others need.
    """
    cost = part.cost_s(seconds)
    if cost > left_s:
        return 0.0
    return min(left_s, ELASTIC.get(name, 0.0) + 3 * cost)
