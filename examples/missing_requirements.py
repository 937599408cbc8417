"""Print, one per line, the requirements of setup.py that this interpreter lacks; arguments are names of extras.

The package itself is listed as `megatron_metro` where no checkout of it is installed.
"""

import runpy
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def is_satisfied(requirement: Requirement) -> bool:
    """Whether the installed version, pre-releases such as those of NGC images included, meets the requirement."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def main(extras: list[str]) -> None:
    """Print what is missing."""
    declared = runpy.run_path(str(ROOT / "setup.py"), run_name="declarations")
    texts = [*declared["INSTALL_REQUIRES"], "megatron_metro"]
    for extra in extras:
        texts += declared["EXTRAS_REQUIRE"][extra]
    for text in dict.fromkeys(texts):
        if not is_satisfied(Requirement(text)):
            print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
