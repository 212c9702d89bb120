import json, resource, struct
from collections import Counter
import pytest, torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from paretolab.kernels import rows16
from paretolab.kernels.unpack import naive
from paretolab.quantizers.lowbit import LEVELS, LowBit, load, pack_bits, save

SCALES = torch.float16, torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn
same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@st.composite
def lowbits(draw):
    "Any low-bit tensor: widths, mixed or not, odd shapes, grids shorter than the width allows, every optional part; and its codes."
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rows, groups, group = draw(st.integers(0, 5)), draw(st.integers(0, 6)), draw(st.integers(1, 19))
    width = st.sampled_from(list(LEVELS))
    bits = tuple(draw(width) for _ in range(groups)) if draw(st.booleans()) else draw(width)
    grid = {b: torch.randn(draw(st.integers(1, LEVELS[b])), generator=g) for b in (set(bits) if isinstance(bits, tuple) else [bits])}
    of = bits if isinstance(bits, tuple) else (bits,) * groups
    codes = torch.cat([torch.zeros(rows, 0, dtype=torch.int)] + [torch.randint(len(grid[b]), (rows, group), generator=g) for b in of], 1)
    scales = (torch.rand(rows, groups, generator=g) + .5).to(draw(st.sampled_from(SCALES)))
    zeros = torch.randn(rows, groups, generator=g).to(draw(st.sampled_from(SCALES[:2] + (torch.float32,)))) if draw(st.booleans()) else None
    perm = torch.randperm(groups*group, generator=g).int() if draw(st.booleans()) else None
    return LowBit.pack(codes, scales, grid, bits, group, zeros, perm), codes, grid, of


