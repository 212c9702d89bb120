"""Stages on threads against the loop: order, errors, the bound, and what is left when a consumer stops, is interrupted, or leaves."""
import os, random, signal, subprocess, sys, threading, time

import pytest
from hypothesis import given, settings, strategies as st
from paretolab.data.stages import Stage, one_by_one, over_spdl, staged

PIPELINES = [staged, over_spdl]
both = pytest.mark.parametrize("run", PIPELINES, ids=lambda f: f.__name__)
left = lambda: [t for t in threading.enumerate() if t is not threading.main_thread()]

@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = left(); yield
    assert left() == before

def outcome(results):
    "All that came before an error, and what is known of the error."
    out = []
    try:
        for r in results: out.append(r)
    except Exception as e: return (out, type(e), str(e), *([e.__notes__] if hasattr(e, "__notes__") else []))
    return out, None

def made(n, stages, failing, seed):
    "A source of `n` documents and stages that take random time and fail on some."
    rng = random.Random(seed)
    wait = [[rng.random()/500 for _ in stages] for _ in range(n + 1)]
    def stage(k):
        def f(x):
            time.sleep(wait[x[0]][k])
            if (x[0], k) in failing: raise (KeyError if k % 2 else ValueError)(f"{x[0]} at {k}")
            return [*x, k]
        return f
    def source():
        for i in range(n):
            if (i, -1) in failing: raise OSError(f"no document {i}")
            yield f"document {i}", [i]
    return source, [Stage(stage(k), c, f"stage {k}") for k,c in enumerate(stages)]

@both
@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 25), stages=st.lists(st.integers(1, 5), min_size=1, max_size=4), ahead=st.integers(1, 12), seed=st.integers(0, 10**6),
    failing=st.sets(st.tuples(st.integers(0, 24), st.integers(-1, 3)), max_size=3))
def test_the_same_results_and_the_same_error_as_a_loop(run, n, stages, ahead, seed, failing):
    source, made_stages = made(n, stages, failing, seed)
    got, want = outcome(run(source(), made_stages, ahead)), outcome(one_by_one(source(), made_stages))
    if want[1] is OSError: want = (*want, [f"from the source, after document 'document {len(want[0]) - 1}'" if want[0] else "from the source, at its first document"])
    assert got == want

@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("threads", [(1,), (3, 2), (6,)])
def test_no_more_than_asked_is_under_way(ahead, threads):
    given_out, most, full = 0, 0, threading.Semaphore(0)
    def source():
        nonlocal given_out
        for i in range(60): given_out += 1; full.release(); yield i, i
    for i,_ in staged(source(), [Stage(lambda x: x, c) for c in threads], ahead):
        if i < 60 - ahead - 1:                                              # as many as there may be do come; more never
            while given_out < i + 1 + ahead: assert full.acquire(timeout=10)
            time.sleep(.002)
        most = max(most, given_out - (i + 1))
    assert most == ahead

@both
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_stage_runs_on_as_many_threads_as_it_has(run, threads):
    together, lock, at_once, most = threading.Barrier(threads), threading.Lock(), 0, 0
    def f(x):
        nonlocal at_once, most
        with lock: at_once += 1; most = max(most, at_once)
        together.wait(timeout=20)                                           # nobody goes on before all are there
        with lock: at_once -= 1
        return x
    assert [x for _,x in run(((i, i) for i in range(4*threads)), [Stage(f, threads)], 4*threads)] == list(range(4*threads))
    assert most <= threads

def endless(closed):
    "A source without an end that says when it is closed."
    try:
        i = 0
        while True: yield i, i; i += 1
    finally: closed.append(threading.current_thread().name)

@both
@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 20), threads=st.lists(st.integers(1, 4), min_size=1, max_size=3), ahead=st.integers(1, 9))
def test_a_consumer_may_stop_anywhere(run, stop, threads, ahead):
    closed, before = [], left()
    results = run(endless(closed), [Stage(lambda x: x, c) for c in threads], ahead)
    assert [next(results)[1] for _ in range(stop)] == list(range(stop))
    time.sleep(.02)                                                         # everything that may be under way is, and the source waits
    results.close()
    assert left() == before and (run is over_spdl or closed == ["source"]*(stop > 0))      # closed by the thread that read it

@both
def test_a_consumer_that_fails_leaves_no_thread(run):
    before = left()
    def consume():
        for i,_ in run(endless([]), [Stage(lambda x: x, 3)]):
            if i == 5: raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): consume()
    assert left() == before

def test_an_interrupt_while_waiting_leaves_no_thread():
    before, begun = left(), threading.Event()
    def slow(x): begun.set(); time.sleep(.5); return x
    interrupt = threading.Thread(target=lambda: (begun.wait(10), os.kill(os.getpid(), signal.SIGINT)))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in staged(endless([]), [Stage(slow, 2)]): pass
    interrupt.join()
    assert left() == before

def test_an_interrupt_of_a_stage_arrives_as_one():
    def f(x):
        if x == 3: raise KeyboardInterrupt
        return x
    got = []
    with pytest.raises(KeyboardInterrupt) as e:
        for _,x in staged(endless([]), [Stage(f, 2)]): got.append(x)
    assert got == [0, 1, 2] and e.value.__notes__ == ["in stage 'f', on document 3"]

class Empty(Exception):
    "An error that is false: it holds a list of problems, here none."
    def __len__(self): return 0

def broken(error):
    yield 0, 0
    raise error

@pytest.mark.parametrize("run", [one_by_one, *PIPELINES], ids=lambda f: f.__name__)
def test_an_error_that_is_false_is_an_error(run):
    def f(x):
        if x == 3: raise Empty("bad")
        return x
    got = []
    with pytest.raises(Empty, match="bad") as e:
        for _,x in run(((i, i) for i in range(8)), [Stage(f, 2)]): got.append(x)
    assert got == [0, 1, 2] and e.value.__notes__ == ["in stage 'f', on document 3"]

@pytest.mark.parametrize("error", ["Empty('bad')", "KeyboardInterrupt()"])
@pytest.mark.parametrize("run", ["staged", "over_spdl"])
def test_an_error_of_the_source_arrives_and_does_not_hang(run, error):
    "In a process of its own, which can be ended if it hangs."
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom test_stages import *\ntry: list({run}(broken({error}), [Stage(lambda x: x, 2)]))\nexcept BaseException as e: print(type(e).__name__, e.__notes__, flush=True)\nos._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert done.stdout == error.split("(")[0] + " ['from the source, after document 0']\n", done.stderr

def test_a_process_ends_though_a_stage_never_does():
    code = "import sys, threading\nfrom paretolab.data.stages import *\nr = sys.modules['kept'] = staged(((i, i) for i in range(99)), [Stage(lambda x: x if x < 2 else threading.Event().wait(), 2)])\nprint(next(r)[1], next(r)[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "0 1\n", done.stderr

def test_nothing_starts_before_the_first_result_is_asked_for():
    closed, before = [], left()
    r = staged(endless(closed), [Stage(lambda x: x)])
    assert left() == before
    r.close()
    assert closed == []

@both
@pytest.mark.parametrize("stages, ahead, words", [([], 8, "at least one stage"), ([str.split], 8, "each a `Stage` .got <method"), ([Stage(str.split)], 0, "got ahead=0"), ([Stage(str.split)], 1.5, "got ahead=1.5")])
def test_what_is_no_pipeline_is_refused(run, stages, ahead, words):
    with pytest.raises(ValueError, match=words): list(run([("a", "b")], stages, ahead))
