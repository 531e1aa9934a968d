"""Traffic of a compiled program, read from a text small enough to add up by hand."""

import pytest

from igpt_jax.planner import program
from igpt_jax.planner.program import traffic

# A loop of 5 layers. Each reads one of 5 stacked weights f32[8,4] by a slice (128 bytes), gathers it over fsdp, and
# writes one of 5 rows f32[4] (16 bytes) in place. The gather is spread over two fusions of one chain.
TEXT = """HloModule jit_step, is_scheduled=true

%sliced (p0: f32[5,8,4], p1: s32[]) -> f32[8,4] {
  %p0 = f32[5,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %out = f32[8,4]{1,0} bitcast(%slice)
}

%stored (p2: f32[5,4], p3: f32[1,4], p4: s32[]) -> f32[5,4] {
  %p2 = f32[5,4]{1,0} parameter(0)
  %p3 = f32[1,4]{1,0} parameter(1)
  %p4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[5,4]{1,0} dynamic-update-slice(%p2, %p3, %p4, %zero.1)
}

%started (p5: f32[8,4]) -> f32[16,4] {
  %p5 = f32[8,4]{1,0} parameter(0)
  ROOT %gather = f32[16,4]{1,0} all-gather(%p5), channel_id=7, replica_groups=GATHER, fronted={chain_id="3"}
}

%ended (p6: f32[8,4]) -> f32[16,4] {
  %p6 = f32[8,4]{1,0} parameter(0)
  ROOT %gather.1 = f32[16,4]{1,0} all-gather(%p6), channel_id=7, replica_groups=GATHER, fronted={chain_id="3"}
}

%condition (c: (s32[], f32[5,8,4], f32[5,4], s32[])) -> pred[] {
  %c = (s32[], f32[5,8,4]{2,1,0}, f32[5,4]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=3
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%body (b: (s32[], f32[5,8,4], f32[5,4], s32[])) -> (s32[], f32[5,8,4], f32[5,4], s32[]) {
  %b = (s32[], f32[5,8,4]{2,1,0}, f32[5,4]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %weights = f32[5,8,4]{2,1,0} get-tuple-element(%b), index=1
  %rows = f32[5,4]{1,0} get-tuple-element(%b), index=2
  %bound = s32[] get-tuple-element(%b), index=3
  %one = f32[8,4]{1,0:S(1)} fusion(%weights, %i), kind=kLoop, calls=%sliced
  %first = f32[16,4]{1,0:S(1)} fusion(%one), kind=kCustom, calls=%started
  %second = f32[16,4]{1,0:S(1)} fusion(%one), kind=kCustom, calls=%ended
  %sum = f32[16,4]{1,0:S(1)} all-reduce(%second), channel_id=8, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %shift = f32[1,4]{1,0:S(1)} collective-permute(%row), channel_id=9, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %row = f32[1,4]{1,0:S(1)} custom-call(%sum), custom_call_target="AllocateBuffer"
  %new = f32[5,4]{1,0} fusion(%rows, %row, %i), kind=kLoop, calls=%stored
  %two = s32[]{:T(128)} constant(STEP)
  %i.2 = s32[]{:S(6)} add(%i, %two)
  ROOT %next = (s32[], f32[5,8,4]{2,1,0}, f32[5,4]{1,0}, s32[]) tuple(%i.2, %weights, %new, %bound)
}

ENTRY %main (w: f32[5,8,4], r: f32[5,4]) -> f32[5,4] {
  %w = f32[5,8,4]{2,1,0} parameter(0)
  %r = f32[5,4]{1,0} parameter(1)
  %five = s32[]{:T(128)} constant(5)
  %five.1 = s32[]{:T(128)} copy(%five)
  %start = s32[] constant(0)
  %tuple = (s32[], f32[5,8,4]{2,1,0}, f32[5,4]{1,0}, s32[]) tuple(%start, %w, %r, %five.1)
  %loop = (s32[], f32[5,8,4]{2,1,0}, f32[5,4]{1,0}, s32[]) while(%tuple), condition=%condition, body=%body
  ROOT %result = f32[5,4]{1,0} get-tuple-element(%loop), index=2
}
"""
MESH = {"data": 2, "fsdp": 2, "tensor": 1, "context": 1}


def read(groups="[2,2]<=[4]", step=1):
    return traffic(TEXT.replace("GATHER", groups).replace("STEP", str(step)), MESH)


def test_each_iteration_of_a_loop_counts():
    """5 iterations, each: a slice of 128 bytes read, 16 bytes written, the counter read twice, then read with its step.

    The bound is copied once. Arrays in S(1) and S(6) are no traffic.

    Seen to fail with the whole stack read for a slice of it, and with loops counted once.
    """
    found = read()
    assert found.unknown_loops == 0
    assert found.memory_bytes == 5 * (128 + 16 + 2 * 4 + 2 * 4) + 2 * 4


def test_an_unrolled_loop_has_fewer_iterations():
    """5 layers, two per iteration, take 3. Seen to fail with the bound taken for the number of iterations."""
    assert read(step=2).collectives["all-reduce"] == 3


def test_collectives_by_mesh_axis():
    """Over 2 devices each: a gather sends its 128 bytes, once for both fusions of its chain; a sum twice a half of its
    256; a permutation its 16.

    Seen to fail with each fusion of a chain counted.
    """
    found = read()
    assert found.collective_bytes == {"fsdp": 5 * (128 + 16), "data": 5 * 256}
    assert found.collectives == {"all-gather": 5, "all-reduce": 5, "collective-permute": 5}


