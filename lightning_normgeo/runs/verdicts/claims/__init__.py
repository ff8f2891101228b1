"""The paper's claims by subject, each with the function that judges it from the record of a run."""
