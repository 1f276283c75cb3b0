"""Families of models: what their layers look like, and which of them can be driven."""

from runtime.decoding.families.check import check_config as check_config
from runtime.decoding.families.check import check_supported as check_supported
from runtime.decoding.families.check import family_of as family_of
from runtime.decoding.families.check import has_windows as has_windows
from runtime.decoding.families.check import own_attentions as own_attentions
from runtime.decoding.families.check import text_decoder as text_decoder
from runtime.decoding.families.family import AFTER as AFTER
from runtime.decoding.families.family import AROUND as AROUND
from runtime.decoding.families.family import BEFORE as BEFORE
from runtime.decoding.families.family import CACHE as CACHE
from runtime.decoding.families.family import CACHE_LENGTH as CACHE_LENGTH
from runtime.decoding.families.family import WEIGHINGS as WEIGHINGS
from runtime.decoding.families.family import Family as Family
from runtime.decoding.families.keys import layer_configs as layer_configs
from runtime.decoding.families.keys import layers_with_keys as layers_with_keys
from runtime.decoding.families.keys import numbers_per_token as numbers_per_token
from runtime.decoding.families.table import FAMILIES as FAMILIES
