"""Inner products of a weight, its gradient and its optimizer state, read in one pass over memory."""
