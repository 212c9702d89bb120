"""Files of every kind of badness, local repositories in place of the Hub, and the shipped corpus to the byte."""
import hashlib, json, os, warnings
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import example, given, settings, strategies as st
from paretolab.data import corpus

COMMIT = "0"*40

def test_the_shipped_corpus_is_the_one_that_was_described():
    file = Path(corpus.__file__).parent/"tiny"/"tiny.parquet"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == "8b6d8805e5beceb40fcc8adac3c3b0b61e27f5c82ae9408aaf460c28344eb69a"
    loaded = corpus.load()
    assert len(loaded) == 10 and sum(map(len, loaded.values())) == pq.read_metadata(file).num_rows == 4886
    assert all(ds.column_names == ["text", "source"] and all(t.strip() for t in ds["text"]) for ds in loaded.values())

@pytest.mark.parametrize("name", ["", "small", "../tiny", "/etc", "tiny/tiny"])
def test_an_unknown_corpus_is_refused(name):
    with pytest.raises(ValueError, match="only corpus in the package is 'tiny'"): corpus.load(name)

@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab \n\r\t\0é"), max_size=60), st.integers(1, 20))
@example("\n"*50, 3)
@example("a"*50 + "\n\n" + "b"*50, 20)
def test_pieces_join_to_the_document(text, limit):
    cut = corpus.pieces(text, limit)
    assert "".join(cut) == text and all(len(p) <= limit for p in cut) and (len(cut) == 1 or all(cut))

def test_a_huge_paragraph_is_cut_in_linear_time(tmp_path):
    (tmp_path/"a.txt").write_text("x"*2_000_000 + "\n" + " "*20_000 + "y")
    ds = corpus.from_files({"a": str(tmp_path/"a.txt")})["a"]
    assert "".join(ds["text"]) == (tmp_path/"a.txt").read_text() and max(map(len, ds["text"])) == 60_000
    assert ds["source"][:2] == ["a.txt#0", "a.txt#1"]

def parquet(path, **columns): pq.write_table(pa.table(columns), path)

BAD = {
    "bad utf-8": ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8 text: byte 0xff at offset 5"),
    "cut utf-8": ("a.md", "é".encode()[:1], r"a\.md is not UTF-8 text: byte 0xc3 at offset 0"),
    "utf-16": ("a.txt", "text".encode("utf-16"), "is not UTF-8 text"),
    "json: no object": ("a.jsonl", b'{"text": "a"}\n["text"]\n', r"a\.jsonl line 2 has no string under the key 'text'"),
    "json: no text": ("a.jsonl", b'{"Text": "a"}', "line 1 has no string under the key 'text'"),
    "json: number": ("a.jsonl", b'\n\n{"text": 3}', "line 3 has no string under the key 'text'"),
    "json: cut": ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"line 2 is not JSON \(Unterminated string"),
    "json: half a character": ("a.jsonl", b'{"text": "\\ud800"}', "line 1 holds half of a surrogate pair"),
    "json: too deep": ("a.jsonl", b'{"text": "a"}\n' + b"["*100_000, "line 2 is nested too deep"),
    "json: bad utf-8": ("a.jsonl", b'{"text": "\xe9"}', "is not UTF-8 text: byte 0xe9"),
    "parquet: no parquet": ("a.parquet", b"PAR1", "cannot be read as parquet with a column 'text'"),
    "parquet: empty": ("a.parquet", b"", "cannot be read as parquet"),
    "other kind": ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf", r"a\.pdf is not UTF-8 text"),
    "no text": ("a.txt", b" \n\t\n", "is empty: of the 1 files that match"),
}

