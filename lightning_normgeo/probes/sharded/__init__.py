"""Probes of weights sharded by FSDP2: every process reads its own rows, and a collective combines the results."""
