"""`python -m liberatai_agent`: the same as `liberatai-agent`."""

import sys
from pathlib import Path

if not sys.flags.safe_path and not Path(sys.path[0], "liberatai_agent").is_dir():
    # `python -m` puts the working directory there: files in it must not stand in for Python's own.
    del sys.path[0]

from liberatai_agent.cli import main

sys.exit(main())
