"""Published comparisons of initialisations, run again on real data.

    python -m benchmarks.studies toy   # "Beyond Zero Initialization": MNIST, then Fashion-MNIST
    python -m benchmarks.studies lm    # methods × learning rates × seeds on movie reviews

Each keeps its runs in a table in benchmarks/results/, from which the verdict and the figure are
made; runs that are in the table already are not run again.
"""
