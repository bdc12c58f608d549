"""The versions that jaxgpt is tested with, and the oldest ones that it works with.

A lane is a set of versions that the tests run with. `.ci/run` uses

    python -m jaxgpt.lanes pins colab          # the versions of a lane, as pip takes them
    python -m jaxgpt.lanes check newest        # compares a lane with what is installed
    python -m jaxgpt.lanes moved report.json   # names what an installation would replace
"""

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LANES = {
    "colab": {  # what Google Colab has, on CPU, GPU and TPU
        "python": "3.13",
        "jax": "0.7.2",
        "jaxlib": "0.7.2",
        "flax": "0.11.2",
        "optax": "0.2.8",
        "orbax-checkpoint": "0.12.4",
        "grain": "0.2.18",
    },
    "newest": {
        "python": "3.13",
        "jax": "0.12.0.1",
        "jaxlib": "0.12.0.1",
        "flax": "0.12.12",
        "optax": "0.2.8",
        "orbax-checkpoint": "0.12.8",
        "grain": "0.2.18",
    },
    "python311": {  # the newest versions that exist for Python 3.11; the whole suite runs here
        "python": "3.11",
        "jax": "0.10.2",
        "jaxlib": "0.10.2",
        "flax": "0.12.8",
        "optax": "0.2.8",
        "orbax-checkpoint": "0.12.8",
        "grain": "0.2.18",
    },
}

FLOORS = {  # as in requirements.txt
    "python": "3.11",
    "jax": "0.7.2",
    "jaxlib": "0.7.2",
    "flax": "0.11.2",
    "optax": "0.2.6",
    "orbax-checkpoint": "0.11.25",
    "grain": "0.2.12",
}


def installed(name: str) -> str:
    """Returns the installed version of a package, or an empty string if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, to compare it with others.

    >>> release("0.7.2") < release("0.10.2.dev3")
    True
    """
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def pins(lane: Mapping[str, str]) -> list[str]:
    """The packages of a lane with their versions, as pip takes them: `jax==0.7.2`."""
    return [f"{name}=={one}" for name, one in lane.items() if name != "python"]


def closest(python: str, jax: str) -> str:
    """The name of the lane for a Python and a jax: of those for that Python the newest not after
    that jax, or else the oldest."""
    fitting = {
        name: lane for name, lane in LANES.items() if release(python) >= release(lane["python"])
    }
    fitting = fitting or LANES
    same = {name: lane for name, lane in fitting.items() if python.startswith(lane["python"])}
    lanes = sorted((same or fitting).items(), key=lambda item: release(item[1]["jax"]))
    older = [name for name, lane in lanes if release(lane["jax"]) <= release(jax)]
    return older[-1] if older else lanes[0][0]


def differences(name: str) -> list[str]:
    """What is installed here in other versions than in a lane, as sentences."""
    found = {one: installed(one) for one in LANES[name]}
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    return [
        f"{one} is {found[one] or 'missing'}, and lane {name} of jaxgpt/lanes.py has {wanted}"
        for one, wanted in LANES[name].items()
        if found[one] != wanted
    ]


def moved(report: Path) -> list[str]:
    """The packages of the lanes, and numpy, that an installation would install or replace.

    Args:
        report: What `pip install --dry-run --report FILE` has written.
    """
    names = [each["metadata"]["name"].lower() for each in json.loads(report.read_text())["install"]]
    return [name for name in names if name in FLOORS or name == "numpy"]


def main(action: str, argument: str) -> int:
    """Prints the versions of a lane, or what differs; the exit status is 1 if something does."""
    if action == "pins":
        print(*pins(LANES[argument]))
        return 0
    found = differences(argument) if action == "check" else moved(Path(argument))
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
