"""``python -m std_decode`` is ``std-decode``."""

import sys

from std_decode.app.main import main

sys.exit(main())
