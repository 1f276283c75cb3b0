"""Calls of `generate` that run together, each with the ids that it has alone."""

from runtime.batch.calls import Batch as Batch
from runtime.batch.calls import Call as Call
from runtime.batch.calls import generated as generated
from runtime.batch.feed import Piece as Piece
from runtime.batch.memory import KVMemory as KVMemory
