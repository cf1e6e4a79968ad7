"""What README begins with: `make deploy` in a fresh clone, on a terminal."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from helpers import REPOSITORY
from helpers.targets import only_in_test_all


@only_in_test_all
def test_make_deploy_in_a_fresh_clone_on_a_terminal(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    try:
        run = subprocess.run(["script", "-qec", "make deploy", "/dev/null"], cwd=clone, env=environment, text=True, capture_output=True)
        shown = re.sub(r"\x1b\[[0-9;]*m", "", run.stdout.replace("\r\n", "\n"))
        shown = "\n".join(line.split("\x1b[K")[-1] for line in shown.split("\n"))
        print(shown)
        assert run.returncode == 0, shown
        parts = re.findall(r"^(\S.*\S) +(?:\d+ min )?\d+ s(?:   \d+ changed)?$", shown, re.MULTILINE)
        assert "Prepare the wanted revision of the application on all its hosts" in parts
        assert re.findall(r"^│ (\w+) +│ 20 +│ 20 +│ 0 ", shown, re.MULTILINE) == ["critical", "default", "batch"]
        assert re.search(r"^Deployed in \d+ min \d+ s\.", shown, re.MULTILINE)
        assert "TASK [" not in shown
        # Of Ansible; what pip says is of this machine.
        assert "[WARNING]" not in shown
        assert (clone / ".lab/inventories-quickstart/deploy.log").stat().st_mode & 0o777 == 0o600
    finally:
        subprocess.run(["make", "destroy"], cwd=clone, env=environment, check=True, capture_output=True)
