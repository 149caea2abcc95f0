"""What only a GPU shows: real graphs, real launches, the generator of the device, bfloat16."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import std_decode
from std_decode.passes import graphs

pytestmark = pytest.mark.gpu
FAMILIES = ("qwen2_vl", "llava_onevision", "llama", "gemma3")
LOCKSTEP = dict(return_dict_in_generate=True, output_scores=True)


@pytest.fixture
def make_gpu_case(make_case):
    torch.backends.cuda.matmul.allow_tf32 = False

    def make(*args, dtype=torch.float32, **options):
        case = make_case(*args, **options)
        case.model.to("cuda", dtype)
        case.inputs = {name: value.to("cuda") for name, value in case.inputs.items()}
        return case

    return make


def sequences(output):
    return output if isinstance(output, torch.Tensor) else output.sequences


@pytest.mark.parametrize("mode", ["ragged", "lockstep"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_unpatched(make_gpu_case, family, rows, mode):
    """With and without graphs, drafts or none, several calls on the same graphs."""
    for seed, do_sample in ((0, False), (1, True), (2, True)):
        case = make_gpu_case(family, seed, rows, eos=rows > 1, do_sample=do_sample)
        options = LOCKSTEP if mode == "lockstep" else {}
        expected = case.generate()
        for draft_length, top_k_keys in ((0, 1), (4, 4), (7, 10_000)):
            for cuda_graphs in (False, True):
                patch = dict(draft_length=draft_length, top_k_keys=top_k_keys)
                with std_decode.patched(case.model, cuda_graphs=cuda_graphs, **patch):
                    outputs = [sequences(case.generate(**options)) for _ in range(3)]
                    stats = std_decode.last_stats(case.model)
                assert stats.mode == mode and stats.fallback is None
                assert (stats.graph_replays > 0) == cuda_graphs, stats.eager_because
                for got in outputs:
                    case.assert_same_tokens(expected, got)


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_of_one_shape_give_the_same_bits_whatever_is_drafted(make_gpu_case, family):
    for seed, rows in ((0, 1), (1, 3)):
        case = make_gpu_case(family, seed, rows, dtype=torch.bfloat16, max_new_tokens=48)
        case.inputs = {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in case.inputs.items()
        }
        told = []
        for draft_length in (0, 1, 4, 7, "auto"):
            for cuda_graphs in (False, True):
                options = dict(draft_length=draft_length, cuda_graphs=cuda_graphs, top_k_keys=4)
                with std_decode.patched(case.model, reproducible=True, **options):
                    told.append(case.generate(output_logits=True, return_dict_in_generate=True))
                    assert std_decode.last_stats(case.model).promise == "reproducible"
        for other in told[1:]:
            assert torch.equal(other.sequences, told[0].sequences)
            assert all(map(torch.equal, other.logits, told[0].logits))


def test_the_generator_ends_where_it_does_unpatched(make_gpu_case):
    case = make_gpu_case("qwen2_vl", 3, rows=3, do_sample=True)

    def twice():
        first = case.generate()
        return first, case.model.generate(**case.inputs, **case.options)

    expected, state = twice(), torch.cuda.get_rng_state()
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        got = twice()
    assert all(map(torch.equal, expected, got))
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_a_second_question_on_the_same_graphs(make_gpu_case):
    case = make_gpu_case("llama", 4, max_new_tokens=12)
    question = torch.randint(7, 99, (1, 6), device="cuda")

    def ask():
        first = case.generate(return_dict_in_generate=True)
        ids = torch.cat([first.sequences, question], dim=1)
        cache = first.past_key_values
        # Told, or generate takes an emitted pad token for padding, which no kv_start can express.
        how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12)
        return first.sequences, case.model.generate(ids, past_key_values=cache, **how)

    expected = ask()
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        for _ in range(3):
            assert all(map(torch.equal, expected, ask()))
            assert std_decode.last_stats(case.model).fallback is None
        assert std_decode.last_stats(case.model).graph_replays > 0


def test_a_capture_that_fails_leaves_nothing_behind():
    """The stream, the allocator and the generator are as they were, and the next one goes well."""
    device = torch.device("cuda", torch.cuda.current_device())
    number, before = torch.zeros((), device=device), torch.cuda.current_stream()

    def reads():
        kept = torch.empty(1 << 20, device=device)
        return kept * number.item()

    with pytest.raises(RuntimeError, match="captur"):
        graphs.capture(reads, graphs.Pool(device))
    assert graphs.spoiled is None and torch.cuda.current_stream() == before
    torch.rand(3, device=device)  # an error where the generator is still captured
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    block = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held
    replay = graphs.capture(lambda: number + 1, graphs.Pool(device))
    number.fill_(4)
    assert int(replay()) == 5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_a_gpu_that_is_not_current(make_case):
    for where in ("cuda:0", "cuda:1"):
        case = make_case("llama", 5)
        case.model.to(where)
        case.inputs = {name: value.to(where) for name, value in case.inputs.items()}
        expected = case.generate()
        with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
            for _ in range(3):
                case.assert_same_tokens(expected, case.generate())
            assert std_decode.last_stats(case.model).graph_replays > 0
        assert torch.cuda.current_device() == 0


def test_one_synchronisation_a_round(make_gpu_case):
    case = make_gpu_case("llama", 5, rows=2, max_new_tokens=41)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=10_000):
        for _ in range(3):
            case.generate()
        counts = []
        for most in (11, 41):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                case.generate(max_new_tokens=most)
            events = [e for e in profiled.events() if "Synchronize" in e.name]
            counts.append(len([e for e in events if "Stream" in e.name]))
            rounds = std_decode.last_stats(case.model).rounds
        assert rounds == 8 and counts[1] - counts[0] == 6


def test_memory_does_not_grow_from_call_to_call(make_gpu_case):
    case = make_gpu_case("llama", 6)
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
        for _ in range(3):
            case.generate()
        before = torch.cuda.memory_allocated()
        for _ in range(200):
            case.generate(max_new_tokens=4)
        assert torch.cuda.memory_allocated() <= before
    assert torch.cuda.memory_allocated() < before


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_compiled_passes_say_the_same(make_gpu_case, family):
    case = make_gpu_case(family, 7, max_new_tokens=24)
    expected = case.generate()
    with std_decode.patched(case.model, draft_length=4, top_k_keys=8, compile=True):
        for _ in range(2):
            case.assert_same_tokens(expected, case.generate())
        stats = std_decode.last_stats(case.model)
    assert stats.graph_replays > 0 and stats.eager_because is None


def test_bfloat16_differs_only_near_ties(make_gpu_case, record_property):
    """How often, and by how little, is what `bench gpu` reports from this test's properties."""
    tokens = differing = 0
    largest = 0.0
    for seed in range(8):
        case = make_gpu_case("qwen2_vl", seed, dtype=torch.bfloat16, max_new_tokens=32)
        plain = case.generate(return_dict_in_generate=True, output_scores=True)
        with std_decode.patched(case.model, draft_length=4, top_k_keys=8):
            got = case.generate()[0, -32:].tolist()
        tokens += 32
        for step, (token, expected) in enumerate(zip(got, plain.sequences[0, -32:].tolist())):
            if token != expected:  # what follows a difference is another text
                scores = plain.scores[step][0].float().log_softmax(-1)
                largest = max(largest, float(scores.max() - scores[token]))
                differing += 1
                break
    record_property("bf16_tokens", tokens)
    record_property("bf16_first_differences", differing)
    record_property("bf16_largest_margin", largest)
    # bfloat16 keeps 8 bits, so logits of about 10 are about 0.04 apart.
    assert largest < 0.3
