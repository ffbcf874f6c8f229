"""What one GPU proves in some minutes (`make test-gpu`); not yet run on one."""