@given(st.sampled_from(list(LEVELS)), st.integers(0, 9), st.integers(0, 70), st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_codes_survive_packing(bits, rows, columns, seed):
    codes = torch.randint(LEVELS[bits], (rows, columns), generator=torch.Generator().manual_seed(seed))
    assert naive(pack_bits(codes, bits), bits, columns).tolist() == codes.tolist()


@given(lowbits())
@settings(max_examples=150, deadline=None)
def test_values_follow_the_equation(made):
    q, codes, grid, of = made
    assert torch.equal(q.codes().int(), codes.int())
    w, place = q.dequantize(), q.perm if q.perm is not None else range(q.shape[1])
    for r in range(q.shape[0]):
        for j in range(q.shape[1]):
            k = j // q.group
            zero = q.zeros[r, k].float() if q.zeros is not None else 0
            assert w[r, place[j]] == q.scales[r, k].float() * grid[of[k]][codes[r, j]] + zero


@pytest.mark.soak
def test_ten_thousand_tensors_come_back_from_files(tmp_path, record_property):
    "Codes to bytes to codes, exactly: every width, mixed or not, odd shapes, through a file."
    widths, shapes = Counter(), set()
    @given(lowbits())
    @settings(max_examples=10_000, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def back(made):
        q, codes, grid, of = made
        save(tmp_path/"m", {"w": q})
        again = load(tmp_path/"m")[0]["w"]
        assert torch.equal(again.codes().int(), codes.int()) and same(again.dequantize(), q.dequantize())
        widths.update(set(of) | {"tensors"}); shapes.add(q.shape)
    back()
    assert widths["tensors"] >= 10_000 and min(widths[b] for b in LEVELS) > 500
    record_property("tensors", widths["tensors"]); record_property("shapes", len(shapes)); record_property("of a width", {f"{b:g}": widths[b] for b in LEVELS})


@given(st.lists(lowbits(), max_size=3))
@settings(max_examples=60, deadline=None)
def test_files_are_exact(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("f") / "m.safetensors"
    old = {f"block.{i}.weight": m[0] for i, m in enumerate(made)} | {"norm": torch.randn(3, 7).bfloat16().T}
    save(path, old, {"k": "v"})
    new, meta = load(path)
    assert meta == {"k": "v"} and new.keys() == old.keys() and same(new["norm"], old["norm"])
    for n in old.keys() - {"norm"}:
        assert (new[n].shape, new[n].bits, new[n].group) == (old[n].shape, old[n].bits, old[n].group)
        assert new[n].parts.keys() == old[n].parts.keys() and all(same(a, b) for a, b in zip(new[n].parts.values(), old[n].parts.values()))
    blob = path.read_bytes()
    assert sum(t.nbytes for t in old.values()) == len(blob) - 8 - struct.unpack("<Q", blob[:8])[0]


def small(**over):
    args = dict(codes=torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), scales=torch.ones(2, 2).half(), grid=torch.arange(4.), bits=2, group=2,
        zeros=torch.ones(2, 2).half(), perm=torch.tensor([3, 1, 0, 2], dtype=torch.int32))
    return LowBit.pack(**{**args, **over})


@pytest.mark.parametrize("over, sentence", [
    (dict(bits=5), r"got 5\)"), (dict(bits=True), r"got True\)"), (dict(bits="2"), r"got '2'\)"), (dict(bits=(2,)), "got 1 for 2 groups"),
    (dict(group=3), "group=3 for 4 columns"), (dict(group=-2), "group=-2"), (dict(group=2.), "group=2.0"),
    (dict(codes=torch.ones(4, dtype=torch.int)), r"shape=\(4,\)"), (dict(codes=torch.ones(2, 4)), "codes are integers"),
    (dict(codes=torch.full((2, 4), 4)), "codes from 4 to 4"), (dict(codes=torch.full((2, 4), -1)), "codes from -1"),
    (dict(grid=torch.arange(5.)), r"grid.2 must be float32 of shape \(4,\)"), (dict(grid=torch.arange(4)), "got int64"),
    (dict(grid=torch.tensor([0, 1, 2, torch.inf])), "grid.2 must be finite"), (dict(grid={4: torch.arange(4.)}), r"each width needs a grid: \[2\]"),
    (dict(scales=torch.ones(2, 1).half()), r"scales must be .* of shape \(2, 2\)"), (dict(scales=torch.ones(2, 2)), "got float32"),
    (dict(scales=torch.full((2, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)), "got 4 of 4 NaN"),
    (dict(scales=torch.full((2, 2), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)), "got 4 of 4 NaN"),
    (dict(zeros=torch.ones(2, 2).to(torch.float8_e4m3fn)), "zeros must be float16"), (dict(zeros=torch.full((2, 2), torch.nan).half()), "zeros must be finite"),
    (dict(perm=torch.tensor([0, 1, 2, 4], dtype=torch.int32)), "each of the 4 columns once"), (dict(perm=torch.arange(4)), "perm must be int32")])
def test_what_pack_refuses(over, sentence):
    with pytest.raises(ValueError, match=sentence): small(**over)


def edited(tmp_path, meta={}, drop=None, data=None):
    "A saved file whose low-bit metadata, header or data someone has changed."
    path = tmp_path / "m.safetensors"
    save(path, {"w": small()})
    blob = path.read_bytes()
    n = struct.unpack("<Q", blob[:8])[0]
    header, body = json.loads(blob[8:8+n]), bytearray(blob[8+n:])
    about = json.loads(header["__metadata__"]["lowbit:w"]) | meta if isinstance(meta, dict) else meta
    header["__metadata__"]["lowbit:w"] = about if isinstance(about, str) else json.dumps(about)
    if drop: header[f"{drop}.gone"] = header.pop(drop)
    for part, new in (data or {}).items(): body[slice(*header[part]["data_offsets"])] = new
    out = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(out)) + out + body)
    return path


@pytest.mark.parametrize("change, sentence", [
    (dict(meta=dict(version=2)), "version 2"), (dict(meta=dict(layout="tiled")), "'tiled'"), (dict(meta=dict(more=1)), "got .*more"), (dict(meta=[1]), r"got \[1\]"),
    (dict(meta="{"), "tensor 'w'"), (dict(meta="[" * 200000), "tensor 'w'"), (dict(meta="9" * 5000), "tensor 'w'"), (dict(meta=dict(zeros=1)), "true or false"),
    (dict(meta=dict(shape=[2, -4])), r"got shape=\(2, -4\)"), (dict(meta=dict(shape=[2**40, 2**40])), "0 to 2\\*\\*31-1"), (dict(meta=dict(shape=4)), "shape=4"),
    (dict(meta=dict(shape=[2**30, 2**30])), "codes.2 must be uint8 of shape"), (dict(meta=dict(shape=[2, 8])), "codes.2 must"), (dict(meta=dict(group=0)), "group=0"),
    (dict(meta=dict(group=4)), r"scales must be .* of shape \(2, 1\)"), (dict(meta=dict(bits=[2, {}])), r"got \{\}"), (dict(meta=dict(bits=[2, 4])), "codes.4 is missing"),
    (dict(drop="w.perm"), "perm is missing"), (dict(drop="w.codes.2"), "codes.2 is missing"), (dict(drop="w.scales"), "scales is missing"),
    (dict(data={"w.scales": b"\xff" * 8}), "scales must be finite"), (dict(data={"w.perm": b"\0" * 16}), "columns once")])
def test_a_file_that_lies_is_refused_by_name(tmp_path, change, sentence):
    path, before = edited(tmp_path, **change), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=sentence) as e: load(path)
    assert str(path) in str(e.value) and "'w'" in str(e.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_damage_escapes_as_another_exception(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("f") / "m.safetensors"
    save(path, {"w": small(), "t": small(codes=torch.ones(2, 4, dtype=torch.int), bits=1.58, grid=torch.arange(3.))})
    blob = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))): blob[data.draw(st.integers(0, len(blob)-1))] = data.draw(st.integers(0, 255))
    path.write_bytes(blob[:data.draw(st.integers(0, len(blob)) | st.just(len(blob)))])
    try:
        for q in load(path)[0].values():
            if isinstance(q, LowBit): assert (q.codes().shape, q.dequantize().shape) == (q.shape, q.shape)
    except ValueError as e: assert len(str(e)) > 20


