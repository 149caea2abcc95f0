"""``python -m std_decode`` is ``std-decode``."""

import sys

from std_decode.cli import main

sys.exit(main())
