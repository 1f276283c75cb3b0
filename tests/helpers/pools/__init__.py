"""Pools of KV blocks in which calls are put out."""
