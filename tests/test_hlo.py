"""What is read off a compiled program, on one that is small enough to reckon by hand."""

import re

import pytest

from nanochat_jax import hlo
from nanochat_jax.products import product_flops

# 1,000 cycles a second; a kernel takes 7 s; memory moves 512 bytes a second, a link 100; four devices along fsdp, two
# along data.
RATES = hlo.Rates(1000, lambda name, elements: 7.0, 512.0, lambda axes: 100.0, {"data": 2, "fsdp": 4})


def cycles(number: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


FSDP = "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}"
TRIPS = ', backend_config={"known_trip_count":{"n":"5"}}'
PROGRAM = f"""HloModule jit_step, is_scheduled=true

%product (p0: bf16[8,16], p1: bf16[16,32]) -> bf16[8,32] {{
  %p0 = bf16[8,16]{{1,0:T(8,128)(2,1)}} parameter(0)
  %p1 = bf16[16,32]{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %convolution.1 = bf16[8,32]{{1,0:T(8,128)(2,1)}} convolution(%p0, %p1), dim_labels=bf_io->bf
}}

%turned (p2: bf16[8,16]) -> bf16[16,8] {{
  %p2 = bf16[8,16]{{1,0}} parameter(0)
  ROOT %transpose.1 = bf16[16,8]{{0,1}} transpose(%p2), dimensions={{1,0}}
}}

%narrowed (p3: f32[8]) -> bf16[8] {{
  %p3 = f32[8]{{0}} parameter(0)
  ROOT %convert.1 = bf16[8]{{0}} convert(%p3)
}}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %state = (s32[], bf16[8,16]{{1,0}}) parameter(0)
  %part = bf16[8,16]{{1,0}} get-tuple-element(%state), index=1
  %all-gather-start.1 = (bf16[8,16]{{1,0}}, bf16[32,16]{{1,0}}) all-gather-start(%part), {FSDP}, dimensions={{0}}
  %fusion.1 = bf16[8,32]{{1,0}} fusion(%part, %part), kind=kOutput, calls=%product, {cycles(3000)}
  %all-gather-done.1 = bf16[32,16]{{1,0}} all-gather-done(%all-gather-start.1)
  ROOT %tuple.1 = (s32[], bf16[8,16]{{1,0}}) tuple(%part, %part)
}}

%condition (state.1: (s32[], bf16[8,16])) -> pred[] {{
  %state.1 = (s32[], bf16[8,16]) parameter(0)
  %rounds = s32[]{{:T(128)}} constant(5)
  %done = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%done, %rounds), direction=LT
}}

%added (p6: f32[64,16], p7: s32[8], p8: f32[8,16]) -> f32[64,16] {{
  %p6 = f32[64,16]{{1,0}} parameter(0)
  %p7 = s32[8]{{0}} parameter(1)
  %p8 = f32[8,16]{{1,0}} parameter(2)
  %gather.1 = f32[8,16]{{1,0}} gather(%p8, %p7), offset_dims={{1}}, slice_sizes={{1,16}}
  ROOT %scatter.1 = f32[64,16]{{1,0}} scatter(%p6, %p7, %gather.1), update_window_dims={{1}}, to_apply=%update
}}

%update (p4: f32[8]) -> f32[8] {{
  %p4 = f32[8]{{0}} parameter(0)
  ROOT %add.1 = f32[8]{{0}} add(%p4, %p4), {cycles(500)}
}}

%skip (p5: f32[8]) -> f32[8] {{
  ROOT %p5 = f32[8]{{0}} parameter(0)
}}

ENTRY %main (x: bf16[8,16], y: f32[8]) -> f32[8] {{
  %x = bf16[8,16]{{1,0}} parameter(0)
  %y = f32[8]{{0}} parameter(1)
  %while.1 = (s32[], bf16[8,16]{{1,0}}) while(%x), condition=%condition, body=%body{TRIPS}
  %copy.1 = bf16[8,16]{{0,1}} copy(%x), {cycles(200)}
  %fusion.2 = bf16[16,8]{{0,1}} fusion(%x), kind=kLoop, calls=%turned, {cycles(100)}
  %fusion.3.remat = bf16[8]{{0}} fusion(%y), kind=kLoop, calls=%narrowed, {cycles(50)}
  %splash_mha_fwd.1 = (f32[8]{{0}}, bf16[8,16]{{1,0}}) custom-call(%x), custom_call_target="tpu_custom_call"
  %buffer.1 = f32[8]{{0}} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.4 = f32[64,16]{{1,0}} fusion(%z, %i, %u), kind=kCustom, calls=%added
  %sort.1 = f32[8]{{0}} sort(%y), dimensions={{0}}
  %all-reduce.1 = f32[25]{{0}} all-reduce(%y), replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, to_apply=%update
  ROOT %conditional.1 = f32[8]{{0}} conditional(%y), branch_computations={{%skip, %update}}
}}
"""


def part(number: int, rest: str = "") -> str:
    """The computation of a fusion with a part of a gather of 1,024 bytes."""
    line = f'f32[16,16]{{1,0}} all-gather(%q{number}), channel_id=7, {FSDP}, frontend_attributes={{chain_id="1"}}'
    return f"""%part{number} (q{number}: f32[4,16]) -> f32[16,16] {{
  %q{number} = f32[4,16]{{1,0}} parameter(0)
  %all-gather.{number} = {line}
  {rest or f"ROOT %add.{number} = f32[16,16]{{1,0}} add(%all-gather.{number}, %all-gather.{number})"}
}}

"""


def marked(name: str) -> str:
    return f'ROOT %custom-call.{name} = f32[16,16]{{1,0}} custom-call(), custom_call_target="AsyncCollective{name}"'


IN_PARTS = f"""HloModule jit_step, is_scheduled=true

{part(1, marked("Start"))}{part(2)}{part(3)}{part(4, marked("Done"))}ENTRY %main (x: f32[4,16]) -> f32[16,16] {{
  %x = f32[4,16]{{1,0}} parameter(0)
  %async-collective-start.1 = (f32[4,16], f32[16,16]) fusion(%x), kind=kCustom, calls=%part1
  %fusion.1 = f32[16,16]{{1,0}} fusion(%x), kind=kOutput, calls=%part2, {cycles(2000)}
  %fusion.2 = f32[16,16]{{1,0}} fusion(%x), kind=kOutput, calls=%part3, {cycles(3000)}
  ROOT %async-collective-done.1 = f32[16,16] fusion(%x), kind=kCustom, calls=%part4
}}
"""


def test_a_collective_cut_into_parts_of_other_fusions_is_one_that_they_hide():
    done = hlo.read(IN_PARTS, RATES)
    gathers = done.traffic["all-gather"]
    assert (gathers.count, gathers.bytes, gathers.seconds) == (1, 768, 7.68)
    assert dict(done.kinds) == {"element-wise": 5.0}
    assert (done.waiting_seconds, done.seconds) == pytest.approx((2.68, 7.68))


@pytest.mark.parametrize("program", [PROGRAM, PROGRAM.replace(TRIPS, "")], ids=["rounds noted", "rounds compared"])
def test_a_program_by_hand(program):
    done = hlo.read(program, RATES)
    assert dict(done.kinds) == pytest.approx(
        {
            "matrix products": 15.0,
            "copies": 0.3,
            "converts": 0.05,
            "attention": 7.0,
            "element-wise": 0.5,
            "gather and scatter": 5.0,
        }  # 5 times 512 bytes
    )
    assert done.matrix_flops == 5 * 2 * 8 * 32 * 16
    assert done.rematerialized_seconds == pytest.approx(0.05)
    assert dict(done.without_estimate) == {"sort (element-wise)": 1}
    gathers, reductions = done.traffic["all-gather"], done.traffic["all-reduce"]
    assert (gathers.count, gathers.bytes, gathers.seconds) == (5, 5 * 768, 5 * 7.68)  # three of four parts of 1,024
    assert (reductions.count, reductions.bytes, reductions.seconds) == (1, 100, 1.0)  # of two devices
    # Each gather takes 7.68 s, 3 of them behind the product; the reduction waits for itself.
    assert done.waiting_seconds == pytest.approx(5 * 4.68 + 1)
    assert done.seconds == pytest.approx(sum(done.kinds.values()) + done.waiting_seconds)


def test_computation_hides_what_is_shorter():
    fast = hlo.Rates(1000, RATES.kernel_seconds, 512.0, lambda axes: 1000.0, RATES.mesh)
    done = hlo.read(PROGRAM, fast)
    assert done.waiting_seconds == pytest.approx(
        0.1
    )  # of the reduction; gathers of 0.768 s are over before the product
    assert done.traffic["all-gather"].seconds == pytest.approx(5 * 0.768)


def test_axes_decide_how_fast_a_link_is():
    asked = []
    rates = hlo.Rates(1000, RATES.kernel_seconds, 512.0, lambda axes: asked.append(axes) or 100.0, RATES.mesh)
    hlo.read(PROGRAM, rates)
    assert set(asked) == {frozenset({"fsdp"}), frozenset({"data"})}


def test_one_round_of_an_open_loop():
    round_ = hlo.loop_body(PROGRAM, RATES)
    assert (round_.seconds, dict(round_.kinds)) == (7.68, {"matrix products": 3.0})


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['data'=2,'fsdp'=4] {'data'}", {"data"}),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", {"data", "fsdp"}),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", {"fsdp"}),  # known by its size
        ("[4,2]<=[2,4]T(1,0)", {"data"}),
        ("{{0,1,2,3},{4,5,6,7}}", {"fsdp"}),
        ("{{0,1,2,3,4,5,6,7}}", set()),  # all
        ("", set()),
    ],
)
def test_groups_of_devices_in_all_their_notations(groups, axes):
    assert hlo._axes(f"all-reduce(%x), replica_groups={groups}, to_apply=%add", RATES.mesh) == axes


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        (
            "%r = bf16[4,8,8] convolution(%a, %a), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            4 * 1024,
        ),
        (
            "%r = bf16[2,16,8,1] convolution(%b, %c), window={size=1x3}, dim_labels=0b1f_1i0o->0bf1",
            2 * 2 * 16 * 8 * 3 * 4,
        ),
    ],
    ids=["batches", "two contracted axes"],
)
def test_products_of_more_axes(line, flops):
    """Four products of 8×8 matrices; (2, 16, 3, 4) with (3, 4, 1, 8) over both of the inner axes."""
    shapes = {"a": "bf16[4,8,8]", "b": "bf16[2,16,3,4]", "c": "bf16[3,4,1,8]"}
    operands = [shapes[name] for name in re.findall(r"%([abc])\b", line)]
    assert product_flops(line, line.split()[2], *operands) == flops
