"""Calls of `generate` that run together, each with the ids that it has alone."""

from runtime.batch.call import Call as Call
from runtime.batch.call import generated as generated
from runtime.batch.calls import Batch as Batch
from runtime.batch.feed import Piece as Piece
from runtime.batch.memory import KVMemory as KVMemory
