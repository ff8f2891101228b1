"""The commands of Lightning's Trainer: ``normgeo fit | validate | test | predict``."""

from lightning_normgeo.cli.command import NormgeoCLI as NormgeoCLI
from lightning_normgeo.cli.command import main as main
from lightning_normgeo.cli.command import run as run
from lightning_normgeo.terminal.shipped_configs import configs_folder as configs_folder