def test_groups_in_every_spelling():
    """Listed, counted and transposed, or by named axes, which need not be in the devices' order.

    Seen to fail with either transposition left out, and with a part of an axis read as all of it.
    """
    assert read("{{0,1},{2,3}}").collective_bytes == read().collective_bytes
    assert read("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}").collective_bytes == read().collective_bytes
    over_data = {"data": 5 * (256 + 128), "fsdp": 5 * 16}
    for groups in ("[2,2]<=[2,2]T(1,0)", "{{0,2},{1,3}}", "mesh['axis_0'=2,'axis_1'=2] {'axis_0'}",
                   "mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}",
                   "mesh['axis_0'=2,'axis_1'=2], device_ids=(0,2,1,3) {'axis_1'}", "mesh['axis_0'=4] {'axis_0':(1)2}",
                   "mesh['axis_0'=4], device_ids=([2,2]T(1,0)) {'axis_0':(2)2}"):
        assert read(groups).collective_bytes == over_data, groups
    assert read("mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}").collective_bytes["data+fsdp"] == 5 * 3 * 128
    three = {"data": 2, "fsdp": 2, "tensor": 2}
    for groups in ("mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}", "{{0,1,4,5},{2,3,6,7}}"):
        assert program._group(f"replica_groups={groups}", three) == ("data+tensor", 4)


# A gather that a SparseCore does: it is set up first, gets its operand in the update, and is waited for in the done.
SPARSECORE = """HloModule jit_step, is_scheduled=true

%moved (p0: f32[8,4]) -> f32[16,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  ROOT %gather = f32[16,4]{1,0} all-gather(%p0), channel_id=7, replica_groups=[2,2]<=[4]
}, execution_thread="sparsecore"

%offloaded (p1: f32[8,4]) -> f32[16,4] {
  %p1 = f32[8,4]{1,0} parameter(0)
  ROOT %call = f32[16,4]{1,0} custom-call(%p1), custom_call_target="x", called_computations={%moved}
}, execution_thread="sparsecore"

%twice (p2: f32[8,4]) -> f32[8,4] {
  %p2 = f32[8,4]{1,0} parameter(0)
  ROOT %double = f32[8,4]{1,0} add(%p2, %p2)
}

ENTRY %main (w: f32[8,4]) -> f32[16,4] {
  %w = f32[8,4]{1,0} parameter(0)
  %begun = ((), (), s32[1]) async-start(), async_execution_thread="sparsecore", calls=%offloaded
  BEFORE
  %given = ((f32[8,4]{1,0}), f32[16,4]{1,0}, s32[1]) async-update(%begun, %w), calls=%offloaded
  AFTER
  ROOT %done = f32[16,4]{1,0} async-done(%given), calls=%offloaded
}
"""


def test_collectives_of_sparsecores_overlap_from_the_update_on():
    """Seen to fail with collectives in called computations left out, and with what runs before the update counted."""
    work = "%work = f32[8,4]{1,0} fusion(%w), kind=kLoop, calls=%twice"
    during = traffic(SPARSECORE.replace("BEFORE", "").replace("AFTER", work), MESH)
    before = traffic(SPARSECORE.replace("BEFORE", work).replace("AFTER", ""), MESH)
    assert during.collective_bytes == before.collective_bytes == {"fsdp": 128}
    assert during.collectives == {"all-gather": 1}
    assert (during.overlapped_bytes, before.overlapped_bytes) == (128, 0)
    assert during.memory_bytes == 2 * 128 + 128 + 256


ONE = """HloModule jit_step, is_scheduled=true

ENTRY %main (w: f32[4,8]) -> f32[4,8] {
  %w = f32[4,8]{1,0} parameter(0)
  %chip = f32[4,8]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %row = f32[1,8]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  INSTRUCTION
}
"""


@pytest.mark.parametrize(("instruction", "expected"), [
    ("f32[1,8]{1,0} slice(%w)", 2 * 32),
    ("f32[1,8]{1,0:S(1)} slice(%w)", 32),
    ("f32[1,8]{1,0} slice(%chip)", 32),
    ("((f32[4,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w)", 32),
    ("f32[4,8]{1,0} dynamic-update-slice(%w, %row)", 32),
    ("f32[4,8]{1,0:S(1)} dynamic-update-slice(%chip, %row)", 0),
    ("(f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%w)", 128),
    ("f32[4,8]{1,0} all-reduce-start(%w), replica_groups={{0,1},{2,3}}", 2 * 128)])
def test_bytes_between_memory_and_the_chip(instruction, expected):
    """A row has 32 bytes, the array 128; what lies in S(1) is no traffic.

    Seen to fail with a slice counted by its result alone, and with the start of a collective taken for a tuple.
    """
    assert traffic(ONE.replace("INSTRUCTION", f"ROOT %out = {instruction}"), MESH).memory_bytes == expected


def test_sums_between_slices_count_all_slices():
    """Over 4 TPU slices a device sends 2 x 3/4 of its bytes. Seen to fail with two slices assumed."""
    sent = ('(f32[4,8]{1,0}, u32[]{:S(2)}, token[]) send(%w), channel_id=1, is_host_transfer=true, '
            'frontend_attributes={_xla_megascale_target="{1,2,3,4}x{0:255}",_xla_megascale_transfer_type="ALL_REDUCE"}')
    found = traffic(ONE.replace("INSTRUCTION", f"ROOT %sent = {sent}"), {"data": 4, "fsdp": 256})
    assert found.collective_bytes == {"data": 192} and found.collectives == {"all-reduce": 1}
