"""What `benchmarks/pie.py` is made of: the data set, the methods and the figures of PIE-Bench (Ju et al., ICLR 2024)."""
