"""What methods retain, beyond the demo: ``python -m bench.retention`` from the checkout's root.

Further methods and data, the sweeps that choose settings, published figures, and two texts. May
import all of cl_optim, of which nothing imports this.
"""
