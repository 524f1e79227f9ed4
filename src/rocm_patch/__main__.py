"""`python -m rocm_patch`: the command line, with this Python."""

import sys

from rocm_patch.cli.main import main

sys.exit(main())
