"""Old outputs on old or new inputs, and the loss of departing from them."""
