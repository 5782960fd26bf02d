"""`python -m liberatai_coordinator` is `liberatai`."""

import sys
from pathlib import Path

if not sys.flags.safe_path and not Path(sys.path[0], "liberatai_coordinator").is_dir():
    # `python -m` puts the working directory there: files in it must not stand in for Python's own.
    del sys.path[0]

from liberatai_coordinator.cli.app import main

sys.exit(main())
