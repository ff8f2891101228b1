"""The folder of a run: its record, its logger, its checkpoint to resume from, and its summary."""
