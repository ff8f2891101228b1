"""Facts that are written in several files of the repository agree: version, names, addresses, commands, extras."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_normgeo import __version__
from support.isolation import REPOSITORY

GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
CITING = (REPOSITORY / "docs" / "citing.md").read_text()
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text())


def commands(path: Path) -> list[str]:
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_citation_names_this_version() -> None:
    assert str(CITATION["version"]) == __version__
    assert f"version = {{{__version__}}}" in CITING


def test_citation_agrees_with_the_package() -> None:
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["repository-code"] == PROJECT["urls"]["Repository"]
    assert CITATION["url"] == PROJECT["urls"]["Documentation"]
    assert [author["name"] for author in CITATION["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert "preferred-citation" not in CITATION, "it would give the software the authors of the paper"


def test_bibtex_agrees_with_the_citation_file() -> None:
    (paper,) = CITATION["references"]
    software, article = re.findall(r"```bibtex\n(.*?)```", CITING, re.DOTALL)
    assert CITATION["title"] in software.replace("\\_", "_")
    assert CITATION["repository-code"] in software
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    for fact in (paper["title"], authors, paper["collection-title"], str(paper["year"])):
        assert f"{{{fact}}}" in article
    (identifier,) = paper["identifiers"]
    eprint = re.search(r"eprint += \{(.+)\}", article)
    assert eprint
    assert identifier["value"] == f"arXiv:{eprint[1]}"
    assert paper["url"].endswith(f"/{eprint[1]}")


def test_addresses_are_those_of_this_project() -> None:
    """Links in the forms lead to the addresses of ``pyproject.toml``."""
    urls = PROJECT["urls"]
    links = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "config.yml").read_text())["contact_links"]
    for url in [*urls.values(), *(link["url"] for link in links)]:
        assert url.startswith((urls["Repository"], urls["Documentation"]))
    assert (REPOSITORY / Path(urls["Changelog"]).name).is_file()


def test_supported_pythons_are_the_tested_ones() -> None:
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    versions = [match[1] for match in named if match]
    assert versions == workflow("tests")["jobs"]["suite"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_commands_of_the_readme_are_run() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    (quickstart,) = [line for line in lines if "pip install" in line and line.endswith("--config quickstart")]
    found = commands(GITHUB / "workflows" / "tests.yml")
    assert quickstart in found
    assert ".ci/run" in found  # which is the README's other command, see test_readme.py


@each_workflow
def test_workflow_names_only_what_exists(path: Path) -> None:
    text = path.read_text()
    for extras in re.findall(r"\.\[([\w,-]+)\]", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    for name in re.findall(r"(?<![\w/.])((?:\.ci|tests|docs|examples|configs|benchmarks)/[\w./-]+)", text):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"\b[A-Z]+\.(?:md|cff)\b", text):
        assert (REPOSITORY / name).exists(), name


@each_workflow
def test_workflow_asks_for_little(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    assert "concurrency" in content
    for job in content["jobs"].values():
        assert "timeout-minutes" in job
        for step in job["steps"]:
            action = step.get("uses", "")
            assert not action or re.search(r"@(release/)?v\d+$", action), f"{action} is not pinned to a major version"
            if action.startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize(
    ("tag", "section", "status"), [("v{}", "{}", 0), ("v9.9.9", "{}", 1), ("{}", "{}", 1), ("v{}", "Unreleased", 1)]
)
def test_release_needs_a_tag_of_the_version(tmp_path: Path, tag: str, section: str, status: int) -> None:
    """The check of the workflow passes only if tag, package, citation and changelog agree."""
    (script,) = [text for text in commands(GITHUB / "workflows" / "release.yml") if "$TAG" in text]
    shutil.copy(REPOSITORY / "CITATION.cff", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(f"## [{section.format(__version__)}]\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "TAG": tag.format(__version__)}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == status


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_have_distinct_fields_and_reports_the_version(path: Path) -> None:
    fields = [field for field in yaml.safe_load(path.read_text())["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    if path.stem in ("bug_report", "wrong_number"):
        assert {"version", "record", "reproduce"} <= set(names)
        version = next(field for field in fields if field["id"] == "version")
        assert "normgeo --version" in version["attributes"]["label"]


def test_forms_exist() -> None:
    assert [path.stem for path in FORMS] == ["bug_report", "feature_request", "wrong_number"]
