"""RoPE that follows the length: calls on one side of its switch, beyond it too, and over it."""

import copy

import pytest
import torch
import transformers

import std_decode
from tests.decode.families import TEXT

PATCH = dict(draft_length=4, top_k_keys=8)
SWITCH = 64
LONG = dict(
    rope_type="longrope", rope_theta=1e4, factor=8.0, original_max_position_embeddings=SWITCH,
    short_factor=[1.0] * 8, long_factor=[1 + k / 2 for k in range(8)],
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=8.0)
CHANGES = "RoPE depends on the sequence length"
# What the length is read back to the host for, see `dynamic_rope_update`.
pytestmark = pytest.mark.filterwarnings("ignore:std_decode. a pass could not be captured")


def model_of(name, rope, **fields):
    fields = {**TEXT, "rope_parameters": copy.deepcopy(rope), **fields}
    torch.manual_seed(1)
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))
    return getattr(transformers, name + "ForCausalLM")(config(**fields)).float().eval()


def gemma3(**ropes):
    """Another RoPE for each type of layers."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    plain = dict(rope_type="default", rope_theta=1e4)
    model = model_of(
        "Gemma3", {kind: ropes.get(kind, plain) for kind in kinds},
        head_dim=16, sliding_window=24, layer_types=kinds, tie_word_embeddings=False,
        max_position_embeddings=SWITCH if DYNAMIC in ropes.values() else 1024,
    )  # fmt: skip
    try:
        fresh = copy.deepcopy(model)
        fresh.generate(torch.full((1, SWITCH + 1), 7), max_new_tokens=3)
    except UnboundLocalError:
        pytest.skip("LongRoPE of one type of layers fails unpatched in this transformers")
    return model


MODELS = {
    "phi3": lambda: model_of("Phi3", LONG, original_max_position_embeddings=SWITCH),
    "phimoe": lambda: model_of(
        "Phimoe", {**LONG, "short_mscale": 1.0, "long_mscale": 1.25},
        original_max_position_embeddings=SWITCH, num_local_experts=2,
    ),
    "llama": lambda: model_of("Llama", LONG),
    "gemma3": lambda: gemma3(full_attention=LONG),
}  # fmt: skip


@pytest.fixture
def case_of(make_case):
    """A model, and prompts of so many tokens, padded to the left."""

    def make(model, *lengths, **options):
        case = make_case("llama", 3, **options)
        case.model = model
        texts = [torch.randint(7, 99, (length,)).tolist() for length in lengths]
        ids = torch.tensor([[0] * (max(lengths) - len(text)) + text for text in texts])
        case.inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        return case

    return make


def check(case, fallback=None, **options):
    """The same tokens, and accelerated unless said otherwise."""
    expected = case.generate(**options)
    with std_decode.patched(case.model, **PATCH):
        got = case.generate(**options)
        stats = std_decode.last_stats(case.model)
    if fallback is None:
        assert stats.fallback is None and stats.rounds > 0
    else:
        assert fallback in stats.fallback
    case.assert_same_tokens(expected, got, **options)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_around_the_switch(case_of, name):
    """16 tokens each; the last is never read."""
    model = MODELS[name]()
    for length in (40, SWITCH - 15):
        check(case_of(model, length))
    for length in (SWITCH - 14, SWITCH):
        check(case_of(model, length), CHANGES)
    for length in (SWITCH + 1, 150):
        check(case_of(model, length))
    check(case_of(model, 40))


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_chunks_goes_by_its_first(case_of, name):
    model = MODELS[name]()
    check(case_of(model, 40), prefill_chunk_size=20)
    check(case_of(model, 150), CHANGES, prefill_chunk_size=20)
    check(case_of(model, 150), prefill_chunk_size=SWITCH + 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_goes_by_its_longest_row(case_of, name):
    model = MODELS[name]()
    for lengths in ((20, SWITCH + 1, 50), (SWITCH + 30, SWITCH - 8)):
        case = case_of(model, *lengths)
        for do_sample in (False, True):
            check(case, do_sample=do_sample)
        told = case.generate()[:, max(lengths) :]
        # The longest row ends first, and the others go on.
        row = lengths.index(max(lengths))
        check(case, eos_token_id=int(told[row, 2]), pad_token_id=0)
    check(case_of(model, 20, SWITCH, 50), CHANGES)


@pytest.mark.parametrize("name", MODELS)
def test_in_lockstep_too(case_of, name):
    case = case_of(MODELS[name](), 50, SWITCH + 20, output_scores=True)
    case.options["return_dict_in_generate"] = True
    expected = case.generate()
    with std_decode.patched(case.model, **PATCH):
        got = case.generate()
        stats = std_decode.last_stats(case.model)
    assert stats.fallback is None and stats.mode == "lockstep" and stats.rounds > 0
    del case.options["output_scores"], case.options["return_dict_in_generate"]
    case.assert_same_tokens(expected.sequences, got.sequences)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("first", "question", "fallback"),
    [(SWITCH + 6, 5, None), (20, 5, None), (20, 80, CHANGES), (SWITCH - 10, 20, CHANGES)],
    ids=["beyond", "below", "then beyond", "over it"],
)
def test_a_second_question(case_of, name, first, question, fallback, whole):
    """On a cache whose keys are of the other side, Phi-3 reads all of it again."""
    case = case_of(MODELS[name](), first, max_new_tokens=8)
    more = torch.randint(7, 99, (1, question))

    def ask():
        told = case.generate(return_dict_in_generate=True)
        ids = torch.cat([told.sequences, more], dim=1)
        new = slice(None if whole else told.sequences.shape[1] - 1, None)
        inputs = dict(input_ids=ids[:, new], attention_mask=torch.ones_like(ids))
        return case.model.generate(
            **inputs, past_key_values=told.past_key_values, max_new_tokens=12
        )

    expected = ask()
    with std_decode.patched(case.model, **PATCH):
        got = ask()
        stats = std_decode.last_stats(case.model)
    assert torch.equal(expected, got)
    if fallback is None:
        assert stats.fallback is None and stats.rounds > 0 and stats.reused_tokens > 0
    else:
        assert fallback in stats.fallback


def test_positions_of_the_callers_own(case_of):
    """The first of the generated tokens goes on from the last position, which may not be the
    largest."""
    case = case_of(MODELS["llama"](), 90)
    positions = torch.arange(90)[None]
    check(case, position_ids=positions + 10)
    ahead = torch.where(positions == 3, 70, 30)
    check(case, CHANGES, position_ids=ahead)
    check(case, CHANGES, position_ids=positions.flip(1))


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_count(case_of, name):
    """Ten more columns than the longest row has tokens."""
    model = MODELS[name]()
    for length, fallback in ((SWITCH, CHANGES), (SWITCH + 1, None)):
        case = case_of(model, 30, length)
        case.inputs = {k: torch.nn.functional.pad(v, (10, 0)) for k, v in case.inputs.items()}
        check(case, fallback)


def test_dynamic_is_constant_up_to_the_longest_that_it_has_seen(case_of):
    model = model_of("Llama", DYNAMIC, max_position_embeddings=SWITCH)
    check_states(case_of, model)


def test_dynamic_of_one_type_of_layers(case_of):
    check_states(case_of, gemma3(full_attention=DYNAMIC))


def check_states(case_of, model):
    """Two calls, the second on what the first has left behind; `patch` before either."""
    calls = [
        (120, SWITCH, None), (120, 119, None), (120, 120, None), (120, 121, CHANGES),
        (120, SWITCH - 1, CHANGES), (120, SWITCH - 15, None), (40, SWITCH, CHANGES),
    ]  # fmt: skip
    for first, second, fallback in calls:
        plain = copy.deepcopy(model)
        expected = [case_of(plain, length).generate() for length in (first, second)]
        for patched_first in (True, False):
            fresh = copy.deepcopy(model)
            got = [] if patched_first else [case_of(fresh, first).generate()]
            with std_decode.patched(fresh, **PATCH):
                for length in (first, second)[len(got) :]:
                    got.append(case_of(fresh, length).generate())
                stats = std_decode.last_stats(fresh)
            assert all(map(torch.equal, expected, got)), (first, second, patched_first)
            assert (stats.fallback is None) == (fallback is None), (first, second, stats.fallback)
            assert fallback is None or fallback in stats.fallback


@pytest.mark.parametrize("layers", ["all", "of one type"])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_patch_leaves_rope_as_it_was(case_of, kind, layers):
    """Whatever was the longest before the few tokens that it tries the model with."""
    rope = LONG if kind == "longrope" else DYNAMIC
    if layers == "all":
        length = SWITCH if kind == "dynamic" else 1024
        model = model_of("Llama", rope, max_position_embeddings=length)
    else:
        model = gemma3(full_attention=rope)
    for length in (100, 20):
        module = model.model.rotary_emb
        case_of(model, length).generate()
        attributes, buffers = vars(module).copy(), dict(module.named_buffers())
        values = {name: buffer.clone() for name, buffer in buffers.items()}
        std_decode.unpatch(std_decode.patch(model))
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
        assert dict(module.named_buffers()).keys() == buffers.keys()
        for name, buffer in module.named_buffers():
            assert buffer is buffers[name] and torch.equal(buffer, values[name])
