import sys

from moco_fast.compat.launcher import main

if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the working directory, which `python SCRIPT` does not search

sys.exit(main())
