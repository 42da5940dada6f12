"""The rules of the house that a machine can check; `docs/architecture.md` has the reasons."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import hypothesis
import pytest

import swarmkit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "swarmkit"

FLOORS = [
    {
        "errors",
        "settings",
        "ewma",
        "clock",
        "events",
        "http_server",
        "lazy",
        "huge_pages",
        "session_nice",
        "_version",
        "tinychat",
    },
    {"drawing", "placement", "sizes"},
    {"net", "models"},
    {"client", "server"},
    {"node"},
    {"local", "worker"},
    {"bench", "api", "notebook", "simulation"},
    {"cli"},
]
"""A room may import from the floors below it, and from itself; never from a neighbour."""

HIVEMIND_FILES = {
    PACKAGE / "net" / "hivemind" / name
    for name in (
        *("transport.py", "control.py", "daemon.py", "addresses.py"),
        *("table.py", "protocol.py", "storage.py"),
    )
}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def offences(of: Callable[[Path], Iterable[str]]) -> dict[str, list[str]]:
    """What `of(source)` finds in each file of the package, by the file's path, where it finds anything."""
    found = {str(source.relative_to(PACKAGE)): sorted(of(source)) for source in SOURCES}
    return {path: finds for path, finds in found.items() if finds}


@cache
def parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text())


