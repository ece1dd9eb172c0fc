"""What every measurement shares: shapes of real models, the peers of each op, who may serve it."""