@pytest.mark.parametrize("name, content, words", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_name(tmp_path, name, content, words):
    (tmp_path/name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=words): corpus.from_files({"mine": str(tmp_path/name)})

def test_parquet_without_text_and_with_other_types(tmp_path):
    parquet(tmp_path/"a.parquet", words=["a"])
    with pytest.raises(ValueError, match="with a column 'text'"): corpus.from_files({"a": str(tmp_path/"*")})
    parquet(tmp_path/"a.parquet", text=[1, 2])
    with pytest.raises(ValueError, match=r"has to hold strings \(got 1\)"): corpus.from_files({"a": str(tmp_path/"*")})

@pytest.mark.parametrize("rows, letters", [(400, 10**6), (3, 30_000_000)])
def test_a_small_parquet_file_that_holds_too_much_is_refused_early(tmp_path, rows, letters):
    column = pa.array(["a"*letters]*rows).dictionary_encode() if rows > 3 else pa.array(["a"*letters]*rows)
    pq.write_table(pa.table(dict(text=column)), file := tmp_path/"bomb.parquet", compression="zstd")
    assert file.stat().st_size < 50_000
    with pytest.raises(ValueError, match=r"bomb\.parquet of \d+ bytes unpacks to more than 67108864, .*write it as .jsonl"): corpus.from_files({"a": str(file)})

def test_parquet_rows_come_in_order_over_batches(tmp_path):
    parquet(tmp_path/"a.parquet", text=[f"row {i}" for i in range(1000)])
    assert corpus.from_files({"a": str(tmp_path/"a.parquet")})["a"]["text"][:] == [f"row {i}" for i in range(1000)]

def test_documents_without_text_are_counted(tmp_path):
    parquet(tmp_path/"a.parquet", text=["one", None, "", "two"])
    (tmp_path/"b.txt").write_text("")
    with pytest.warns(UserWarning, match=r"3 of 5 documents hold no text and are left out: a\.parquet:1, a\.parquet:2, b\.txt"): ds = corpus.from_files({"a": str(tmp_path/"*")})["a"]
    assert ds["text"] == ["one", "two"] and ds["source"] == ["a.parquet:0", "a.parquet:3"]

def test_what_cannot_be_read_is_named_and_never_passed_over(tmp_path, monkeypatch):
    (tmp_path/"a.txt").write_text("text")
    (tmp_path/"b.txt").symlink_to(tmp_path/"gone")
    with pytest.raises(ValueError, match=r"b\.txt cannot be read: it is a broken link"): corpus.from_files({"a": str(tmp_path/"*.txt")})
    (tmp_path/"b.txt").unlink()
    os.mkfifo(tmp_path/"b.txt")
    with pytest.raises(ValueError, match=r"b\.txt cannot be read: .* no regular file"): corpus.from_files({"a": str(tmp_path/"*.txt")})
    (tmp_path/"b.txt").unlink()
    def refuse(self): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied"): corpus.from_files({"a": str(tmp_path/"*.txt")})

@pytest.mark.parametrize("domain", ["", "a b", "../a", "a/b", "a.b", "a\n"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, domain):
    (tmp_path/"a.txt").write_text("text")
    with pytest.raises(ValueError, match="name is made of letters"): corpus.from_files({domain: str(tmp_path/"*.txt")})

def test_no_domain_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="at least one domain"): corpus.from_files({})

@pytest.mark.parametrize("pattern, words", [("notes", "is a folder; it holds 2 *.md, 1 *.rst: write '{}/notes/**/*.md' for the first kind"), ("notes/", "it holds 2 *.md"), ("notes/deep", "it holds 1 *.md: write '{}/notes/deep/**/*.md'"),
    ("notes/**/*.txt", "matches no file; {}/notes holds 2 *.md, 1 *.rst: write"), ("n*/*.txt", "matches no file; {} holds 2 *.md, 1 *.rst, 1 without an ending: write '{}/**/*.md'"), ("plain/x.txt", "{}/plain holds 1 without an ending: write '{}/plain/**/*'"),
    ("none/*.txt", "matches no file, as there is no folder {}/none; look at its path"), ("notes/a.md/x", "there is no folder {}/notes/a.md;"), ("empty/*", "matches no file; {}/empty holds no file: name another")])
def test_what_matches_nothing_is_told_what_there_is(tmp_path, pattern, words):
    for n in ("notes/a.md", "notes/deep/b.md", "notes/c.rst", "notes/.hidden.txt", "plain/README", "empty"): (tmp_path/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/n).write_text("text") if n != "empty" else (tmp_path/n).mkdir()
    with pytest.raises(ValueError) as e: corpus.from_files({"a": f"{tmp_path}/{pattern}"})
    assert str(e.value).startswith(f"domain 'a': '{tmp_path}/{pattern}' ") and words.replace("{}", str(tmp_path)) in str(e.value)
    if "write '" in words: assert len(corpus.from_files({"a": words.replace("{}", str(tmp_path)).split("write '")[1].split("'")[0]})["a"]) >= 1

def test_a_folder_with_brackets_is_advised_as_it_is_matched(tmp_path):
    (tmp_path/"b[1]").mkdir(); (tmp_path/"b[1]"/"d.md").write_text("text")
    with pytest.raises(ValueError, match="it holds 1 ") as e: corpus.from_files({"a": f"{tmp_path}/b[1]"})
    assert corpus.from_files({"a": str(e.value).split("write '")[1].split("'")[0]})["a"]["text"] == ["text"]

def test_order_home_and_kinds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"x").mkdir()
    for n in ("b.md", "x/a.TXT", "c.txt"): (tmp_path/n).write_text(n)
    (tmp_path/"d.jsonl").write_bytes(b'{"text": "one"}\r\n\r\n{"text": "two", "more": 1}\r\n')
    assert corpus.from_files({"a": "~/**/*.*"})["a"]["text"] == ["b.md", "c.txt", "one", "two", "x/a.TXT"]

# The Hub, played by folders

@pytest.fixture
def repo(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path/"cache"))
    def make(rows, name="repo"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path/name)
    return make

def test_a_repository_gives_its_first_documents(repo):
    path = repo([dict(text=f"document {i}", n=i) for i in range(30)])
    ds = corpus.from_hub({"a": (path, COMMIT)}, documents=4)["a"]
    assert ds["text"] == [f"document {i}" for i in range(4)] and ds["source"][3] == f"{path}@00000000:3"

def test_repositories_that_do_not_fit_are_refused(repo):
    with pytest.raises(ValueError, match="row 1 of .* has no string under 'text'"): corpus.from_hub({"a": (repo([dict(text="a"), dict(text=None)]), COMMIT)})
    with pytest.raises(ValueError, match=r"columns: words"): corpus.from_hub({"a": (repo([dict(words="a")], "other"), COMMIT)})

@pytest.mark.parametrize("revision", ["main", "", "0"*39, "g"*40, "0"*40 + "\n"])
def test_a_revision_that_may_move_is_refused(revision):
    with pytest.raises(ValueError, match="commit hash of 40"): corpus.from_hub({"a": ("some/repo", revision)})
