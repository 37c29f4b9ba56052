"""docs/longer_rows.md, command by command: from a Hugging Face folder to one with longer rows."""

import json
import re

import pytest
from conftest import ROOT, read_metrics, run


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The folder of the page's files, and what its commands printed."""
    folder = tmp_path_factory.mktemp("longer")
    page = (ROOT / "docs/longer_rows.md").read_text()
    script, commands = re.search(r"```python\n(.*?)```.*?```bash\n(.*?)```", page, re.S).groups()
    (folder / "make_model.py").write_text(script)
    commands = "set -euo pipefail\n" + commands.replace("longer/", f"{folder}/")
    return folder, run("bash", "-c", commands, OMP_NUM_THREADS="1").stdout
