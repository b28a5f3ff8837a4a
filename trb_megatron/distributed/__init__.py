"""Ranks and shards: process groups, pipeline, vocabulary-parallel mathematics, CPU backend."""
