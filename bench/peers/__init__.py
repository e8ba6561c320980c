"""What others do of the suite's work; a package is imported when its work is asked for."""
