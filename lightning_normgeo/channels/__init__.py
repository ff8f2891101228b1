"""Channels of batch-normalized networks: which matter by γ, which are alike, and what removing them costs."""

from lightning_normgeo.utilities.versions import require

require("torch", "numpy")

from lightning_normgeo.channels.criteria import CRITERIA as CRITERIA
from lightning_normgeo.channels.masked_model import REPLACEMENTS as REPLACEMENTS
from lightning_normgeo.channels.masked_model import masked_channels as masked_channels
from lightning_normgeo.channels.masking import masking as masking
from lightning_normgeo.channels.measure import channel_table as channel_table
from lightning_normgeo.channels.report import MaskedAccuracy as MaskedAccuracy
from lightning_normgeo.channels.report import MaskingReport as MaskingReport
from lightning_normgeo.channels.table import ChannelTable as ChannelTable
from lightning_normgeo.channels.table import LayerChannels as LayerChannels
