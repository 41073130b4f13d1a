"""Every op against its peers: ``python -m bench`` for the report, ``pytest bench/`` for the suites."""
