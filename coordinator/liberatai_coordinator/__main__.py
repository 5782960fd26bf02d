"""`python -m liberatai_coordinator` is `liberatai`."""

import sys

from liberatai_coordinator.cli.app import main

sys.exit(main())
