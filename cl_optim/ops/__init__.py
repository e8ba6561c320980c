"""One file per kernel family: what it computes, and who computes it."""
