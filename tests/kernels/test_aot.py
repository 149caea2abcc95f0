"""Kernels compiled for GPUs that are not there, and the checker of what comes out."""

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import compile as bench  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.assembly import Report, inspect, loop_instructions, loop_loads  # noqa: E402
from std_kernels import _tuning  # noqa: E402
from std_kernels._renew_importance_kernels import aot_specs as renew_specs  # noqa: E402

OPS = sorted({row.op for row in _tuning.TABLE})


def one_row_per_kernel(target):
    """Each kernel function once, at head dim 128 in bf16 where it has either."""
    seen = set()
    for case in bench.cases([target], OPS):
        name = bench.specs_of(target, case.dtype, case.row)[case.spec].kernel.__name__
        typical = case.row.head_dim in (0, 128) and (case.dtype == "bf16" or not case.row.head_dim)
        if typical and name not in seen:
            seen.add(name)
            yield pytest.param(case, id=f"{target}-{name.strip('_')}")


@pytest.mark.aot
@pytest.mark.parametrize("case", [*one_row_per_kernel("sm_90"), *one_row_per_kernel("gfx942")])
def test_kernels_compile_well(case):
    result = bench.compile_case(case)
    assert not result.problems
    assert result.report.registers > 0
    assert bool(result.report.dots) == bool(result.report.matrix)


@pytest.mark.aot
@pytest.mark.parametrize("op", ["score_keys", "sparse_attention", "verify_attention"])
def test_rows_that_begin_at_multiples_of_8_are_read_16_bytes_at_a_time(op):
    case = next(case for case in bench.cases(["sm_90"], [op]) if case.row.head_dim == 120)
    assert not bench.compile_case(case).problems


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_draft_asks_for_keys_and_values_at_once(target):
    """Before the first product, that is: one trip to memory instead of two."""
    row = next(
        row
        for row in bench.reachable_rows(target)
        if (row.op, row.kernel, row.head_dim) == ("sparse_attention", "few rows", 128)
    )
    compiled = bench.compile_spec(bench.specs_of(target, "bf16", row)[0], target)
    before, product, _ = bench.sass_of(compiled).partition("HMMA")
    asked = 16 * len(re.findall(r"LDG\w*\.E[.\w]*\.128", before))
    assert product and asked >= inspect(compiled).loop_loads[16]


@pytest.mark.aot
def test_a_long_row_is_filtered_in_few_instructions():
    """Each key, where words have up to 4 bits: 45 are 35 us of [28, 1, 4, 132352] on an H200."""
    (row,) = (row for row in bench.reachable_rows("sm_90") if row.kernel == "filter")
    for spec in bench.specs_of("sm_90", "fp32", row):
        sass = bench.sass_of(bench.compile_spec(spec, "sm_90"))
        instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/ ", sass)) + 3 * loop_instructions(sass)
        assert 500 < instructions < 45 * row.block_n / (32 * row.num_warps), spec.constexprs


def compiled(target, op, number):
    """The machine code of one of an op's kernels at D = 128 in bf16, and what was compiled."""
    row = next(
        row
        for row in bench.reachable_rows(target)
        if (row.op, row.head_dim, row.dtype) == (op, 128, _tuning.HALF)
    )
    made = bench.compile_spec(bench.specs_of(target, "bf16", row)[number], target)
    return bench.sass_of(made) if target.startswith("sm") else "", made


@pytest.mark.aot
def test_a_merge_asks_for_two_blocks_of_splits_before_it_waits():
    """For their lse and, not knowing these, for their values: one trip to memory, not four."""
    before, wait, _ = compiled("sm_90", "verify_attention", -1)[0].partition("DEPBAR.LE")
    asked = 128 * 16 * len(re.findall(r"LDGSTS\w*\.E[.\w]*\.128", before))
    assert wait and asked >= 2 * 16 * 128 * 4  # bytes: blocks, splits, D, float32


