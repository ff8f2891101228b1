"""Per-sample results: which sample it was, what each attack did to it, and their files."""