@pytest.mark.parametrize("bits, byte, sentence", [(1.58, 243, "at most 242 .got 243"), (1.58, 2, r"below 2, .*got 2\)"), (4, 0x0f, r"got 15\)")])
def test_codes_without_a_level_are_refused(bits, byte, sentence):
    q = LowBit(tuple([torch.tensor([[byte]], dtype=torch.uint8)]), torch.ones(1, 1).half(), (torch.arange(3. if byte == 243 else 2.),), (1, 2), bits, 2)
    with pytest.raises(ValueError, match=sentence): q.codes()


def test_blocks_are_narrowest_first():
    q = LowBit.pack(torch.ones(1, 3, dtype=torch.int), torch.ones(1, 3).half(), {b: torch.ones(2) for b in (8, 1, 1.58)}, (8, 1.58, 1), 1)
    assert list(q.parts) == ["codes.1", "codes.1.58", "codes.8", "grid.1", "grid.1.58", "grid.8", "scales"]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "m" / "full").mkdir(parents=True)
    with pytest.raises(OSError): save(tmp_path / "m", {"w": small()})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_nothing_is_copied_until_a_kernel_packs(tmp_path):
    "What this process holds in memory before and after: codes of 8 MB stay on disk until they are packed."
    big = LowBit((torch.randint(256, (1024, 8192), dtype=torch.uint8),), torch.ones(1024, 1).half(), (torch.arange(16.) - 8,), (1024, 16384), 4, 16384)
    save(tmp_path/"m", {"w": big})
    held = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])/1024
    before, (q, _) = held(), load(tmp_path/"m")
    q = q["w"]
    assert held() - before < 2                                      # scales and grid are looked at, no page of the codes is
    packed = rows16.pack(q)
    maps = [[int(a, 16) for a in line.split()[0].split("-")] for line in open("/proc/self/maps") if str(tmp_path/"m") in line]
    inside = lambda t: any(lo <= t.data_ptr() < hi for lo, hi in maps)
    assert inside(q.packed[0]) and not inside(packed.data) and packed.data.nbytes >= 2**23 and held() - before > 8
    assert torch.equal(rows16.rows(packed, torch.tensor([0, 1023])), big.dequantize()[[0, 1023]])


def test_loading_maps_the_file(tmp_path):
    save(tmp_path / "m", {"w": small(), "x": torch.ones(9)})
    t, _ = load(tmp_path / "m")
    maps = [[int(a, 16) for a in line.split()[0].split("-")] for line in open("/proc/self/maps") if str(tmp_path / "m") in line]
    assert all(any(lo <= p.data_ptr() < hi for lo, hi in maps) for p in (*t["w"].parts.values(), t["x"]))
    save(tmp_path / "m", t)                                        # over the file that is mapped
    assert torch.equal(load(tmp_path / "m")[0]["w"].dequantize(), small().dequantize()) and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("tensors, meta, sentence", [({"w": small(), "w.scales": torch.ones(1)}, {}, "got 'w.scales' twice"), ({"w": 3}, {}, "got int"),
    ({}, {"lowbit:w": "{}"}, "got 'lowbit:w'"), ({}, {"n": 1}, "got 'n': 1")])
def test_what_save_refuses(tmp_path, tensors, meta, sentence):
    with pytest.raises(ValueError, match=sentence): save(tmp_path / "m", tensors, meta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_width_may_come_as_a_float(bits):
    codes = torch.randint(2**bits, (3, 13))
    assert torch.equal(pack_bits(codes, float(bits)), pack_bits(codes, bits))
