"""Print every dependency of pyproject.toml, and of one extra, pinned to its lower bound.

For `make test-lowest`: ``python .ci/lowest_requirements.py test``.
"""

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[\w-]+)(\[[\w,-]+\])?>=(?P<lowest>[\w.]+)")


def lowest(requirement):
    """``name==lowest`` of a requirement ``name[extras]>=lowest,...``."""
    found = REQUIREMENT.match(requirement)
    if found is None:
        sys.exit(f"pyproject.toml: {requirement!r} has no lower bound: expected 'name>=version'.")
    return f"{found['name']}=={found['lowest']}"


def main(extras):
    """Pins of the dependencies and of the extras, one per line, each name once."""
    path = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    print("\n".join(sorted({lowest(requirement) for requirement in requirements})))


if __name__ == "__main__":
    main(sys.argv[1:])
