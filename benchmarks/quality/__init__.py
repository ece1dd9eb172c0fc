"""Pictures and losses of methods on the embedded model, and the cost of one optimisation step."""
