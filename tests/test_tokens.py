"""The shipped tokenizer from the shipped text, builds killed anywhere, and token files that are not what they say."""
import hashlib, json, os, signal
from pathlib import Path

import numpy as np, pytest
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from paretolab.data import corpus, split, stream, tokens

SHIPPED = Path(tokens.__file__).parent/"tiny"/"tokenizer.json"

def test_the_shipped_tokenizer_is_what_its_recipe_gives():
    made = tokens.train_tokenizer(split.split(corpus.load())[0], 4096)
    assert made.to_str(pretty=True) == SHIPPED.read_text() or made.to_str() == SHIPPED.read_text()

@pytest.fixture(scope="module")
def tok(): return tokens.tokenizer()

@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200) | st.just("before <|endoftext|> after"))
def test_any_text_comes_back_and_its_bytes_are_counted(tok, text):
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text and tokens.token_bytes(tok)[ids].sum() == len(text.encode())

def made(**domains): return {d: Dataset.from_dict(dict(text=t, source=[""]*len(t))) for d,t in domains.items()}

TEXT = made(a=[f"document {i} of a\n"*(i % 7 + 1) for i in range(50)], b=[f"and {i} of b" for i in range(20)])
OTHER = made(a=TEXT["a"]["text"][::-1], b=TEXT["b"]["text"][:])                # as many tokens, in another order

