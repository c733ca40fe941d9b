"""The parts of `python dev.py bench quality`: scenes with their ground truth, methods, figures, and what is shown of them."""
