"""W&B's side of a grid sweep: assigns runs to agents."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import yaml


class Sweeps:
    """Operations on sweeps, for a backend.

    Attributes:
        sweeps: their configurations, by name.
    """

    def __init__(self) -> None:
        self.sweeps: dict[str, dict[str, Any]] = {}
        self._commands: dict[str, Iterator[dict[str, Any]]] = {}

    def on_upsert_sweep(self, sent: Any) -> Any:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = yaml.safe_load(sent["config"])
        # without the project: the client would store it and an entity, which may not exist, in its environment
        return {"upsertSweep": {"sweep": {"name": name}, "configValidationWarnings": []}}

    def on_sweep_with_runs(self, asked: Any) -> Any:
        known = {"id": "s", "name": asked["sweep"], "state": "RUNNING", "runs": {"edges": []}}
        return {"project": {"sweep": {**known, "config": yaml.safe_dump(self.sweeps[asked["sweep"]])}}}

    def on_create_agent(self, asked: Any) -> Any:
        agent = f"agent{len(self._commands)}"
        self._commands[agent] = _commands(asked["sweep"], self.sweeps[asked["sweep"]])
        return {"createAgent": {"agent": {"id": agent}}}

    def on_heartbeat(self, sent: Any) -> Any:
        busy = any(json.loads(sent["runState"]).values())
        commands = [] if busy else [next(self._commands[sent["id"]])]
        return {"agentHeartbeat": {"agent": {"id": sent["id"]}, "commands": json.dumps(commands)}}


def _commands(name: str, sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the runs of the grid, and then the command to exit."""
    options = [[(name, {"value": v}) for v in entry["values"]] for name, entry in sweep["parameters"].items()]
    for i, values in enumerate(itertools.product(*options)):
        yield {"type": "run", "run_id": f"{name}run{i}", "args": dict(values), "program": None}
    while True:
        yield {"type": "exit"}
