"""Building kernels under faults and from two processes at once, and unpacking on grids of shapes."""
import ctypes, random, shutil, subprocess, sys, time, warnings
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from paretolab.kernels import native, unpack

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
BITS = 1, 1.58, 2, 3, 4, 6, 8

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETOLAB_CACHE", str(tmp_path/"cache"))
    native.load.cache_clear()
    native._compiler.cache_clear()
    yield tmp_path/"cache"
    native.load.cache_clear()
    native._compiler.cache_clear()

def answer(source):
    "Load in a process of its own: this one may still hold an older library of the same name."
    run = f"from paretolab.kernels import native; print(native.load({str(source)!r}).answer())"
    return subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout

def toy(folder, text='extern "C" int answer() { return 42; }\n'):
    (folder/"toy.cpp").write_text(text)
    return folder/"toy.cpp"

@compiler
def test_a_second_process_builds_nothing(cache, tmp_path):
    source = toy(tmp_path)
    assert native.load(source).answer() == 42
    file, = cache.glob("*.so")
    made = file.stat().st_mtime_ns
    assert answer(source) == "42\n" and file.stat().st_mtime_ns == made and list(cache.iterdir()) == [file]

@compiler
def test_processes_that_build_at_once_all_get_it(cache, tmp_path):
    source = toy(tmp_path)
    run = f"from paretolab.kernels import native; print(native.load({str(source)!r}).answer())"
    children = [subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert [c.communicate()[0] for c in children] == ["42\n"]*6
    assert all(native.find(cache, f.stem.rpartition("-")[0]) for f in cache.glob("*.so"))
    assert not [p for p in cache.iterdir() if p.is_dir()]               # no scratch folder is left

@compiler
@pytest.mark.soak
def test_builders_killed_at_any_moment_leave_a_usable_cache(cache, tmp_path, record_property):
    random.seed(0)
    rounds, killed = 60, 0
    for n in range(rounds):
        source = toy(tmp_path, f'extern "C" int answer() {{ return {n}; }}\n')
        run = f"from paretolab.kernels import native; native.load({str(source)!r})"
        children = [subprocess.Popen([sys.executable, "-c", run]) for _ in range(3)]
        time.sleep(random.uniform(0, 0.4))
        for child in children:
            child.kill()
            killed += child.wait() != 0
        assert answer(source) == f"{n}\n"
        assert all(native.find(cache, f.stem.rpartition("-")[0]) for f in cache.glob("*.so"))
    record_property("rounds", rounds)
    record_property("killed", killed)
    assert killed

@compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None, "flip"], ids=["empty", "cut", "missing", "one bit"])
def test_a_damaged_file_is_built_again(cache, tmp_path, damage):
    source = toy(tmp_path)
    answer(source)
    file, = cache.glob("*.so")
    whole = file.read_bytes()
    file.unlink()
    if damage == "flip": damage = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    if damage is not None: file.write_bytes(damage)
    assert answer(source) == "42\n"
    assert all(native.find(cache, f.stem.rpartition("-")[0]) == f for f in cache.glob("*.so"))

@compiler
def test_a_changed_source_is_built_anew(cache, tmp_path):
    assert native.load(toy(tmp_path)).answer() == 42
    native.load.cache_clear()
    assert native.load(toy(tmp_path, 'extern "C" int answer() { return 43; }\n')).answer() == 43
    assert len(list(cache.glob("*.so"))) == 2

@compiler
def test_a_compiler_that_refuses_is_quoted_and_leaves_nothing(cache, tmp_path):
    with pytest.raises(RuntimeError, match="could not compile toy.cpp.*error"): native.load(toy(tmp_path, "int f( {"))
    assert not list(cache.iterdir())

@compiler
def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("PARETOLAB_CACHE", str(tmp_path/"file"/"cache"))
    native.load.cache_clear()
    with pytest.raises(RuntimeError, match="set PARETOLAB_CACHE"): native.load(toy(tmp_path))

def test_without_a_compiler_it_warns_once_and_the_definition_runs(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    packed = torch.randint(256, (3, 6), dtype=torch.uint8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3): assert torch.equal(unpack.fast(packed, 3, 15), unpack.naive(packed, 3, 15))
    assert len([w for w in said if "no-such-compiler" in str(w.message)]) == 1
    assert not cache.exists()

def pack(codes, bits):
    "Bit by bit, or trit by trit, with Python's integers."
    base, per = (3, 5) if bits == 1.58 else (2**bits, None)
    rows = []
    for row in codes:
        parts = [row[i:i+per] for i in range(0, len(row), per)] if per else [row]
        numbers = [sum(c*base**j for j,c in enumerate(p)) for p in parts]
        rows.append(numbers if per else list(numbers[0].to_bytes(unpack.row_bytes(bits, len(row)), "little")))
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), -1)

