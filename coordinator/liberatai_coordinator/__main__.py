"""`python -m liberatai_coordinator` is `liberatai`."""

import sys

from liberatai_coordinator.cli import main

sys.exit(main())
