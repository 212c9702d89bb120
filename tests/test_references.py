import lzma, math
from collections import Counter
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from paretolab.engine.evaluate import macro
from paretolab.frontier.references import NGram, _discounts, _ngrams, _trained, _zstd, compressors, reference_lines


class Listed(list):
    def read(self, start, n): return np.array(self[start:start+n], np.int64)


def counts(streams, k, N):
    "Counts of order k by definition: occurrences at the top, different predecessors below."
    grams = [((0,)*(N-1) + tuple(s))[i-k+1:i+1] for s in streams for i in range(N-1, N-1+len(s))]
    if k == N: return Counter(grams)
    longer = {((0,)*(N-1) + tuple(s))[i-k:i+1] for s in streams for i in range(N-1, N-1+len(s))}
    return Counter(g[1:] for g in longer)


def probability(streams, V, N, w, h):
    p = 1/V
    for k in range(1, len(h)+2):
        c = counts(streams, k, N)
        D, here = _discounts(np.array(list(c.values()))), {g[-1]: n for g,n in c.items() if g[:-1] == tuple(h[len(h)-k+1:])}
        if not here: break
        total = sum(here.values())
        p = (here.get(w, 0) - D[min(here.get(w, 0), 3)])/total + sum(D[min(n, 3)] for n in here.values())/total*p
    return p


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_agrees_with_the_definition(data):
    V, N = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 5))
    streams = data.draw(st.lists(st.lists(st.integers(0, V-1), max_size=30), min_size=1, max_size=3).filter(lambda s: any(s)))
    window = data.draw(st.lists(st.integers(0, V-1), min_size=2, max_size=8))
    got = NGram(dict(enumerate(map(Listed, streams))), V, N).nats([window])[0]
    want = [-math.log(probability(streams, V, N, window[j], window[max(0, j-N+1):j])) for j in range(1, len(window))]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 2**32-1))
def test_sums_to_one_after_any_context(V, N, seed):
    r = np.random.default_rng(seed)
    m = NGram({"d": Listed((r.integers(0, V, 500)**2//V).tolist())}, V, N)
    h = r.integers(0, V, (10, 5))
    x = np.concatenate([np.repeat(h, V, 0), np.tile(np.arange(V), 10)[:, None]], 1)
    np.testing.assert_allclose(np.exp(-m.nats(x)[:, -1]).reshape(10, V).sum(1), 1, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=200))
def test_discounts_leave_every_count_positive(c):
    D = _discounts(np.array(c))
    assert D[0] == 0 and all(0 < D[i] < i for i in (1, 2, 3))


@pytest.mark.parametrize("V,N", [(2, 64), (4096, 5), (4097, 4), (2**16, 4), (2**32, 2)])
def test_keys_fill_64_bits(V, N):
    "The highest ids survive packing, and one more token does not fit."
    t = Listed([V-1, 1]*(N+2))
    assert NGram({"d": t}, V, N).nats([[V-1, 1, V-1]]).max() < 1
    with pytest.raises(ValueError, match=f"got order={N+1}"): NGram({"d": t}, V, N+1)


def test_domains_do_not_touch():
    "No n-gram runs from the end of one domain into the next."
    a, b = Listed([1, 2]), Listed([3, 1])
    joint, other = NGram({"a": a, "b": b}, 5, 2), NGram({"b": b, "a": a}, 5, 2)
    np.testing.assert_array_equal(joint.nats([[2, 3]]), other.nats([[2, 3]]))
    assert NGram({"a": Listed([1, 2, 3, 1])}, 5, 2).nats([[2, 3]]) < joint.nats([[2, 3]])


def test_compressors_are_the_tools_themselves():
    text = b"the quick brown fox " * 50 + bytes(range(256))
    lines = compressors({"d": b"jumps over the lazy dog"}, {"d": text})
    shrunk = lzma.compress(text, check=lzma.CHECK_NONE, preset=9 | lzma.PRESET_EXTREME)
    assert lines["xz"]["d"] == 8*len(shrunk)/len(text) and lzma.decompress(shrunk) == text
    assert lines["zstd -19"] == lines["zstd -19, trained dictionary"]


def test_whole_dictionary_stays_within_reach():
    "A passage at the far end of the dictionary is found, even late in a long text."
    passage, filler, before = (np.random.default_rng(n).integers(0, 256, n, np.uint8).tobytes() for n in (100_000, 3_000_000, 2_000_000))
    assert _zstd(before + passage, passage + filler, raw=True) < len(before) + 1000


def test_ids_outside_the_vocabulary_are_refused():
    m = NGram({"d": Listed([1, 3])}, 4)
    for odd in (-1, 4):
        with pytest.raises(ValueError, match=f"0 to 3 .got {min(odd, 0)} to {max(odd, 0)}"): m.nats([[0, odd]])
        with pytest.raises(ValueError, match=f"0 to 3 for a vocabulary of 4 .got {min(odd, 0)} to {max(odd, 0)}"): NGram({"d": Listed([0, odd])}, 4)


@pytest.mark.parametrize("train", [b"", b"x", b"\0"*200_000, np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()])
def test_odd_training_text_never_hurts(train):
    assert _trained(b"some validation text", train) <= _zstd(b"some validation text")


def test_blend_is_the_best_of_its_ends():
    r = np.random.default_rng(1)
    tokens = {d: Listed(r.permutation(30)[r.geometric(.2, 3000) % 30].tolist()) for d in "ab"}
    windows, nbytes = {d: np.array(t[:300]).reshape(-1, 30) for d,t in tokens.items()}, np.ones(30, int)
    best, own, everybody = (_ngrams(tokens, windows, nbytes, 3, blends=b) for b in ((0, .5, 1), (1,), (0,)))
    assert all(best[d] <= min(own[d], everybody[d]) for d in "ab") and own != everybody
    np.testing.assert_allclose(everybody["a"], NGram(tokens, 30, 3).nats(windows["a"]).sum()/np.log(2)/290)


def test_windows_without_bytes_are_refused():
    with pytest.raises(ValueError, match="'d' stand for no bytes .got 1 windows of 3 tokens"):
        _ngrams({"d": Listed([1, 2])}, {"d": [[1, 0, 0]]}, np.array([0, 1, 1]), 2)


def test_every_reference_on_every_domain():
    corpus = {d: {"text": [f"{d} text number {i}" for i in range(9)]} for d in ("mail", "code")}
    nbytes = np.ones(256, int)
    tokens = {d: Listed("".join(c["text"]).encode()) for d,c in corpus.items()}
    lines = reference_lines(corpus, corpus, tokens, {d: [t[:21], t[40:61]] for d,t in tokens.items()}, nbytes)
    assert len(lines) == 5 and all(list(bpb) == ["mail", "code"] for bpb in lines.values())
    assert all(0 < macro(bpb) < 16 for bpb in lines.values())
    with pytest.raises(ValueError, match="got code in some"): reference_lines(corpus, corpus, {"mail": tokens["mail"]}, tokens, nbytes)
