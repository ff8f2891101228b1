"""Words and signals between the commands and whoever runs them."""
