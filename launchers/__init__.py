"""The `dualtoken` command and the quickstart chain."""
