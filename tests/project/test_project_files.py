"""Files for people and services around the package: they parse, and they agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml  # flax and orbax need it
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
YAML = [
    "CITATION.cff",
    ".pre-commit-config.yaml",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml")),
]

PAGES = [
    page
    for folder in ("", "docs", "docs/decisions", "benchmarks")
    for page in sorted((ROOT / folder).glob("*.md"))
]


@pytest.mark.parametrize("name", YAML)
def test_yaml_parses_to_a_mapping(name: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict)


def test_citation_agrees_with_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["title"] == PROJECT["name"]
    assert citation["abstract"] == PROJECT["description"]


def test_one_license_everywhere() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    assert "Apache-2.0" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_dockerfile_builds_the_image_that_the_jobset_runs() -> None:
    jobset = (ROOT / "scripts" / "jobset.yaml").read_text()
    [image] = re.findall(r"^ +image: (\S+)", jobset, re.M)
    assert f"docker build --tag {image} ." in DOCKERFILE
    user, *_ = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.M)
    assert f"fsGroup: {user}" in jobset  # that user may write to the shared volume


def test_the_dockerfile_copies_files_that_exist_and_that_dockerignore_lets_through() -> None:
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    copied = [name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]]
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / name).exists() for name in copied)


def test_ci_tests_every_python_that_the_metadata_names() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    assert tested == named and PROJECT["requires-python"] == f">={named[0]}"


def slugs(page: Path) -> set[str]:
    """The anchors of a page, as they are made of its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for link, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)\s#]*)#?([^)\s]*)\)", page.read_text()):
            target = page.parent / link if link else page
            if not target.exists() or (anchor and anchor not in slugs(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}#{anchor}")
    assert not broken


def test_the_index_lists_every_decision() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"^\| \[.+\]\((\S+)\) \|", (folder / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in folder.glob("*.md") if path.name != "README.md")
