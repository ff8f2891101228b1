"""Text that the commands print in a terminal: help, shipped configurations, encodings and closed streams."""