def imported_by(source: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file, and as text for `import_module`."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relative to itself"
            assert node.module is not None
            yield node.module
            # `from swarmkit import net` names a room by its last word
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def room_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


ROOMS = {room for rooms in FLOORS for room in rooms}


# who may import whom


def test_every_room_has_its_floor() -> None:
    assert {room_of(source) for source in SOURCES} - {"__init__"} == ROOMS


def imported_upwards(source: Path) -> list[str]:
    own = room_of(source)
    if own == "__init__":
        return []  # the package's face loads names from every room when they are asked for
    named = {name.split(".")[1] for name in imported_by(source) if name.startswith("swarmkit.")}
    return [room for room in (named & ROOMS) - {own} if floor_of(room) >= floor_of(own)]


def test_imports_point_downwards() -> None:
    assert offences(imported_upwards) == {}


def test_hivemind_is_imported_by_its_own_folder_only() -> None:
    def of_hivemind(source: Path) -> list[str]:
        return [name for name in imported_by(source) if name.split(".")[0] == "hivemind"]

    assert {PACKAGE / path for path in offences(of_hivemind)} <= HIVEMIND_FILES


@pytest.mark.parametrize("room", ["net", "models"])
def test_the_two_rooms_at_the_bottom_do_not_know_each_other(room: str) -> None:
    (other,) = {"net", "models"} - {room}
    names = [name for source in (PACKAGE / room).rglob("*.py") for name in imported_by(source)]
    assert not any(name.startswith(f"swarmkit.{other}") for name in names)


# one clock

CLOCKS = re.compile(r"(perf_counter|monotonic|time)(_ns)?|current_time")
OWN_CLOCKS = {
    PACKAGE / "net" / "hivemind" / "daemon.py": "compares the dates of files, which are the computer's",
    PACKAGE / "worker" / "sensing" / "linux.py": "compares with moments of logind, which are the kernel's",
    PACKAGE / "worker" / "wakeful_clock.py": "is the clock whose durations go on while the computer sleeps",
}
"""Files that ask the computer for the time, though a clock is handed in to everything else, and why."""
TIMED_ROOMS = ["net", "client", "server", "local", "worker"]


def clock_calls(source: Path) -> Iterator[str]:
    """Names of the standard library's and anyio's clocks, as far as a file uses them."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("time", "anyio") and CLOCKS.fullmatch(node.attr):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "anyio"):
            yield from (f"{node.module}.{name.name}" for name in node.names if CLOCKS.fullmatch(name.name))


@pytest.mark.parametrize("room", TIMED_ROOMS)
def test_time_comes_from_the_clock_that_is_handed_in(room: str) -> None:
    sources = [source for source in (PACKAGE / room).rglob("*.py") if source not in OWN_CLOCKS]
    assert {str(source): calls for source in sources if (calls := list(clock_calls(source)))} == {}


# no circles

SUBROOMS = {"net", "models", "client", "server", "api", "worker", "placement"}
"""Rooms whose folders and files import one way, as the rooms of the package do."""


def module_of(source: Path) -> str:
    return ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(source): source for source in SOURCES}


def modules_imported_by(module: str) -> set[str]:
    """The package's modules that a file imports, at its top, late, or for types only."""
    named = {name for name in imported_by(MODULES[module]) if name in MODULES}
    # `from swarmkit.net import portal` names the folder too, from which nothing but the module is imported
    folders = {name for name in named if any(other.startswith(f"{name}.") for other in named)}
    return named - folders - {module}


def circle_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The vertices of one circle of a directed graph, in order; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def imports_between(unit_of: Callable[[str], str | None]) -> dict[str, set[str]]:
    """The imports between units of the package, each of which has one or more modules."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        own = unit_of(module)
        if own is not None:
            units = {unit_of(other) for other in modules_imported_by(module)} - {own}
            graph.setdefault(own, set()).update(unit for unit in units if unit is not None)
    return graph


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle_in(imports_between(lambda module: module)) == []


@pytest.mark.parametrize("room", sorted(SUBROOMS))
def test_folders_and_files_of_a_room_import_one_way(room: str) -> None:
    def unit_of(module: str) -> str | None:
        parts = module.split(".")
        return parts[2] if len(parts) > 2 and parts[1] == room else None

    assert circle_in(imports_between(unit_of)) == []


# a quick import


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_the_package_loads_the_standard_library_only() -> None:
    """The package's public names are loaded when they are asked for, and with them torch and all the rest."""
    code = "import sys; before = {*sys.modules}; import swarmkit; print(*({*sys.modules} - before))"
    roots = {name.split(".")[0] for name in in_a_fresh_interpreter(code).split()}
    assert roots - sys.stdlib_module_names == {"swarmkit"}


def test_every_public_name_can_be_had() -> None:
    assert [name for name in swarmkit.__all__ if not hasattr(swarmkit, name)] == []


# words


def undocumented(source: Path) -> Iterator[str]:
    """The module, its public classes and functions, as far as they say nothing about themselves."""
    module = parsed(source)
    if ast.get_docstring(module) is None and module.body and source.name != "__main__.py":
        yield "the module"
    for node in module.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield node.name


def test_what_is_public_says_what_it_is() -> None:
    assert offences(undocumented) == {}


def test_no_two_classes_of_the_package_share_a_name() -> None:
    """A name that stands for one thing can be searched for, and read without its module."""
    places: dict[str, list[str]] = {}
    for source in SOURCES:
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{source.relative_to(PACKAGE)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


# tests

TESTS = sorted((ROOT / "tests").rglob("*.py"))


def loops_that_sleep(source: Path) -> Iterator[str]:
    """Every `while` loop with a sleep in it: when its condition never comes about, the test hangs."""
    for loop in ast.walk(parsed(source)):
        if isinstance(loop, ast.While):
            calls = [ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)]
            if any(call.endswith("sleep") for call in calls):
                yield f"{source.relative_to(ROOT)}:{loop.lineno}"


def test_tests_wait_with_a_limit() -> None:
    """`tests/waiting.py` has the two loops that end."""
    sources = [source for source in TESTS if source.name != "waiting.py"]
    assert [loop for source in sources for loop in loops_that_sleep(source)] == []


FOREIGN_NAMES = {
    "_exit": "of the standard library's `os`: ends a process without its exit handlers",
    "_replace": "of the standard library's named tuples, and documented",
    "_repr_mimebundle_": "IPython's protocol: what a notebook shows of a value",
    "_handle_custom_msg": "ipywidgets' entry for what a browser sends, for which it has no other",
    "_stylesheets": "Gradio's list of what a theme fetches from elsewhere, for which it has no other",
    "_pslinux": "psutil's reading of Linux's folders, which a test has read from another place",
    "_name_or_path": "transformers' note in a config of where it came from",
    "_attn_implementation": "transformers' name for the attention that a config has chosen",
    "_reorder_linear_weight": "torch's operation, which decides whether there are blocked weights here",
}
"""Private names of other people's classes and modules that tests may use, and why."""
BY_NAME = {"getattr", "setattr", "delattr", "object", "patch"}
"""The last words of calls that read or patch an attribute whose name they are given as text."""


def is_private(name: str) -> bool:
    is_special = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not is_special and name not in FOREIGN_NAMES


def private_names_of_others(source: Path) -> Iterator[str]:
    """What a test reads, imports or patches that belongs to another object or module alone."""
    for node in ast.walk(parsed(source)):
        found = ""
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_inherited = ast.unparse(node.value) == "super()"
            found = "" if is_own or is_inherited else ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            found = " ".join(alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            names = [word for text in texts if isinstance(text, str) for word in text.split(".")]
            found = " ".join(name for name in names if is_private(name) and name.isidentifier())
        if found:
            yield f"{source.relative_to(ROOT)}:{node.lineno}: {found}"


def test_tests_read_no_private_state_of_other_objects() -> None:
    """A public property, or a value that is handed in, tells what a test needs."""
    assert [place for source in TESTS for place in private_names_of_others(source)] == []


@pytest.mark.parametrize(
    "line",
    [
        "server._ways.note(1)",
        "setattr(server, '_ways', 1)",
        "monkeypatch.setattr('swarmkit.net.lan._PATIENCE_S', 1)",
        "from swarmkit.net.lan import _PATIENCE_S",
    ],
)
def test_private_state_is_noticed_however_it_is_reached(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "test_this.py"
    source.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert list(private_names_of_others(source)) != []


# the map beside the land

DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    if path.exists()
]
_TOP = r"(?:swarmkit|tests|tools|docs|benchmarks|notebooks|app)/"


def words_in_backticks(document: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_a_document_exists(document: Path) -> None:
    paths = {word for word in words_in_backticks(document) if re.fullmatch(_TOP + r"[\w./-]*", word)}
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_in_a_document_exists(document: Path) -> None:
    names = {word for word in words_in_backticks(document) if re.fullmatch(r"\w+\.py", word)}
    known = {path.name for folder in ("swarmkit", "tests", "tools") for path in (ROOT / folder).rglob("*.py")}
    assert sorted(names - known) == []


def test_the_map_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [
        f"swarmkit/{room}{'.py' if (PACKAGE / f'{room}.py').exists() else '/'}"
        for room in ROOMS - {"_version"}
    ]
    assert sorted(room for room in rooms if f"`{room}`" not in text) == []


def test_nobody_is_told_to_install_the_package_that_has_our_name_on_pypi() -> None:
    told = re.compile(r"pip install [^\n`]*?\bswarmkit(?![\w-])")
    files = [*ROOT.rglob("*.py"), *ROOT.rglob("*.md"), *ROOT.rglob("*.ipynb"), *ROOT.rglob("*.toml")]
    own = [path for path in files if not {".venv", "build"} & set(path.parts) and path != Path(__file__)]
    assert [path.name for path in own if told.search(path.read_text())] == []


def test_no_property_fails_because_the_machine_is_busy() -> None:
    assert hypothesis.settings.default is not None
    assert hypothesis.settings.default.deadline is None
