"""The rules of the run itself, on small runs in folders of their own."""
import json
from pathlib import Path

import pytest

@pytest.fixture
def run(pytester):
    def run(test, allowed="", *args):
        (pytester.path/"tests").mkdir()
        (pytester.path/"tests"/"allowed_skips").write_text(allowed)
        (pytester.path/"tests"/"conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text().replace('pytest_plugins = "pytester"', ""))
        (pytester.path/"tests"/"test_it.py").write_text("import pytest\n" + test)
        pytester.makeini("[pytest]\nmarkers = soak: long\naddopts = -m 'not soak'\n")
        return pytester.runpytest_subprocess(*args)
    return run

SKIP = "def test_a(): pytest.skip('no moon tonight')\ndef test_b(): pass\n"

def test_a_skip_fails_the_run(run):
    result = run(SKIP)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*not in tests/allowed_skips*", "tests/test_it.py::test_a: no moon tonight"])

def test_a_listed_skip_does_not(run): assert run(SKIP, "# nights\ntests/test_it.py::test_a | no moon*\n").ret == 0

@pytest.mark.parametrize("line", ["tests/test_it.py::test_b | no moon*", "tests/test_it.py::test_a | no sun*"])
def test_another_test_or_reason_is_not_allowed(run, line): assert run(SKIP, line).ret == 1

@pytest.mark.parametrize("test", ["pytest.skip('all of it', allow_module_level=True)", "@pytest.mark.skipif(True, reason='why')\ndef test_a(): pass\ndef test_b(): pass",
    "@pytest.mark.xfail(reason='known')\ndef test_a(): assert False\ndef test_b(): pass"])
def test_other_ways_to_skip(run, test):
    result = run(test)
    assert result.ret == (5 if "allow_module" in test else 1)
    result.stdout.fnmatch_lines(["*not in tests/allowed_skips*"])

def test_soak_tests_wait_for_their_command_and_leave_a_journal(run, pytester):
    test = "@pytest.mark.soak\ndef test_long(record_property): record_property('kills', 7)\ndef test_short(): pass\n"
    result = run(test)
    result.assert_outcomes(passed=1, deselected=1)
    assert not (pytester.path/"soak").exists()
    pytester.runpytest_subprocess("-m", "soak").assert_outcomes(passed=1, deselected=1)
    line, = (pytester.path/"soak"/"journal.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["test"] == "tests/test_it.py::test_long" and line["outcome"] == "passed" and line["kills"] == 7
