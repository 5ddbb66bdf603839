"""Tasks are objects: what one does differently is in its module alone."""

import re
from pathlib import Path
from typing import get_args

import client_agent
from client_agent.tasks.registry import task_of, tasks
from shelora.tasks import TASKS, TaskName

FOLDER = Path(client_agent.__file__).parent
COMPARED = re.compile(
    r"\b(if|elif|else) (\w+\.)*task(\.name)? (==|!=|in\b|is\b)|(==|!=) (CAUSAL_LM|SEQUENCE_CLASSIFICATION|CHAT)\b"
)


def test_every_task_that_a_federation_can_name_is_carried_out() -> None:
    assert set(get_args(TaskName)) == set(TASKS) == {task.name for task in tasks()}
    assert all(task_of(name).name == name for name in TASKS)


def test_no_module_asks_which_task_it_is() -> None:
    sources = {path: path.read_text() for path in FOLDER.rglob("*.py")}
    assert FOLDER / "tasks" / "registry.py" in sources
    found = [f"{path.name}: {m.group()}" for path, text in sources.items() for m in COMPARED.finditer(text)]
    assert found == []
    for seen in ("if task == 'chat'", "x if self.task.name in (1,)", "y != CHAT"):
        assert COMPARED.search(seen)
