"""Run a study from its file: python tools/study.py run studies/quickstart.yaml"""

import os
from pathlib import Path

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("study", scripts_dir=Path(os.path.relpath(Path(__file__).parent)))
