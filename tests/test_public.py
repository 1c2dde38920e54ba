"""
What procwatch promises to programs: the names it exports, what importing it costs, documents that exist and are true.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import procwatch
from procwatch import events

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("contrib/**/*.md")])
# What `import procwatch` must not bring along: these cost time, or are the application's to choose.
NOT_IMPORTED = ("asyncio", "click", "ctypes", "logging", "msgspec", "psutil", "pyroute2", "structlog", "aiofiles")
# More modules on top of asyncio's own, for one that watches.
NOT_FOR_WATCHING = ("click", "psutil", "pyroute2", "structlog", "aiofiles", "multiprocessing", "urllib.request")


def imported_by(statement: str) -> set[str]:
    """
    The modules that a fresh interpreter has after a statement.
    """
    code = f"{statement}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE, check=True)
    return set(json.loads(done.stdout))


def test_all_names_are_there():
    """
    Each name of `__all__` can be had, and a name that is not there is an AttributeError.
    """
    for name in procwatch.__all__:
        assert getattr(procwatch, name).__class__ is not ModuleType
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = procwatch.nothing


def test_all_is_what_type_checkers_see():
    """
    The names for type checkers, for `import *` and for loading at first use are the same ones.
    """
    source = (ROOT / "procwatch/__init__.py").read_text()
    seen = re.search(r"if TYPE_CHECKING:\n(.*?)\n\n", source, re.DOTALL)
    assert seen is not None
    typed = set(re.findall(r"\b[A-Z_]*\w+\b", re.sub(r"from \S+ import", "", seen[1])))

    assert typed == set(procwatch.__all__) == set(procwatch._HOMES)


def test_events_are_public():
    """
    Each kind of event can be chosen, has its own class, and says its kind by itself.
    """
    kinds = {kind.event: kind for kind in events.AnyEvent.__args__}

    assert set(kinds) == {*procwatch.KINDS, "ready", "lost", "stop"}
    assert set(procwatch.DEFAULT_KINDS) <= set(procwatch.KINDS)


@pytest.mark.parametrize("module", NOT_IMPORTED)
def test_importing_costs_nothing(module: str):
    """
    `import procwatch` loads nothing but itself.
    """
    assert module not in imported_by("import procwatch") - imported_by("pass")


@pytest.mark.parametrize("module", NOT_FOR_WATCHING)
def test_watching_needs_little(module: str):
    """
    A program that watches pays for no module of the command line.
    """
    assert module not in imported_by("import procwatch; procwatch.Watcher") - imported_by("import asyncio")


def test_importing_configures_no_logging():
    """
    The application's logging is its own: no handlers, no levels, no structlog configuration.
    """
    code = (
        "import logging, structlog, procwatch; procwatch.Watcher\n"
        "assert not logging.root.handlers and not structlog.is_configured()"
    )
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    """
    Each relative link of a document leads to a file of the project.
    """
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]

    assert missing == []


@pytest.mark.parametrize("kind", events.AnyEvent.__args__, ids=lambda kind: kind.event)
def test_each_field_is_documented(kind: type[procwatch.Event]):
    """
    docs/events.md explains each field of each event.
    """
    text = (ROOT / "docs/events.md").read_text()
    undocumented = [name for name in kind.__struct_fields__ if f"`{name}`" not in text]

    assert f"`{kind.event}`" in text
    assert undocumented == []


def test_dependencies_are_documented():
    """
    docs/dependencies.md has a line for each dependency of pyproject.toml, and for no other.
    """
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    wanted = {re.split(r"[<>=\[;~ ]", name)[0] for name in [*project["dependencies"], *extras]} - {"procwatch"}
    listed = re.findall(r"^\| \[?`?([\w.-]+)", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)

    assert wanted <= set(listed)


def test_modules_have_a_purpose():
    """
    Each module can be imported, and says in its docstring what it is for.
    """
    for path in sorted((ROOT / "procwatch").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__main__.py" and path.stat().st_size:
            assert importlib.import_module(name).__doc__, name
