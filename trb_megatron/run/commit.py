"""The git commit of the source, for `commit.json`."""

import os
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[2]


def git_commit(root: Path = _SOURCE) -> str | None:
    """The commit of the checkout at `root`, with "-dirty" if it was changed since.

    Outside its own git checkout, the commit that a container image was built from (TRB_COMMIT), or
    None.
    """
    if not (root / ".git").exists():  # installed, perhaps inside somebody else's repository
        return os.environ.get("TRB_COMMIT") or None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(root), *describe]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