def files(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

@pytest.fixture(scope="module")
def calm(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    tokens.build(TEXT, tok, folder, chunk=8)
    return files(folder)

def test_the_file_is_the_documents_one_after_the_other(tok, tmp_path):
    built = tokens.build(TEXT, tok, tmp_path, chunk=8)
    for d,t in built.items():
        want = [i for text in TEXT[d]["text"] for i in tok.encode(text, add_special_tokens=False).ids + [0]]
        assert t.read(0, len(t)).tolist() == want and t.read(3, 4).tolist() == want[3:7] and t.read(len(t), 0).tolist() == []

def killed(point, calls, *args):
    "Build in a child that is killed at its n-th call of a function of `os`; was it?"
    if child := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        name, after = point
        real, left = getattr(os, name), [calls]
        def hook(*a, **k):
            left[0] -= 1
            if left[0] < 0 and not after: os.kill(os.getpid(), signal.SIGKILL)
            out = real(*a, **k)
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
            return out
        setattr(os, name, hook)
        tokens.build(*args)
    finally: os._exit(0)

@pytest.mark.parametrize("point", [("fsync", False), ("fsync", True), ("replace", False), ("replace", True), ("unlink", True)], ids=lambda p: f"{'after' if p[1] else 'before'} {p[0]}")
@pytest.mark.parametrize("before", [None, OTHER], ids=["new", "over another text"])
def test_a_build_killed_anywhere_is_finished_to_the_same_bytes(tok, calm, tmp_path, point, before, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    kills = 0
    for calls in (0, 3, 7, 8, 12):
        folder = tmp_path/str(calls)
        if before: tokens.build(before, tok, folder)
        kills += killed(point, calls, TEXT, tok, folder, 8)
        if before:                                        # whichever text is asked for next, that one it is
            again = tokens.build(before, tok, folder)
            assert again["a"].read(0, len(again["a"])).tolist() == [i for t in before["a"]["text"] for i in tok.encode(t, add_special_tokens=False).ids + [0]]
        tokens.build(TEXT, tok, folder, chunk=8)
        assert files(folder) == calm
    assert kills >= 1

def test_a_killed_build_goes_on_where_it_was(tok, calm, tmp_path, monkeypatch):
    assert killed(("fsync", True), 7, TEXT, tok, tmp_path, 8)
    done = json.loads((tmp_path/"a.progress.json").read_text())["documents"]
    seen = []
    class Watched:
        def __getattr__(self, name): return getattr(tok, name)
        def encode_batch_fast(self, texts, **k): seen.append(len(texts)); return tok.encode_batch_fast(texts, **k)
    tokens.build(TEXT, Watched(), tmp_path, chunk=8)
    assert 0 < done < 50 and sum(seen) == 70 - done and files(tmp_path) == calm

@pytest.mark.parametrize("name, damage", [(n, d) for n in ("a.tokens", "a.json") for d in ("cut", "empty", "longer", "gone")] + [("a.json", "list"), ("a.json", "other type"), ("a.json", "binary")])
def test_damaged_files_are_refused_and_built_again(tok, calm, tmp_path, name, damage):
    tokens.build(TEXT, tok, tmp_path, chunk=8)
    file = tmp_path/name
    raw, record = file.read_bytes(), json.loads((tmp_path/"a.json").read_text())
    if damage == "gone": file.unlink()
    else: file.write_bytes({"cut": raw[:-3], "empty": b"", "longer": raw + b"{}", "list": b"[]", "binary": b"\xff\xfe", "other type": json.dumps({**record, "dtype": "int64"}).encode()}[damage])
    with pytest.raises(ValueError, match=rf"{'a.json' if name == 'a.json' else 'a.tokens'}.*build the tokens again"): tokens.Tokens(tmp_path/"a.tokens")
    tokens.build(TEXT, tok, tmp_path, chunk=8)
    assert files(tmp_path) == calm

def test_a_flipped_bit_is_found_when_the_file_is_opened_or_looked_up_again(tok, calm, tmp_path):
    tokens.build(TEXT, tok, tmp_path, chunk=8)
    raw = bytearray((tmp_path/"a.tokens").read_bytes())
    for bit in (0, 8*len(raw)//2 + 3, 8*len(raw) - 1):
        (tmp_path/"a.tokens").write_bytes(bytes(b ^ (1 << bit % 8)*(i == bit//8) for i,b in enumerate(raw)))
        with pytest.raises(ValueError, match=r"a\.tokens holds other bytes than were written.*build the tokens again"): tokens.Tokens(tmp_path/"a.tokens")
        tokens.build(TEXT, tok, tmp_path, chunk=8)
        assert files(tmp_path) == calm

def test_a_record_without_a_hash_is_opened_and_built_again(tok, calm, tmp_path):
    tokens.build(TEXT, tok, tmp_path, chunk=8)
    r = json.loads((tmp_path/"a.json").read_text()); (tmp_path/"a.json").write_text(json.dumps({k: v for k,v in r.items() if k != "sha256"}))
    assert tokens.Tokens(tmp_path/"a.tokens").sha256 is None
    assert tokens.build(TEXT, tok, tmp_path, chunk=8)["a"].sha256 == r["sha256"] and files(tmp_path) == calm

def test_damaged_progress_starts_over(tok, calm, tmp_path):
    for n,damage in enumerate([lambda p, d: p.write_bytes(p.read_bytes()[:5]), lambda p, d: d.write_text("{"), lambda p, d: p.unlink(), lambda p, d: d.write_text("[1]")]):
        assert killed(("fsync", True), 7, TEXT, tok, tmp_path/str(n), 8)
        damage(tmp_path/str(n)/"a.part", tmp_path/str(n)/"a.progress.json")
        tokens.build(TEXT, tok, tmp_path/str(n), chunk=8)
        assert files(tmp_path/str(n)) == calm

def test_progress_that_cannot_be_starts_over(tok, calm, tmp_path):
    for n,wrong in enumerate([dict(documents=-5), dict(documents=51), dict(bytes=-2)]):
        assert killed(("fsync", True), 7, TEXT, tok, tmp_path/str(n), 8)
        at = json.loads((tmp_path/str(n)/"a.progress.json").read_text())
        (tmp_path/str(n)/"a.progress.json").write_text(json.dumps(at | wrong))
        tokens.build(TEXT, tok, tmp_path/str(n), chunk=8)
        assert files(tmp_path/str(n)) == calm

def test_a_build_stays_in_its_folder(tok, tmp_path):
    with pytest.raises(ValueError, match="name is made of letters.*evil"): tokens.build(made(**{"../evil": ["x"]}), tok, tmp_path/"in")
    (tmp_path/"in").mkdir(exist_ok=True); (tmp_path/"mine").write_text("mine"); (tmp_path/"in"/"a.part").symlink_to(tmp_path/"mine")
    tokens.build(made(a=["text"]), tok, tmp_path/"in")
    assert (tmp_path/"mine").read_text() == "mine" and not (tmp_path/"in"/"a.tokens").is_symlink()

def test_documents_and_domains_without_tokens_are_refused(tok, tmp_path):
    with pytest.raises(ValueError, match="'a': document 2 gives no tokens"): tokens.build(made(a=["x", "y", ""]), tok, tmp_path)
    with pytest.raises(ValueError, match="'b' has no documents"): tokens.build({"b": Dataset.from_dict(dict(text=[]))}, tok, tmp_path)

class Fails:
    "A tokenizer that breaks at one document."
    def __init__(self, tok): self.tok = tok
    def __getattr__(self, name): return getattr(self.tok, name)
    def encode_batch_fast(self, texts, **k):
        if "document 21 of a\n" in texts: raise RuntimeError("the tokenizer broke")
        return self.tok.encode_batch_fast(texts, **k)

def test_a_failed_build_names_the_domain_and_the_documents(tok, tmp_path):
    with pytest.raises(RuntimeError, match="the tokenizer broke") as e: tokens.build(TEXT, Fails(tok), tmp_path)
    assert e.value.__notes__ == ["in stage 'encode', on document \"16 to 31 of domain 'a'\""]
    with pytest.raises(ValueError, match=r"'a': document 1 is no text \(got None\); leave it out"): tokens.build(made(a=["x", None, "y"]), tok, tmp_path)

@pytest.mark.parametrize("wrong", [dict(dtype="i4,("), dict(dtype=["uint16"]), dict(dtype={"a": 1}), dict(dtype=">u2"), dict(tokens=10.7), dict(tokens="10"), dict(tokens=None), dict(tokens=True)])
def test_a_record_of_another_kind_is_refused_by_name(tok, tmp_path, wrong):
    tokens.build(TEXT, tok, tmp_path); file = tmp_path/"a.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(ValueError, match=r"a\.json: a whole number of tokens, of type uint16 or uint32.*build the tokens again"): tokens.Tokens(tmp_path/"a.tokens")

def test_a_stream_goes_on_only_on_the_same_tokens(tok, tmp_path):
    first, other = (stream.MixedStream({"a": tokens.build(dict(a=t["a"]), tok, tmp_path/n)["a"]}, {"a": 1.}, 2, 8) for n,t in dict(one=TEXT, two=OTHER).items())
    saved = json.loads(json.dumps(first.state_dict())); before = json.dumps(other.state_dict())
    assert len(first.tokens["a"]) == len(other.tokens["a"])
    with pytest.raises(ValueError, match=r"the saved stream has sha256=\['[0-9a-f]{64}'\] but this one has"): other.load_state_dict(saved)
    assert json.dumps(other.state_dict()) == before
    first.load_state_dict(saved); first.load_state_dict({k: v for k,v in saved.items() if k != "sha256"})     # one saved before there was a hash
    first.close(); other.close()
    (tmp_path/"two"/"a.json").write_bytes((tmp_path/"one"/"a.json").read_bytes())                              # other tokens under a copied record
    with pytest.raises(ValueError, match="holds other bytes than were written"): tokens.Tokens(tmp_path/"two"/"a.tokens")

@pytest.mark.parametrize("start, n", [(-1, 2), (0, 10**9), (5, -1), (10**9, 0)])
def test_a_read_outside_the_file_is_refused(tok, tmp_path, start, n):
    with pytest.raises(ValueError, match="holds .* tokens"): tokens.build(TEXT, tok, tmp_path)["a"].read(start, n)

def test_a_file_cut_while_open_is_noticed(tok, tmp_path):
    t = tokens.build(TEXT, tok, tmp_path)["a"]
    os.truncate(tmp_path/"a.tokens", 10)
    with pytest.raises(OSError, match="cut while in use"): t.read(3, 10)

def test_large_vocabularies_take_four_bytes(tok, tmp_path):
    class Large:
        def __getattr__(self, name): return getattr(tok, name)
        def get_vocab_size(self): return 2**16 + 1
    t = tokens.build(TEXT, Large(), tmp_path)["a"]
    assert t.dtype == np.uint32 and (tmp_path/"a.tokens").stat().st_size == 4*len(t)

@pytest.mark.parametrize("content", ["", "{}", "[1", "\0"])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path/"tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer file"): tokens.tokenizer(tmp_path/"tokenizer.json")

def test_a_tokenizer_with_another_first_entry_is_refused(tmp_path):
    text = SHIPPED.read_text().replace("<|endoftext|>", "<|end|>")
    (tmp_path/"tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"entry 0 has to be '<\|endoftext\|>'"): tokens.tokenizer(tmp_path/"tokenizer.json")

@pytest.mark.parametrize("vocab, words", [(256, "at least 257"), (5000, "gives only")])
def test_vocabularies_the_text_cannot_fill_are_refused(vocab, words):
    with pytest.raises(ValueError, match=words): tokens.train_tokenizer(made(a=["a few words"]), vocab)

def test_a_vocabulary_of_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match=r"'a': document 1 is no text \(got None\)"): tokens.train_tokenizer(made(a=["x", None]), 300)
