"""Run a study from its file: python tools/study.py run studies/quickstart.yaml"""

import os
from pathlib import Path

from trainer.commands.study import main

if __name__ == "__main__":
    main(scripts_dir=Path(os.path.relpath(Path(__file__).parent)))
