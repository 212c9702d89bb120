"""No leak from training into validation, by a check that knows nothing of the code."""
import numpy as np, pytest
from datasets import Dataset
from paretolab.data import corpus
from paretolab.data.split import clusters, shingles, split

def grams(text, k=13):
    "A document's shingles, as Python's own strings."
    w = text.split()
    return {" ".join(w[i:i+k]) for i in range(max(len(w) - k + 1, 1))}

def shared(train, valid):
    "For each validation document, the share of its shingles that training holds."
    held = {d: [grams(t) for t in ds["text"]] for d,ds in valid.items()}
    wanted, found = {hash(g) for docs in held.values() for s in docs for g in s}, set()
    for ds in train.values():
        for t in ds["text"]:
            w = t.split()
            for i in range(max(len(w) - 12, 1)):
                if (h := hash(" ".join(w[i:i+13]))) in wanted: found.add(h)
    return [sum(hash(g) in found for g in s)/len(s) for docs in held.values() for s in docs]

@pytest.fixture(scope="module")
def tiny(): return corpus.load()

def test_no_validation_document_of_the_shipped_corpus_is_in_training(tiny):
    train, valid = split(tiny)
    share = shared(train, valid)
    assert len(share) == sum(map(len, valid.values())) > 100 and max(share) < 0.2

SMALL = "fiction", "legal", "mathqa"

@pytest.mark.parametrize("seed", [1, 2])
def test_every_seed_gives_two_whole_parts(tiny, seed):
    part = {d: tiny[d] for d in SMALL}
    train, valid = split(part, seed=seed)
    assert list(train) == list(valid) == list(SMALL) and max(shared(train, valid)) < 0.2
    for d in SMALL:
        assert sorted([*train[d]["text"], *valid[d]["text"]]) == sorted(tiny[d]["text"]) and not set(train[d]["text"]) & set(valid[d]["text"])
        size = lambda ds: sum(len(t.encode()) for t in ds["text"])
        assert 0 < size(valid[d]) <= 0.06*size(tiny[d])
    other = split(part, seed=seed + 10)[1]
    assert split(part, seed=seed)[1]["fiction"]["source"] == valid["fiction"]["source"] != other["fiction"]["source"]

def words(rng, n): return [f"w{i}" for i in rng.integers(0, 10**6, n)]
def made(**domains): return {d: Dataset.from_dict(dict(text=texts, source=[str(i) for i in range(len(texts))])) for d,texts in domains.items()}

@pytest.mark.parametrize("seed", range(8))
def test_a_document_that_training_covers_piece_by_piece_is_moved(seed):
    "Each of many documents quotes 2 % of one: no pair is near, but together they hold all of it. Once it is moved, others leak in turn."
    rng = np.random.default_rng(seed)
    whole = words(rng, 1000)
    quotes = [" ".join(whole[20*i:20*i + 32] + words(rng, 600)) for i in range(49)]
    own = [words(rng, 818) for _ in range(8)]
    chain = [" ".join(whole[100*i:100*i + 182] + own[i]) for i in range(8)]
    quotes += [" ".join(o[32*j:32*j + 32] + words(rng, 600)) for o in own for j in range(6)]
    texts = [" ".join(whole)] + quotes + chain + [" ".join(words(rng, 600)) for _ in range(60)]
    assert len(set(clusters(shingles(texts)))) == len(texts)
    train, valid = split(made(a=texts), share=0.4, seed=seed)
    assert max(shared(train, valid)) < 0.2 and len(valid["a"]) > 5

def test_near_duplicates_stay_together_over_domains():
    rng = np.random.default_rng(0)
    twins = [words(rng, 200) for _ in range(20)]
    train, valid = split(made(a=[" ".join(t) for t in twins] + [" ".join(words(rng, 200)) for _ in range(20)],
        b=[" ".join(t[:150] + words(rng, 50)) for t in twins] + [" ".join(words(rng, 200)) for _ in range(20)]), share=0.3)
    assert max(shared(train, valid)) < 0.2 and len(valid["a"]) and len(valid["b"])

def test_a_short_document_stays_with_the_long_one_that_holds_it():
    rng = np.random.default_rng(0)
    long = [words(rng, 1000) for _ in range(20)]
    train, valid = split(made(a=[" ".join(t) for t in long], b=[" ".join(t[:40]) for t in long]), share=0.3)
    assert [*valid["a"]["source"]] and {*valid["a"]["source"]} == {*valid["b"]["source"]}

def test_clusters_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    base = [words(rng, 60) for _ in range(6)]
    texts = [" ".join(b[:rng.integers(20, 60)] + words(rng, rng.integers(0, 40))) for b in base for _ in range(6)] + ["", "one", "one two", " ".join(base[0][:15]), " ".join(base[0][:15] + words(rng, 300))]
    G, root = [grams(t) for t in texts], list(range(len(texts)))
    for _ in texts:
        for i,a in enumerate(G):
            for j,b in enumerate(G):
                if len(a & b) >= 0.2*min(len(a), len(b)): root[i] = root[j] = min(root[i], root[j])
    assert clusters(shingles(texts)).tolist() == root

@pytest.mark.parametrize("share", [0, 0.5, -1, float("nan")])
def test_a_share_that_leaves_a_part_empty_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 0.5"): split(made(a=["a b", "c d"]), share)

def test_a_domain_of_one_cluster_is_refused():
    with pytest.raises(ValueError, match="domain 'a' has 3 document.* in one cluster"): split(made(a=["same text"]*3))

def test_a_document_that_is_no_text_is_refused_by_name():
    with pytest.raises(ValueError, match=r"domain 'b': document 1 is no text \(got None\); leave it out"): split(made(a=["a b", "c d"], b=["one", None, "two"]))
