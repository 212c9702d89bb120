import math, os
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from dataclasses import fields
from hypothesis import given, settings, strategies as st
from paretolab.frontier import points as module
from paretolab.frontier.points import Point, dominates, frontier, read, write

lost = Point(name="lost", failed="out of memory")


def point(name, s, q, **more): return Point(name=name, parameters=1, model_bytes=s, bpb_macro=q, bpb={"d": q}, **more)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([.5, 1., 1.25, 2., 3.])), max_size=30), st.integers(0, 30))
def test_frontier_is_what_nothing_dominates(pairs, where):
    ok = [point(str(i), s, q) for i,(s,q) in enumerate(pairs)]
    got = frontier(ok[:where] + [lost] + ok[where:])
    assert {p.name for p in got} == {p.name for p in ok if not any(dominates(o, p) for o in ok)}
    assert [p.model_bytes for p in got] == sorted(p.model_bytes for p in got)
    assert frontier(got) == got


def test_frontier_of_one_domain():
    a = Point(name="a", parameters=1, model_bytes=1, bpb_macro=2., bpb={"x": 1., "y": 3.})
    b = Point(name="b", parameters=1, model_bytes=2, bpb_macro=1.75, bpb={"x": 1.5, "y": 2.})
    assert frontier([b, a], "x") == [a] and frontier([b, a], "y") == frontier([b, a]) == [a, b]
    assert dominates(a, b, "x") and not dominates(a, b)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
numbers = st.dictionaries(text, st.floats(.01, 20), min_size=1, max_size=4)
maybe = lambda s: st.none() | s


@st.composite
def rows(draw):
    bpb, failed = draw(numbers), draw(st.just("") | text)
    must = (lambda s: maybe(s)) if failed else (lambda s: s)
    return dict(name=draw(text), shape=draw(text), parameters=draw(must(st.integers(1, 2**62))), bits=draw(maybe(st.floats(0, 16))),
        mixture=draw(numbers), tokens=draw(maybe(st.integers(0, 2**62))), train_seconds=draw(maybe(st.floats(0, 1e9))),
        model_bytes=draw(must(st.integers(1, 2**62))), bpb=bpb, bpb_macro=draw(must(st.just(sum(bpb.values())/len(bpb)))), failed=failed)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), max_size=5, unique_by=lambda r: r["name"]))
def test_a_table_comes_back_as_it_was(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("table")/"points.parquet"
    points = [Point(**r) for r in table]
    write(points, path)
    assert read(path) == points


def test_numpy_numbers_are_numbers(tmp_path):
    p = Point(name="a", parameters=np.int64(3), model_bytes=np.int32(5), bpb_macro=np.float32(1.5), bpb={"d": np.float32(1.5)}, bits=4, mixture={"d": np.float64(1)})
    write([p], tmp_path/"p"); assert read(tmp_path/"p") == [p]
    assert math.isclose(p.bits_per_weight, 40/3)


@pytest.mark.parametrize("wrong,says", [
    (dict(name=""), "needs a name .got ''"), (dict(name=3), "name is of type str .got 3"),
    (dict(tokens=1.5), "tokens is of type int .got 1.5"), (dict(tokens=-1), "tokens is finite and not negative .got -1"),
    (dict(bits="4"), "bits is of type float .got '4'"), (dict(train_seconds=math.inf), "train_seconds is finite .* .got inf"),
    (dict(mixture={"a": "b"}), "mixture is of type dict .text: number. .got {'a': 'b'}"), (dict(mixture={1: 2.}), "mixture is of type dict"),
    (dict(bpb={"a": math.nan}), "bpb is finite and not negative .got {'a': nan}"), (dict(mixture=None), "mixture is of type dict .* .got None"),
    (dict(failed=""), r"lacks parameters, model_bytes, bpb_macro, bpb .got \[None, None, None, {}\]"),
    (dict(failed="", parameters=1, model_bytes=1, bpb={"a": 1.}, bpb_macro=0.), r"lacks bpb_macro .got \[0.0\]"),
    (dict(failed="", parameters=1, model_bytes=1, bpb={"a": 1., "b": 2.}, bpb_macro=1.51), "the mean of bpb over domains, 1.500000 .got 1.51"),
])
def test_impossible_points_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): Point(**dict(name="a", failed="?") | wrong)


def test_a_broken_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path/"points.parquet"
    write([lost], path)
    def die(*args): raise OSError("disk full")
    monkeypatch.setattr(module.pq, "write_table", die)
    with pytest.raises(OSError): write([point("a", 1, 1.)], path)
    assert read(path) == [lost]


def column(name, values):
    def change(t): return t.set_column(t.column_names.index(name), name, pa.array(values))
    return change


@pytest.mark.parametrize("change,says", [
    (lambda t: t.drop_columns(["seed"]), r"lacks the columns \['seed'\] and has the unknown columns \[\]"),
    (lambda t: t.append_column("x", pa.array([1])), r"lacks the columns \[\] and has the unknown columns \['x'\]"),
    (column("tokens", ["many"]), "many"), (column("bpb", ["{"]), "row 0: .*delimiter|row 0: Expecting"), (column("bpb", ["[1]"]), r"row 0: .*bpb is of type dict .* .got \[1\]"),
    (column("bpb", pa.array([None], pa.string())), "row 0"), (column("failed", [""]), "row 0: point 'lost' did not fail and lacks"), (column("name", [""]), "row 0: a point needs a name"),
])
def test_odd_files_are_refused(tmp_path, change, says):
    write([lost], tmp_path/"p")
    pq.write_table(change(pq.read_table(tmp_path/"p")), tmp_path/"p")
    with pytest.raises(ValueError, match=says): read(tmp_path/"p")


def test_whole_numbers_stored_as_floats_are_read(tmp_path):
    "What a data frame with gaps makes of an integer column."
    write([Point(name="a", tokens=5, failed="?"), lost], tmp_path/"p")
    pq.write_table(column("tokens", [5., None])(pq.read_table(tmp_path/"p")), tmp_path/"p")
    assert [p.tokens for p in read(tmp_path/"p")] == [5, None]


def test_files_that_are_no_tables_are_refused(tmp_path):
    (tmp_path/"p").write_bytes(b"PAR1" + os.urandom(50) + b"PAR1")
    for path in (tmp_path/"p", tmp_path/"missing"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read"): read(path)


def test_columns_are_the_fields(tmp_path):
    "Adding, renaming or reordering a column is a change of the file format: it has to be meant."
    write([lost], tmp_path/"p")
    assert pq.read_table(tmp_path/"p").column_names == [f.name for f in fields(Point)] == """name shape parameters bits group embed_bits quantizer optimizer mixture
        tokens train_seconds training_state_bytes model_bytes bpb_macro bpb decode_tokens_per_s decode_prompt_tokens decode_new_tokens threads decode_engine seed failed""".split()
