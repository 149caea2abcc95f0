"""What a generate call promises of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from std_decode.model.portions import Portions

Kind = Literal["unpatched", "reproducible", "rounded"]


@dataclass(frozen=True)
class Promise:
    """Of one generate call.

    Attributes:
        kind: "unpatched": the tokens are the unpatched model's, bit for bit of each logit;
            "reproducible": those of dense decoding by our ops, whatever is drafted and however
            long passes take; "rounded": the unpatched model's but for what rounding decides.
        rows: tokens in each decoding pass of a reproducible call.
    """

    kind: Kind = "rounded"
    rows: int = 0

    def portions(self, batch: int, tokens: int) -> Portions | None:
        """What a decoding pass of ``[B, T]`` tokens runs in; None: it needs nothing."""
        if self.kind == "rounded" or tokens == 1:
            return None
        return Portions(batch, tokens, alone=self.kind == "unpatched")


ROUNDED = Promise()
