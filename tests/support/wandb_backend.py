"""Objects and operations of W&B's protocol, as far as the tests need them: runs, artifacts, reports."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

from support.wandb_sweeps import Sweeps

ENTITY = "lab"
_FIELDS = ("displayName", "groupName", "jobType", "tags", "sweep")
_END = {"endCursor": None, "hasNextPage": False}
_WHEN = "2026-01-01T00:00:00Z"


@dataclass
class StoredRun:
    """A run as the server stores it.

    Attributes:
        path: entity, project and id.
        fields: name, group, tags and the like.
        config: as sent, each value within ``{"value": …}``.
        lines: of each streamed file, by number; a line that is sent again replaces the first.
        files: the bytes of each uploaded file.
        exit_code: None for a run that has not ended.
    """

    path: tuple[str, str, str]
    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return one dictionary for each call of ``log``; numbers that JSON lacks are text, as on the real server."""
        return [
            json.loads(line, parse_constant=str)
            for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """The last summary."""
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


@dataclass
class StoredArtifact:
    """One version of an artifact, its manifest among the files."""

    path: tuple[str, str, str]
    kind: str
    run: str
    number: int
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class WandbBackend(Sweeps):
    """State of the server: it stores uploads, and answers each operation by name.

    Args:
        url: of the server.

    Attributes:
        runs: by entity, project and id.
        artifacts: by W&B's own id.
        views: the saved reports and workspaces, in order.
        projects: names of those that were created without a run.
        asked: the name of every operation, in order.
        refused: operations that could not be answered, and why.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.runs: dict[tuple[str, str, str], StoredRun] = {}
        self.artifacts: dict[str, StoredArtifact] = {}
        self.views: list[dict[str, Any]] = []
        self.projects: set[str] = set()
        self.asked: list[str] = []
        self.refused: list[str] = []
        self._places: dict[str, tuple[dict[str, bytes], str]] = {}
        self._lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request; failures are answers too, because clients retry failed requests for minutes."""
        name = request.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", request["query"])[0]
        method = "on_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        with self._lock:
            self.asked.append(name)
            try:
                return {"data": getattr(self, method)(request.get("variables") or {})}
            except Exception as error:
                self.refused.append(f"{name}: {error!r}")
                return {"errors": [{"message": self.refused[-1]}]}

    def stream(self, path: tuple[str, str, str], body: dict[str, Any]) -> None:
        """Add lines to a run's files."""
        with self._lock:
            run = self.runs[path]
            for name, part in body.get("files", {}).items():
                run.lines.setdefault(name, {}).update(enumerate(part["content"], part.get("offset", 0)))
            if body.get("complete"):
                run.exit_code = body["exitcode"]

    def put(self, address: str, content: bytes) -> None:
        """Keep an uploaded file."""
        files, name = self._places[address]
        files[name] = content

    def get(self, address: str) -> bytes:
        """Return a file; files of artifacts are requested by their checksum."""
        if address.startswith("/artifactsV2/"):
            contents = [content for artifact in self.artifacts.values() for content in artifact.files.values()]
            return next(c for c in contents if hashlib.md5(c).hexdigest() == address.split("/")[-2])
        files, name = self._places[address]
        return files[name]

    def on_viewer(self, _: Any) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "u", "username": ENTITY, "entity": ENTITY, "flags": "{}", "teams": teams}}

    on_get_default_entity = on_viewer

    def on_organization_core_weave_organization_id(self, _: Any) -> Any:
        return {"entity": {"organization": None}}

    def on_server_features_query(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    # logging and syncing

    def on_run_resume_status(self, asked: Any) -> Any:
        run = self.runs.get((asked["entity"] or ENTITY, asked["project"], asked["name"]))
        if run is None:
            return {"model": None}
        tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
        events = len(run.lines.get("wandb-events.jsonl", {}))
        lines = {"historyLineCount": len(run.history), "eventsLineCount": events, "logLineCount": 0}
        known = {**_node(run), **lines, "historyTail": tail, "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
        return {"model": {**_project(run.path), "bucket": known}}

    def on_upsert_bucket(self, sent: Any) -> Any:
        path = (sent["entity"] or ENTITY, sent["project"], sent["name"])
        new = path not in self.runs
        run = self.runs.setdefault(path, StoredRun(path))
        run.fields.update({name: sent[name] for name in _FIELDS if sent.get(name) is not None})
        run.config = json.loads(sent["config"] or "{}") or run.config
        bucket = {**_node(run), "sweepName": None, "project": _project(path)}
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def on_create_run_files(self, sent: Any) -> Any:
        files = self.runs[sent["entity"], sent["project"], sent["run"]].files
        places = [{"name": name, "uploadUrl": self._place(files, name)} for name in sent["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": places}}

    def on_artifact_type(self, _: Any) -> Any:
        return {"project": {"artifact": None}}

    def on_create_artifact(self, sent: Any) -> Any:
        sent = sent["input"]
        path = (sent["entityName"] or ENTITY, sent["projectName"], sent["artifactCollectionName"])
        number = sum(artifact.path == path for artifact in self.artifacts.values())
        made = {"id": f"a{len(self.artifacts)}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        self.artifacts[made["id"]] = StoredArtifact(path, sent["artifactTypeName"], sent["runName"], number)
        return {"createArtifact": {"artifact": made}}

    def on_create_artifact_manifest(self, sent: Any) -> Any:
        address = self._place(self.artifacts[sent["artifactID"]].files, "manifest.json")
        file = {"id": "f", "uploadUrl": address, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def on_create_artifact_files(self, sent: Any) -> Any:
        nodes = []
        for entry in sent["input"]["artifactFiles"]:
            number, name = entry["artifactID"], entry["name"]
            place = {"uploadUrl": self._place(self.artifacts[number].files, name), "uploadHeaders": []}
            nodes.append({**place, "storagePath": name, "uploadMultipartUrls": None, "artifact": {"id": number}})
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_commit_artifact(self, sent: Any) -> Any:
        self.artifacts[sent["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": sent["artifactID"], "digest": "d"}}}

    # reading

    def on_runs(self, asked: Any) -> Any:
        there = [run for path, run in self.runs.items() if path[:2] == (asked["entity"], asked["project"])]
        if not there and asked["project"] not in self.projects:
            return {"project": None}
        wanted = json.loads(asked["filters"] or "{}").get("name", {}).get("$in")
        found = [run for run in there if wanted is None or run.path[2] in wanted]
        edges = [{"node": _node(run), "cursor": run.path[2]} for run in found]
        runs = {"edges": edges, "pageInfo": _END}
        return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False, "runs": runs}}

    def on_run(self, asked: Any) -> Any:
        run = self.runs.get((asked["entity"], asked["project"], asked["name"]))
        return {"project": {"run": run and _node(run)}}

    on_run_history_keys = on_run

    def on_run_parquet_history(self, asked: Any) -> Any:
        run = self.runs[asked["entity"], asked["project"], asked["runName"]]
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": run.history}}}}

    def on_history_page(self, asked: Any) -> Any:
        run = self.runs[asked["entity"], asked["project"], asked["run"]]
        rows = [row for row in run.history if asked["minStep"] <= row["_step"] < asked["maxStep"]]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}

    def on_run_files(self, asked: Any) -> Any:
        files = self.runs[asked["entity"], asked["project"], asked["name"]].files
        wanted = [name for name in files if name in asked["fileNames"]]
        places = [(name, self._place(files, name)) for name in wanted]
        nodes = [{"id": name, "name": name, "url": url, "sizeBytes": len(files[name])} for name, url in places]
        found = {"edges": [{"node": node, "cursor": ""} for node in nodes], "pageInfo": _END}
        return {"project": {"internalId": "1", "run": {"fileCount": len(wanted), "files": found}}}

    def on_run_output_artifacts(self, asked: Any) -> Any:
        mine = [(n, a) for n, a in self.artifacts.items() if a.run == asked["run"] and a.committed]
        edges = [{"node": _artifact(number, artifact)} for number, artifact in mine]
        found = {"totalCount": len(mine), "pageInfo": {"__typename": "PageInfo", **_END}, "edges": edges}
        return {"project": {"run": {"artifacts": found}}}

    def on_fetch_artifact_manifest(self, asked: Any) -> Any:
        address = self._place(self.artifacts[asked["id"]].files, "manifest.json")
        return {"artifact": {"currentManifest": {"file": {"directUrl": address}}}}

    # reports and workspaces

    def on_get_projects(self, asked: Any) -> Any:
        names = self.projects | {project for entity, project, _ in self.runs if entity == asked["entity"]}
        common = {"__typename": "Project", "entityName": asked["entity"], "createdAt": _WHEN, "isBenchmark": False}
        nodes = [{**_project((asked["entity"], name, "")), **common, "user": None} for name in sorted(names)]
        edges = [{"cursor": "", "node": node} for node in nodes]
        return {"models": {"edges": edges, "pageInfo": {"__typename": "PageInfo", **_END}}}

    def on_upsert_view(self, sent: Any) -> Any:
        self.views.append(sent)
        project = {"id": "p", "name": sent["projectName"], "entityName": sent["entityName"]}
        known = {name: sent.get(name) for name in ("type", "name", "displayName", "description", "spec")}
        view = {**known, "id": f"v{len(self.views)}", "project": project, "updatedAt": _WHEN}
        return {"upsertView": {"view": view, "inserted": True}}

    on_upsert_view2 = on_upsert_view

    def _place(self, files: dict[str, bytes], name: str) -> str:
        """Return an address for uploading and downloading a file."""
        address = f"/storage/{len(self._places)}"
        self._places[address] = (files, name)
        return self.url + address


