"""Tiny random models of every family that is supported."""

from tests.helpers.families.shapes import EXPERTS as EXPERTS
from tests.helpers.families.shapes import FAMILIES as FAMILIES
from tests.helpers.families.shapes import FURTHER as FURTHER
from tests.helpers.families.shapes import GEMMA4 as GEMMA4
from tests.helpers.families.shapes import INSIDE_ALONE as INSIDE_ALONE
from tests.helpers.families.shapes import LAYERS as LAYERS
from tests.helpers.families.shapes import LINKED as LINKED
from tests.helpers.families.shapes import MIXTURES as MIXTURES
from tests.helpers.families.shapes import NATIVE_SHAPE as NATIVE_SHAPE
from tests.helpers.families.shapes import SCALED as SCALED
from tests.helpers.families.shapes import SHAPE as SHAPE
from tests.helpers.families.shapes import TURNED as TURNED
from tests.helpers.families.shapes import VOCABULARY as VOCABULARY
from tests.helpers.families.tiny import model_type as model_type
from tests.helpers.families.tiny import prompt as prompt
from tests.helpers.families.tiny import randomise as randomise
from tests.helpers.families.tiny import require as require
from tests.helpers.families.tiny import tiny as tiny
from tests.helpers.families.windows import HALF as HALF
from tests.helpers.families.windows import WINDOWS as WINDOWS
