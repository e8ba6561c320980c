"""What others do of the suite's work: a module for each, which imports its package when run."""