def _project(path: tuple[str, str, str]) -> dict[str, Any]:
    return {"id": "p", "internalId": "1", "name": path[1], "entity": {"id": "e", "name": path[0]}}


def _node(run: StoredRun) -> dict[str, Any]:
    """Return a run in the form that clients read."""
    known: dict[str, Any] = {"id": "b", "projectId": "1", "name": run.path[2], "user": {"name": "", "username": ""}}
    known |= {"displayName": run.fields.get("displayName", ""), "tags": run.fields.get("tags", []), "notes": None}
    known |= {"config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary), "systemMetrics": "{}"}
    known |= {"state": "running" if run.exit_code is None else "finished" if run.exit_code == 0 else "failed"}
    steps = [row["_step"] for row in run.history]
    known |= {"historyLineCount": len(steps), "historyKeys": {"lastStep": max(steps, default=-1)}}
    return known | {"createdAt": _WHEN, "heartbeatAt": _WHEN, "description": "", "readOnly": False}


def _artifact(number: str, artifact: StoredArtifact) -> dict[str, Any]:
    known: dict[str, Any] = {
        "__typename": "Artifact",
        "id": number,
        "versionIndex": artifact.number,
        "state": "COMMITTED",
    }
    project = _project(artifact.path)
    known |= {"artifactSequence": {"__typename": "ArtifactSequence", "name": artifact.path[2], "project": project}}
    known |= {"artifactType": {"name": artifact.kind}, "description": None, "metadata": "{}", "tags": [], "aliases": []}
    known |= {"ttlDurationSeconds": -1, "ttlIsInherited": True, "historyStep": None, "size": 0, "digest": "d"}
    return known | {"commitHash": None, "fileCount": len(artifact.files) - 1, "createdAt": _WHEN, "updatedAt": None}
