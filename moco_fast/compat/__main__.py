import sys

from moco_fast.compat.launcher import main

sys.exit(main())
