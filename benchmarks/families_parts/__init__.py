"""The parts of `python dev.py bench families`; the tests use its architectures, too."""
