"""Verdicts on the paper's claims: what a run supports, refutes, leaves undecided or does not test, and by which number.

:data:`~lightning_normgeo.runs.verdicts.claims.claims.CLAIMS` lists the claims. Each module of claims has the functions
that judge them from the record of a run. A new claim is one more
:class:`~lightning_normgeo.runs.verdicts.claims.claim.Claim` in the module of its subject.
"""
