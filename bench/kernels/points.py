"""What `bench kernels` times: the grid, the presets, and what a point takes of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from bench.models.dimensions import CONVOLUTION, SHAPES, Shape
from std_decode.weights import quantize

STATEFUL = ("gated_delta_rule", "causal_conv1d")  # of layers that keep a state
OPS = (
    "verify_attention",
    "verify_attention_with_scores",
    "sparse_attention",
    "select_topk",
    "score_keys",
    "int4_linear",
    *STATEFUL,
)
SCORING = 64  # queries that score_keys averages over
# Those with the same input as one, as drafts read them.
MATRICES = ("qkv", "o", "gate_up", "down", "head")
TAIL = 64  # keys after the listed ones that sparse_attention reads
# Of other head dims, for kernels only; from the models' config.json on Hugging Face.
MORE_SHAPES = {
    "llama-3.2-1b": Shape("llama", 2048, 16, 32, 8, 8192, 128256, 5e5),
    "gemma-2-9b": Shape("gemma2", 3584, 42, 16, 8, 14336, 256000, 1e4, head_dim=256),
}
KNOWN_SHAPES = {**SHAPES, **MORE_SHAPES}
MODELS = ("qwen2-vl-7b", "llava-onevision-72b", "llama-3-8b", "llava-next-video-7b")
HYBRIDS = ("qwen3.5-27b",)  # for STATEFUL ops, where no model that was asked for has them


class Point(NamedTuple):
    """One op at one size."""

    op: str
    shape: str  # a key of KNOWN_SHAPES
    batch: int
    context: int = 0  # N; 0 for an op that reads no cache
    tokens: int = 0  # T, for an op that has it
    keys: int = 0  # K, for an op that has it
    matrix: str = ""  # of int4_linear: one of MATRICES

    @property
    def model(self) -> Shape:
        return KNOWN_SHAPES[self.shape]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs and inputs of the linear layer."""
        model = self.model
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        return {
            "qkv": (queries + 2 * keys, model.hidden),
            "o": (model.hidden, queries),
            "gate_up": (2 * model.intermediate, model.hidden),
            "down": (model.hidden, model.intermediate),
            "head": (model.vocabulary, model.hidden),
        }[self.matrix]

    @property
    def size(self) -> str:
        """As a person reads it, the model left out."""
        if self.matrix:
            outputs, inputs = self.matrix_shape
            return f"{self.batch} x [{outputs}, {inputs}]"
        parts = {"B": self.batch, "N": self.context, "T": self.tokens, "K": self.keys}
        return ", ".join(f"{name} {value}" for name, value in parts.items() if value)


class Job(NamedTuple):
    """A point, and which rivals to time beside it: None for all."""

    point: Point
    rivals: tuple[str, ...] | None = None


class Grid(NamedTuple):
    """The product of these, as far as an op has them."""

    shapes: Sequence[str]
    batches: Sequence[int]
    contexts: Sequence[int]
    tokens: Sequence[int]
    keys: Sequence[int]
    matrices: Sequence[str] = ("gate_up", "down")


GPU_GRID = Grid(MODELS, (1, 8, 32), (8192, 32768, 131072, 524288), (1, 4, 10), (256, 1024, 4096),
                MATRICES)  # fmt: skip
CPU_GRID = Grid(MODELS, (1, 8), (8192, 32768), (1, 4, 10), (256, 1024, 4096))
QUICK_GPU = Grid(MODELS[:1], (1,), (8192, 32768, 131072), (1, 4), (1024,), ("gate_up",))
QUICK_CPU = Grid(MODELS[:1], (1,), (2048, 8192, 16384), (1, 4), (256,), ("gate_up",))


def grid(sizes: Grid, ops: Sequence[str] = OPS) -> Iterator[Job]:
    """Every point; those that share a KV cache follow each other, so that it is made once."""
    for shape, batch in product(sizes.shapes, sizes.batches):
        for context in sizes.contexts:
            for op, tokens, keys in product(ops, sizes.tokens, sizes.keys):
                has_tokens = op not in ("select_topk", "score_keys")
                has_keys = op in ("sparse_attention", "select_topk")
                # Once for each size that the op has.
                if (
                    op in ("int4_linear", *STATEFUL)
                    or not has_tokens
                    and tokens != sizes.tokens[0]
                ):
                    continue
                if not has_keys and keys != sizes.keys[0]:
                    continue
                yield Job(Point(op, shape, batch, context, has_tokens * tokens, has_keys * keys))
        if "int4_linear" in ops:
            for matrix in sizes.matrices:
                yield Job(Point("int4_linear", shape, batch, matrix=matrix))
    hybrids = [shape for shape in sizes.shapes if KNOWN_SHAPES[shape].recurrent] or HYBRIDS
    stateful = [op for op in STATEFUL if op in ops]
    for shape, batch, op, tokens in product(hybrids, sizes.batches, stateful, sizes.tokens):
        yield Job(Point(op, shape, batch, tokens=tokens))


