"""The parts of the benchmark of distilled edits."""
