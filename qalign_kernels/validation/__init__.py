"""Every op, on every backend and dtype of this machine, against float64."""
