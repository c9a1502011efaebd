"""A slab moves blocks bit for bit, in any number, to any slots."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockSpec, Plane
from kvstore.tiers.slots import Buffer, SlotTier, copy_slots, rows_of

SPEC = BlockSpec(
    (
        Plane("keys", (4, 3), torch.bfloat16),
        Plane("values", (4,), torch.bool),
        Plane("scales", (4, 2, 2), torch.float64),
    )
)


def random_planes(n, seed, spec=SPEC):
    """Planes of random bits: NaN payloads and all."""
    rng = np.random.default_rng(seed)
    planes = []
    for plane in spec.planes:
        high = 2 if plane.dtype == torch.bool else 256
        data = rng.integers(0, high, n * plane.nbytes, np.uint8)
        planes.append(torch.empty((n, *plane.shape), dtype=plane.dtype))
        planes[-1].view(-1).view(torch.uint8).numpy()[:] = data
    return planes


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_rows_are_the_bytes_of_the_blocks():
    planes = random_planes(5, 0)
    rows = rows_of(SPEC, planes)
    assert [row.shape for row in rows] == [(5, 24), (5, 4), (5, 128)]
    assert [row.tobytes() for row in rows] == [bits(plane) for plane in planes]


def test_rows_of_what_is_not_contiguous():
    planes = [plane.transpose(0, 1).contiguous().transpose(0, 1) for plane in random_planes(5, 1)]
    assert [row.tobytes() for row in rows_of(SPEC, planes)] == [bits(plane) for plane in planes]


def test_rows_of_no_blocks():
    assert [row.shape for row in rows_of(SPEC, random_planes(0, 0))] == [(0, 24), (0, 4), (0, 128)]


@given(st.integers(1, 9), st.data())
def test_place_and_gather(slots, data):
    n = data.draw(st.integers(0, slots))
    where = np.array(data.draw(st.permutations(range(slots))))[:n].astype(np.int64)
    tier = SlotTier(SPEC, slots)
    before = random_planes(slots, 1)
    tier.place(np.arange(slots), before)
    new = random_planes(n, 2)
    tier.place(where, new)
    for slab, old, fresh in zip(tier.planes, before, new, strict=True):
        old = old.clone()
        old[torch.from_numpy(where)] = fresh
        assert bits(slab) == bits(old)
    buffer = Buffer(SPEC, slots)
    tier.gather(where, buffer.rows(n))
    assert [row.tobytes() for row in buffer.rows(n)] == [bits(plane) for plane in new]


@given(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.data())
def test_copy_slots_is_the_obvious_loop(slots, data):
    source, target = SlotTier(SPEC, slots[0]), SlotTier(SPEC, slots[1])
    source.place(np.arange(slots[0]), random_planes(slots[0], 1))
    target.place(np.arange(slots[1]), random_planes(slots[1], 2))
    n = data.draw(st.integers(0, min(slots)))
    from_slots = np.array(data.draw(st.permutations(range(slots[0])))[:n], np.int64)
    to_slots = np.array(data.draw(st.permutations(range(slots[1])))[:n], np.int64)
    expected = [plane.clone() for plane in target.planes]
    for a, b in zip(from_slots.tolist(), to_slots.tolist(), strict=True):
        for plane, slab in zip(expected, source.planes, strict=True):
            plane[b] = slab[a]
    copy_slots(source, from_slots, target, to_slots, [])
    for slab, plane in zip(target.planes, expected, strict=True):
        assert bits(slab) == bits(plane)


def test_a_slot_beyond_the_tier_is_refused():
    tier = SlotTier(SPEC, 3)
    tier.place(np.arange(3), random_planes(3, 1))
    before = [bits(slab) for slab in tier.planes]
    for wrong in (-1, 3, 2**40):
        with pytest.raises(IndexError, match=f"there is no place {wrong} of 3"):
            tier.place(np.array([0, wrong]), random_planes(2, 2))
        with pytest.raises(IndexError):
            tier.gather(np.array([0, wrong]), Buffer(SPEC, 2).rows(2))
    with pytest.raises(ValueError, match="another number or size"):
        tier.place(np.array([0]), random_planes(2, 2))
    assert [bits(slab) for slab in tier.planes] == before


def test_a_tier_may_have_no_slots():
    tier = SlotTier(SPEC, 0)
    assert [list(plane.shape) for plane in tier.planes] == [[0, 4, 3], [0, 4], [0, 4, 2, 2]]


@pytest.mark.gpu
def test_cuda_moves_the_same_bytes():
    from kvstore.tiers.cuda import CudaSlotTier

    device = torch.device("cuda", torch.cuda.current_device())
    hot, warm = CudaSlotTier(SPEC, 50, device), SlotTier(SPEC, 70, pinned=True)
    planes = random_planes(70, 3)
    warm.place(np.arange(70), planes)
    hops = [Buffer(SPEC, 8, pinned=True) for _ in range(2)]
    up, slots = np.random.default_rng(0).permutation(70)[:50], np.arange(50)[::-1].copy()
    copy_slots(warm, up, hot, slots, hops)
    hot.await_writes()
    for slab, plane in zip(hot.planes, planes, strict=True):
        assert bits(slab.cpu()[torch.from_numpy(slots)]) == bits(plane[torch.from_numpy(up)])
    back = SlotTier(SPEC, 50, pinned=True)
    copy_slots(hot, slots, back, np.arange(50), hops)
    for slab, plane in zip(back.planes, planes, strict=True):
        assert bits(slab) == bits(plane[torch.from_numpy(up)])
    given = [plane[:50].to(device) for plane in planes]
    hot.place(slots, given)
    del given
    assert hot.mark_reads() is not None
    hot.await_writes()
    torch.cuda.synchronize()
    for slab, plane in zip(hot.planes, planes, strict=True):
        assert bits(slab.cpu()[torch.from_numpy(slots)]) == bits(plane[:50])
