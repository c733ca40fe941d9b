"""Developer tooling behind `dev.py`. Standard library only; nothing here is part of the node pack."""