@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", [unpack.naive, unpack.fast], ids=["naive", "fast"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packed_codes_come_back(bits, form, data):
    columns, rows = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 4))
    top = 2 if bits == 1.58 else 2**bits - 1
    codes = data.draw(st.lists(st.lists(st.integers(0, top), min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    assert form(pack(codes, bits), bits, columns).tolist() == codes

@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [0, 1, 4, 5, 7, 8, 9, 16, 255, 1024])
def test_fast_is_naive_on_any_bytes(bits, rows, columns):
    m = unpack.row_bytes(bits, columns)
    packed = torch.randint(256, (rows, m), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns))
    assert torch.equal(unpack.fast(packed, bits, columns), unpack.naive(packed, bits, columns))

@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x.t().contiguous().t(), lambda x: x[1:], lambda x: x.expand(3, -1, -1)[1]], ids=["rows", "transposed", "offset", "expanded"])
def test_views(bits, view):
    packed = view(torch.randint(256, (6, unpack.row_bytes(bits, 37)), dtype=torch.uint8))
    assert torch.equal(unpack.fast(packed, bits, 37), unpack.naive(packed.clone(), bits, 37))

@pytest.mark.parametrize("bits", BITS)
def test_the_operator_keeps_its_promises_to_torch(bits):
    packed = torch.randint(256, (4, unpack.row_bytes(bits, 24)), dtype=torch.uint8)
    torch.library.opcheck(unpack._op, (packed, bits, 24))

@compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def f(packed): return unpack.fast(packed, 3, 40).float() - 4
    for rows in (2, 5, 9):
        packed = torch.randint(256, (rows, 15), dtype=torch.uint8)
        assert torch.equal(f(packed), unpack.naive(packed, 3, 40).float() - 4)

BAD = [((2, 3), torch.int32, 8, 3, TypeError, "uint8 .got torch.int32"), ((2, 3), torch.uint8, 5, 4, ValueError, "bits=5"),
    ((2, 3), torch.uint8, 4, 7, ValueError, "take 4 bytes a row .got 3"), ((2, 3), torch.uint8, 4, 4, ValueError, "take 2 bytes a row .got 3"),
    ((2, 3), torch.uint8, 4, -1, ValueError, "-1 columns"), ((6,), torch.uint8, 8, 6, ValueError, "two dimensions"),
    ((2, 3), torch.uint8, 1.6, 15, ValueError, "bits=1.6"), ((2, 3), torch.uint8, 0, 15, ValueError, "bits=0")]

@pytest.mark.parametrize("form", [unpack.naive, unpack.fast], ids=["naive", "fast"])
@pytest.mark.parametrize("shape, dtype, bits, columns, error, words", BAD)
def test_what_does_not_fit_is_refused(form, shape, dtype, bits, columns, error, words):
    with pytest.raises(error, match=words): form(torch.zeros(shape, dtype=dtype), bits, columns)

@compiler
def test_writes_nothing_beyond_its_rows(cache):
    lib = native.load("unpack.cpp")
    for b, columns in [(1, 13), (3, 11), (6, 5), (0, 9), (8, 3)]:
        m = unpack.row_bytes(b or 1.58, columns)
        packed, out = torch.full((2, m), 255, dtype=torch.uint8), torch.full((2*columns + 64,), 77, dtype=torch.uint8)
        lib.unpack(ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(out[32:].data_ptr()), *map(ctypes.c_int64, (2, m, columns)), b)
        assert (out[:32] == 77).all() and (out[-32:] == 77).all() and (out[32:-32] != 77).all()

@compiler
@pytest.mark.parametrize("source", sorted((Path(native.__file__).parent/"csrc").glob("*.cpp")), ids=lambda s: s.name)
def test_the_portable_text_stands_alone(source, tmp_path):
    "As another kind of processor sees it: nothing outside of the x86 part needs what is inside."
    (plain := tmp_path/source.name).write_text(source.read_text().replace("defined(__x86_64__)", "0"))
    done = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", str(plain)], capture_output=True, text=True)
    assert not done.returncode, done.stderr[:2000]
