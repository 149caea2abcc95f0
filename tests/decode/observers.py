"""What a caller may hand to generate to see every step. It changes nothing and remembers all."""

from __future__ import annotations

from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


class Watches(LogitsProcessor):
    """Not one of transformers' own, so the batch goes in lockstep."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.clone())
        return scores


class Streams(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.clone())

    def end(self):
        self.calls.append("end")