@pytest.mark.aot
@pytest.mark.parametrize("op", ["verify_attention", "sparse_attention"])
@pytest.mark.parametrize("target, early", [("sm_90", True), ("sm_80", False)])
def test_the_merge_is_launched_while_the_splits_are_under_way(op, target, early):
    split, merge = (compiled(target, op, number)[1] for number in (0, -1))
    assert ("griddepcontrol.launch_dependents" in split.asm["ptx"]) == early
    assert ("griddepcontrol.wait" in merge.asm["ptx"]) == early == merge.metadata.launch_pdl
    assert not split.metadata.launch_pdl  # it waits for all that came before
    if early:  # nothing of a partial is read before the splits have ended
        before, _, after = merge.asm["ptx"].partition("griddepcontrol.wait")
        assert "cp.async" in after and "cp.async" not in before


@pytest.mark.aot
def test_two_programs_that_verify_with_scores_fit_an_sm():
    """With not a byte to spare: one program an SM would halve what is under way."""
    _, made = compiled("sm_90", "verify_attention", 1)
    assert made.metadata.shared == 115712 and bench.two_fit(115712)
    assert not bench.two_fit(115713)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_renewing_importance_compiles_well(target):
    for spec in renew_specs():
        made = bench.compile_spec(spec, target)
        report, (*_, lanes, limit) = inspect(made), _tuning.TARGETS[target]
        assert not list(bench.judge(report, limit, True, 0.25)) and report.registers > 0
        wide = "dwordx4" if target == "gfx942" else ".128"
        loads = re.findall(r"(?:LDG|_load_)\S*", made.asm.get("amdgcn") or bench.sass_of(made))
        assert sum(wide in load for load in loads) >= 8192 / (8 * lanes * 4)


def problems_of(row, dtype, change):
    spec = change(bench.specs_of("sm_90", dtype, row)[0])
    report = inspect(bench.compile_spec(spec, "sm_90"))
    return list(bench.judge(report, _tuning.TARGETS["sm_90"].shared_memory, True, 0.25))


BAD = {
    "spills": ("bf16", lambda spec: spec._replace(num_warps=1)),
    "shared memory": ("bf16", lambda spec: spec._replace(num_stages=9)),
    "under 16 bytes": ("bf16", lambda spec: spec._replace(attrs={})),
    "without tensor cores": ("fp32", lambda spec: spec),
}


@pytest.mark.aot
@pytest.mark.parametrize("complaint", BAD)
def test_a_bad_kernel_is_found(complaint):
    dtype, change = BAD[complaint]
    row = next(
        row
        for row in bench.reachable_rows("sm_90")
        if (row.op, row.kernel, row.head_dim) == ("score_keys", "lse", 128) and dtype in row.dtypes
    )
    found = problems_of(row, dtype, change)
    assert any(complaint in problem for problem in found), found


def test_every_op_has_rows_and_every_row_is_reached():
    attention = ["score_keys", "select_topk", "sparse_attention", "verify_attention"]
    layer = ["int4_linear", "add_rms_norm", "rope_write", "silu_mul"]
    assert OPS == sorted([*attention, *layer, "causal_conv1d", "gated_delta_rule"])
    for target in _tuning.TARGETS:
        rows = list(bench.reachable_rows(target))
        for row in rows:
            found = _tuning.config(row.op, row.kernel, target, row.dtype, row.head_dim, 4096)
            assert found == row.config(4096)
        reached = {row._replace(head_dim=0) for row in rows}
        own = [row for row in _tuning.TABLE if row.arch == target]
        assert all(row._replace(head_dim=0) in reached for row in own)


GOOD = Report(100, 0, 1000, "HGMMA", 1, 0, {16: 64, 4: 4})


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"spills": 1}, "1 spills"),
        ({"shared": 2001}, "2001 bytes of shared memory"),
        ({"loop_loads": {16: 64, 2: 32}}, "33% of the bytes"),
        ({"matrix": ""}, "without tensor cores"),
        ({"scalar_dots": 1}, "without tensor cores"),
    ],
)
def test_judge(change, complaint):
    assert list(bench.judge(GOOD, 2000, True, 0.25)) == []
    (found,) = bench.judge(Report(**{**vars(GOOD), **change}), 2000, True, 0.25)
    assert complaint in found


