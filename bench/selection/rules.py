"""Rules of re-selection that `bench selection` tries beside the library's own, in words."""

from __future__ import annotations

from dataclasses import dataclass

YARDSTICKS = ("static", "library", "exact")


@dataclass(frozen=True)
class Rule:
    """One way to renew the selection.

    Attributes:
        when: "always": after every round; "never". "rejected": after a round that rejected a
            draft; scores are taken in every round. "lagged": the same one round later, so that
            only the round after a rejection has to take scores. "alternate": after every second
            round, which takes the scores. A number: while the running mean of the share of drafts
            accepted is below it.
        rows: the verified rows that count: "all"; "bonus", the last; "ends", the first (of the
            pending token) and the last; "accepted", the first and those of accepted drafts;
            "accepted+bonus"; "newest", the last of the accepted.
        estimate: of a row's log-sum-exp: "draft", its draft step's; "max", the larger of that and
            the head's in the verification before; "clamp", the draft step's, but with
            min(1, exp(logit - lse)) for sigmoid(logit - lse); "exact", the softmax itself, which
            takes a second pass.
        fade: what is left of a key's importance a round later; 0 forgets it.
        smoothing: "max": the largest of the faded importance and the newest share; "mean": an
            exponential mean of the shares.
    """

    when: str | float = "always"
    rows: str = "all"
    estimate: str = "draft"
    fade: float = 0.9
    smoothing: str = "max"


# By what they vary: name, rule, in words. Each differs from "every round" in what is named.
_TABLE: dict[str, list[tuple[str, Rule | None, str]]] = {
    "": [
        ("static", Rule(when="never"), "the prompt's selection, kept"),
        ("library", None, "patch(reselect=True), as it is"),
        ("exact", Rule(estimate="exact"), "softmax instead of an estimate; reads the keys twice"),
        ("every round", Rule(), "all verified rows, draft step's lse, fading by 0.9, maximum"),
    ],
    "when": [
        ("rejected", Rule(when="rejected"), "only after a round that rejected a draft"),
        ("lagged", Rule(when="lagged"), "scores and selection only in the round after such a one"),
        ("alternate", Rule(when="alternate"), "every second round"),
        ("under 90%", Rule(when=0.9), "while the running mean of acceptance is under 90%"),
        ("under 70%", Rule(when=0.7), "while it is under 70%"),
    ],
    "rows": [
        ("bonus", Rule(rows="bonus"), "the last verified row only"),
        ("ends", Rule(rows="ends"), "the first and the last verified row"),
        ("accepted", Rule(rows="accepted"), "rows of accepted tokens (host read)"),
        ("accepted+bonus", Rule(rows="accepted+bonus"), "these and the last row (host read)"),
        ("newest", Rule(rows="newest"), "the row of the last accepted token (host read)"),
    ],
    "estimate": [
        ("max dense", Rule(estimate="max"), "at least the head's lse of the last verification"),
        ("clamp", Rule(estimate="clamp"), "min(1, exp(logit - lse)) for the sigmoid"),
    ],
    "smoothing": [
        ("none", Rule(fade=0.0), "the newest round's scores alone"),
        ("0.8", Rule(fade=0.8), "fading by 0.8 a round"),
        ("0.95", Rule(fade=0.95), "fading by 0.95 a round"),
        ("mean 0.8", Rule(fade=0.8, smoothing="mean"), "exponential mean, 0.8 of the old"),
        ("mean 0.9", Rule(fade=0.9, smoothing="mean"), "exponential mean, 0.9 of the old"),
        ("exact, none", Rule(estimate="exact", fade=0.0), "the newest softmax alone"),
    ],
}
RULES = {name: rule for rules in _TABLE.values() for name, rule, _ in rules}
GROUPS = {name: group for group, rules in _TABLE.items() for name, *_ in rules}


def in_words() -> str:
    lines = []
    for group, rules in _TABLE.items():
        lines += [f"  {name:<15} {group:<10} {words}" for name, _, words in rules]
    return "\n".join(line.rstrip() for line in lines)
