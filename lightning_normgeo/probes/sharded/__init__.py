"""Weights sharded by FSDP2: every process reads its own rows."""
