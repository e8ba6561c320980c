"""What only a GPU can show, one file a question; `bench/gpu.sh` runs them in stages."""
