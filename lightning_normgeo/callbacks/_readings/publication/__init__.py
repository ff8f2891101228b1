"""The way of readings to loggers: one transfer to the host, the keys, and the table of layers."""
