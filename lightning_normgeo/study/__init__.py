"""Studies, which are grids of runs, and their command ``normgeo study``."""

from lightning_normgeo.study.definition import Study as Study
from lightning_normgeo.study.definition import load_study as load_study
