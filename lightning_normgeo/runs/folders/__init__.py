"""The folder of a run: its lock and state, and the checkpoint from which it resumes."""
