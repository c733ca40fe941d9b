"""The parts of `python dev.py bench cost`. A job measures one thing about one variant, in a process of its own."""
