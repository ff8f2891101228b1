"""The table of logged quantities: every metric key once, with its unit and its meaning."""