def round_preset() -> Iterator[Job]:
    """The sizes that decide on a GPU, most telling first, for the time that `bench gpu` has.

    What is compiled for each size comes last: it takes ten seconds a size.
    """
    model = MODELS[0]
    verify = [
        Point("verify_attention", model, B, N, T)
        for B, N, T in ((1, 131072, 5), (16, 32768, 5), (1, 25088, 5), (1, 131072, 1))
    ]
    select = [
        Point("select_topk", model, B, N, keys=1024)
        for B, N in ((1, 131072), (1, 25088), (16, 32768))
    ]
    sparse = [
        Point("sparse_attention", model, B, N, 1, K)
        for B, N, K in ((1, 131072, 1024), (16, 32768, 1024), (1, 131072, 3072))
    ]
    each = [(rows, matrix) for rows in (1, 4, 16, 32) for matrix in MATRICES]
    linear = [Point("int4_linear", model, rows, matrix=matrix) for rows, matrix in each]
    telling = [p for p in linear if p.batch == 1 or p.matrix in ("gate_up", "down")]
    score = [Point("score_keys", model, B, N) for B, N in ((1, 25088), (1, 131072), (16, 32768))]
    scores = Point("verify_attention_with_scores", model, 16, 32768, 5)
    compiled = ("flexattention",)
    quick = ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa", "sdpa+eager", "flash-attn",
             "flash-attn-3", "flashinfer", "xformers", "torch.topk", "torch.topk+sort",
             "flashinfer+ties", "gather+sdpa", "eager", "dense-weights", "int4pack_mm", "gemlite",
             "partials")  # fmt: skip
    rest = [point for point in linear if point not in telling]
    for point in (*verify, scores, *select, *sparse, *telling, *score, *rest):
        yield Job(point, quick)
    for point in (verify[0], sparse[0], verify[1]):
        yield Job(point, compiled)


PRESETS = {"round": round_preset}


def kv_bytes(point: Point, itemsize: int) -> int:
    """Of the keys and values of a point's cache."""
    model = point.model
    return 2 * point.batch * model.kv_heads * point.context * model.head_dim * itemsize


def needed_bytes(point: Point, itemsize: int) -> int:
    """About what our op, its inputs and the comparison with the reference take at once."""
    model = point.model
    if point.matrix:
        outputs, inputs = point.matrix_shape
        # The weights, their 4-bit copy rounded back to float32, and the copy itself twice.
        return outputs * inputs * (itemsize + 5) + quantize.temporary_bytes(outputs, inputs)
    if point.op in STATEFUL:
        assert model.recurrent is not None
        inputs = point.batch * (2 * point.tokens + CONVOLUTION) * model.recurrent.channels
        return 3 * point.batch * model.recurrent.state_bytes + 3 * itemsize * inputs
    rows = point.batch * model.kv_heads * point.context
    if point.op == "select_topk":
        # Scores, and a stable sort of a part of them.
        return model.layers * rows * 4 + 24 * min(model.layers * rows, SORTED_AT_ONCE)
    # The reference takes a query head at a time: keys, values and logits in float64.
    width = SCORING if point.op == "score_keys" else point.tokens
    reference = point.context * (4 * model.head_dim + 6 * width) * 8
    # Scores and a copy; the random order that listed keys are drawn from.
    each = {"score_keys": 8, "verify_attention_with_scores": 8, "sparse_attention": 24}
    return kv_bytes(point, itemsize) + reference + each.get(point.op, 0) * rows


SORTED_AT_ONCE = 1 << 26


def reason_to_skip(point: Point, itemsize: int, limit: float) -> str | None:
    """Why a point cannot be run with `limit` bytes of memory, None if it can."""
    if point.op == "sparse_attention" and point.keys + TAIL > point.context:
        return f"K {point.keys} and a tail of {TAIL} are more than N"
    if point.op == "select_topk" and point.keys > point.context:
        return f"K {point.keys} is more than N"
    needed = needed_bytes(point, itemsize)
    if needed > limit:
        return f"does not fit: needs about {needed / 1e9:.1f} GB of {limit / 1e9:.1f} GB"
    return None