PRODUCT = Report(128, 0, 40960, "", 0, 0, {16: 128, 8: 64}, {16: 128}, 980)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"loop_instructions": 1050}, "4.10 instructions for a weight"),
        ({"async_loads": {16: 64, 8: 128}}, "other than asynchronous loads of 16 bytes"),
        ({"registers": 255, "shared": 131072}, "34 KiB on their way to an SM, by 1 programs"),
    ],
)
def test_a_4_bit_product_that_would_be_slow_is_found(change, complaint):
    row = next(row for row in bench.reachable_rows("sm_90") if row.kernel == "one row")
    assert list(bench.judge_product(PRODUCT, row, 232448)) == []
    report = Report(**{**vars(PRODUCT), **change})
    assert complaint in "; ".join(bench.judge_product(report, row, 232448))


@pytest.mark.aot
def test_a_4_bit_product_without_the_compilers_help_is_slow():
    """By plain shifts and masks, and where the loads know of no alignment."""
    row = next(row for row in bench.reachable_rows("sm_90") if row.kernel == "one row")
    spec = bench.specs_of("sm_90", "bf16", row)[0]
    limit = _tuning.TARGETS["sm_90"].shared_memory
    for changed, complaint in (
        (spec._replace(constexprs={**spec.constexprs, "PTX": False}), "instructions for a weight"),
        (spec._replace(attrs={}), "asynchronous loads of 16 bytes"),
    ):
        report = inspect(bench.compile_spec(changed, "sm_90"))
        assert complaint in "; ".join(bench.judge_product(report, row, limit))


def test_products_that_wait_for_each_other_are_found():
    product, wait = "HGMMA.64x64x16.F32.BF16 R24 ;\n", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    assert bench.serialized(4 * (product + wait))
    assert not bench.serialized(4 * product + wait)
    assert not bench.serialized("")


def test_judge_reports_float32_and_merges_only():
    slow = Report(255, 9, 1000, "", 1, 1, {4: 8})
    assert list(bench.judge(slow, 2000, False, 0.25)) == []
    merge = Report(30, 0, 0, "", 0, 0, {4: 8})
    assert list(bench.judge(merge, 2000, True, 1.0)) == []


SASS = """
        /*0010*/ LDG.E.U16 R2, [R4.64] ;
.L_x_0:
        /*0020*/ LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/ LDGSTS.E.BYPASS.128 [R3], [R2.64] ;
        /*0040*/ LDG.E.U8 R6, desc[UR4][R2.64] ;
        /*0050*/ LDG.E R7, desc[UR4][R2.64] ;
        /*0060*/ @P0 BRA `(.L_x_1) ;
        /*0070*/ @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/ LDG.E.64 R8, [R2.64] ;
"""
AMD = """
.LBB0_1:
  global_load_dwordx4 v[0:3], v[4:5], off
  buffer_load_ushort v6, v7, s[0:3], 0 offen
  s_cbranch_scc1 .LBB0_1
  global_load_dword v0, v[1:2], off
"""


def test_loads_in_loops_are_counted_by_width():
    assert loop_loads(SASS) == {16: 32, 1: 1, 4: 4}
    assert loop_loads(AMD) == {16: 16, 2: 2}
    assert loop_loads(SASS, "LDGSTS") == {16: 16}


def test_instructions_of_the_longest_loop_are_counted():
    assert (
        loop_instructions(SASS) == 6 and loop_instructions(SASS.replace("L_x_0)", "L_x_1)")) == 0
    )


def test_report_and_exit_status(tmp_path, capsys):
    row = next(bench.reachable_rows("sm_90"))
    good = bench.Result(bench.Case("sm_90", "bf16", row, 0), "split", GOOD, ())
    bad = good._replace(problems=("9 spills",))
    assert bench.report([good], tmp_path / "good.md") == 0
    assert bench.report([good, bad], tmp_path / "bad.md") == 1
    assert "9 spills" in capsys.readouterr().out
    text = (tmp_path / "bad.md").read_text()
    assert "triton " in text and "2 kernels, 1 with problems" in text and "## sm_90" in text


@pytest.mark.aot
def test_the_command(tmp_path, capsys):
    out = tmp_path / "table.md"
    command = ["compile", "--arch", "sm_90", "--op", "select_topk", "--jobs", "1"]
    assert main([*command, "--out", str(out)]) == 0
    assert "select_topk" in out.read_text() and "0 with problems" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compile", "--arch", "sm_70"])


def test_gpu_without_a_gpu(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
