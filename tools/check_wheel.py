"""Build the wheel, install it into a fresh environment, and run the demo (and more) there."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "constraints.txt"


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command without this checkout on Python's path; end with its exit code if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    print("$", *(str(word) for word in command), flush=True)
    done = subprocess.run([*command], cwd=cwd, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def build(into: Path = DIST) -> Path:
    """The one wheel in a folder, which is emptied first."""
    shutil.rmtree(into, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        # A copy of what belongs into it: setuptools would leave a build folder here, and use old files in it.
        for package in ("swarmkit", "app"):
            shutil.copytree(
                ROOT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", into, ".", cwd=Path(folder))
    (wheel,) = into.glob("*.whl")
    return wheel


def main() -> None:
    """Build, install, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--notebooks",
        action="store_true",
        help="also run every notebook and the documents' examples",
    )
    wanted = parser.parse_args()
    wheel = build()
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        venv.create(there / "venv", with_pip=True)
        python = there / "venv" / "bin" / "python"
        install = (python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS)
        run(*install, "-r", CONSTRAINTS, cwd=there)
        run(*install, f"swarmkit-llm[app,tuning,notebook] @ {wheel.as_uri()}", cwd=there)
        run(there / "venv" / "bin" / "swarmkit", "demo", cwd=there)
        run(python, "-c", "import swarmkit_app.playground, swarmkit.notebook.views", cwd=there)
        if wanted.notebooks:
            run(
                *install,
                "pytest",
                "pytest-asyncio",
                "pytest-timeout",
                "nbclient",
                "nbformat",
                "ipykernel",
                cwd=there,
            )
            (there / "tests").mkdir()
            (there / "tests" / "__init__.py").touch()
            shutil.copytree(ROOT / "tests" / "notebooks", there / "tests" / "notebooks")
            shutil.copytree(ROOT / "notebooks", there / "notebooks")
            shutil.copytree(ROOT / "docs", there / "docs")
            for name in ("pyproject.toml", "README.md"):
                shutil.copy(ROOT / name, there)
            shutil.copy(ROOT / "tests" / "test_documents.py", there / "tests")
            run(python, "-m", "pytest", "-q", "tests/test_documents.py", cwd=there)
            run(python, "-m", "pytest", "-q", "-m", "notebook", "tests/notebooks", cwd=there)
    print(f"{wheel.relative_to(ROOT)} works in a fresh environment")


if __name__ == "__main__":
    main()
