"""Sampled texts against their exact distribution."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, TOKENS, BATCH = 6, 3, 1000
DRAWS = 20_000

_HELP = """\
Draws texts of 3 tokens from a tiny model with 6 tokens, patched, with drafts that read few keys,
and compares how often each of the 216 comes with its exact probability under the dense model, by
Pearson's chi-square. Ragged and in lockstep; the last row of the table shows what the test says
when every draft is believed.
Exit status: 0, 1 if the patched model's p-value is below 0.001."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "draws",
        help="sampled texts against their exact distribution",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--draws", type=int, default=DRAWS, metavar="N", help=f"of each kind ({DRAWS})")
    add("--seed", type=int, default=0, help="(0)")
    add("--out", type=Path, metavar="DIR", help="write a section of DIR/reliability.md")
    parser.set_defaults(run=run)


def make_model() -> tuple[Any, Tensor]:
    """A Llama of two layers, and a prompt ``[1, 20]``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(2, VOCABULARY, (1, 20))


@torch.no_grad()
def exact(model: Any, prompt: Tensor) -> Tensor:
    """The probability of each text, float64 ``[VOCABULARY ** TOKENS]``."""
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=TOKENS)))
    ids = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    logits = model.double()(ids).logits[:, -TOKENS - 1 : -1]
    model.float()
    return logits.log_softmax(-1).gather(2, texts[..., None]).sum((1, 2)).exp()


def draw(model: Any, prompt: Tensor, count: int, seed: int, **options: Any) -> Tensor:
    """How often each text came, ``[VOCABULARY ** TOKENS]``."""
    torch.manual_seed(seed)
    counts = torch.zeros(VOCABULARY**TOKENS, dtype=torch.int64)
    place = VOCABULARY ** torch.arange(TOKENS - 1, -1, -1)
    for _ in range(count // BATCH):
        inputs = dict(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        told = model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=TOKENS,
            num_return_sequences=BATCH, **options,
        )  # fmt: skip
        told = getattr(told, "sequences", told)[:, prompt.shape[1] :]
        counts += torch.bincount(told @ place, minlength=len(counts))
    return counts


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of Pearson's chi-square; texts that are expected less than 10 times count as one."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    found, wanted = counts[~rare].double(), expected[~rare]
    if rare.any():
        found = torch.cat([found, counts[rare].sum()[None].double()])
        wanted = torch.cat([wanted, expected[rare].sum()[None]])
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor(len(wanted) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


LOCKSTEP = dict(return_dict_in_generate=True, output_scores=True)
KINDS = {"ragged": {}, "lockstep": LOCKSTEP}
# All of the prompt counts as video, so drafts read five keys of it.
PATCH = dict(draft_length=2, top_k_keys=1, visual_token_ids=list(range(VOCABULARY)))


def run(options: argparse.Namespace) -> int:
    from unittest import mock

    import std_decode
    from bench.sections import about
    from std_decode.rounds.rows import Rows
    from tests.reliability import report
    from tests.reliability.lossless import quiet

    quiet()
    model, prompt = make_model()
    wanted = exact(model, prompt)
    rows = {"unpatched": p_value(draw(model, prompt, options.draws, options.seed), wanted)}
    with std_decode.patched(model, **PATCH):
        for name, more in KINDS.items():
            counts = draw(model, prompt, options.draws, options.seed + 1, **more)
            rows[f"patched, {name}"] = p_value(counts, wanted)
        stats = std_decode.last_stats(model)
        with mock.patch.object(Rows, "keep", believing(Rows.keep)):
            counts = draw(model, prompt, options.draws, options.seed + 1)
        rows["every draft believed (wrong on purpose)"] = p_value(counts, wanted)
    lines = [f"| {name} | {value:.3g} |" for name, value in rows.items()]
    text = "\n".join([
        f"`python -m tests.reliability draws --draws {options.draws}` ({about()}): texts of "
        f"{TOKENS} tokens of {VOCABULARY}, so {len(wanted)} in all, against their exact "
        "probabilities; drafts of 2 that read 5 keys of the prompt's 20, "
        f"{stats.acceptance_rate:.0%} accepted.",
        "", "| draws | p-value of chi-square |", "|---|---|", *lines,
    ])  # fmt: skip
    print(text)
    report.write(options.out, "Sampling", text)
    return int(min(rows[f"patched, {name}"] for name in KINDS) < 1e-3)


def believing(keep: Any) -> Any:
    """`Rows.keep`, of all drafts."""
    return lambda rows, tokens, agreed, limit: keep(
        rows, tokens, agreed * 0 + tokens.shape[1] - 1, limit
    )
