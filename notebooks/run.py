"""Executes the notebooks from top to bottom, and stores their outputs.

    python notebooks/run.py             # all of them
    python notebooks/run.py 3 4         # some, by number
    python notebooks/run.py --links     # none; only writes the badges and the first code cells

It needs nbclient and ipykernel, which `pip install -e ".[test]"` installs. The badge of each
notebook and the cell that finds or clones the repository are written here, so that they are the
same everywhere.
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent

REPOSITORY = "this_repository/jaxgpt"
"""The OWNER/NAME of this repository on GitHub: set it, and run with --links. This value names
nobody's repository, because names of owners there have no underscore."""

BADGE = """\
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]\
(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name})"""

SETUP = """\
# Finds jaxgpt in this folder, above it or beside it, or else clones it; installs what is missing.
import sys
from pathlib import Path

here = Path.cwd()
folders = [here, *here.parents, here / "jaxgpt"]
root = next((folder for folder in folders if (folder / "jaxgpt" / "training").is_dir()), None)
if root is None:
    !git clone --quiet --depth 1 https://github.com/{repository} jaxgpt
    root = here / "jaxgpt"
%cd -q {{root}}
!{{sys.executable}} -m pip install -qq -r requirements.txt
sys.path.insert(0, str(root))"""


def find(numbers: list[int]) -> list[Path]:
    """The notebooks with these numbers; all if there are none."""
    paths = sorted(FOLDER.glob("[0-9]_*.ipynb"))
    return [path for path in paths if not numbers or int(path.name[0]) in numbers]


def write_links(notebook: nbformat.NotebookNode, name: str) -> None:
    """Writes the badge and the first code cell, which have tags."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "badge" in tags:
            cell.source = BADGE.format(repository=REPOSITORY, name=name)
        elif "setup" in tags:
            cell.source = SETUP.format(repository=REPOSITORY)


def execute(notebook: nbformat.NotebookNode, code: str = "") -> None:
    """Executes a notebook in a kernel of this Python; raises CellExecutionError if a cell fails.

    Args:
        notebook: The notebook; its outputs are replaced.
        code: A cell to insert after the one with the tag "parameters", such as "STEPS = 2".
    """
    cells = notebook.cells
    if code:
        at = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
        cells.insert(at[0] + 1, nbformat.v4.new_code_cell(code))
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    for cell in cells:
        for output in cell.get("outputs", []):
            if "text" in output:  # no paths of this machine
                output["text"] = output["text"].replace(f"{FOLDER.parent}/", "")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main() -> None:
    """Runs the command line."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("numbers", nargs="*", type=int, help="which notebooks; none: all")
    options.add_argument("--links", action="store_true", help="execute nothing")
    options.add_argument("--code", default="", help="run after the parameters, such as STEPS=2")
    options.add_argument("--to", default=FOLDER, type=Path, help="where to write the notebooks")
    asked = options.parse_args()
    for path in find(asked.numbers):
        notebook = nbformat.read(path, as_version=4)
        write_links(notebook, path.name)
        began = time.perf_counter()
        if not asked.links:
            execute(notebook, asked.code)
        nbformat.write(notebook, asked.to / path.name)
        print(f"{time.perf_counter() - began:6.1f} s  {path.name}", flush=True)


if __name__ == "__main__":
    main()
