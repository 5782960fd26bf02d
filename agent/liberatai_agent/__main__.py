"""`python -m liberatai_agent`: the same as `liberatai-agent`."""

import sys

from liberatai_agent.cli import main

sys.exit(main())
